# make demo | test | lint | docs | check | chaos | fuzz | audit | clean. Needs Python 3.11 or newer, make and a package index;
# nothing is installed outside .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed

.PHONY: demo test lint docs check chaos fuzz audit clean

demo: $(INSTALLED)
	$(BIN)/deitkit compare digits

# On each core, up to four: a process takes up to 3 GB.
test: $(DEVELOPED)
	$(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder \
		-n $$($(BIN)/python -c 'from deitkit.system.process import usable_cores; print(min(4, usable_cores()))')

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DEVELOPED)
	$(BIN)/python site/build.py

check: lint docs test

chaos: $(DEVELOPED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/chaos.py --kills 50 --faults 10 --unit-kills 20

fuzz: $(DEVELOPED)
	$(BIN)/python -m pytest tests/recipe/test_fuzz_recipes.py tests/test_fuzz_files.py tests/test_fuzz_layouts.py \
		tests/export/test_onnx.py -k 'fuzz or changed_file' --hypothesis-profile=fuzz

# Asks the package index for known vulnerabilities of what is installed, so it needs the network.
audit: $(DEVELOPED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
