"""Imports go one way: from the command line down to the errors. An upward edge fails."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deitkit

# Folders and files of the package, bottom first; each may import from itself and from those before it.
LAYERS = (
    "errors", "recipe", "system", "data", "models", "distillation", "run", "evaluation", "training", "teachers",
    "report", "export", "comparison", "analyze", "demo", "bench", "cli", "api",
)  # fmt: skip
SOURCE = Path(deitkit.__file__).parent


def imported_parts(path: Path) -> set[str]:
    """Return the parts of deitkit that a file imports, wherever in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("deitkit.")}
    return parts & set(LAYERS)


def test_every_part_has_its_layer_and_imports_downwards_only() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        assert part in LAYERS, f"{path} is in no layer: place it in LAYERS"
        above = LAYERS[LAYERS.index(part) + 1 :]
        wrong += [f"{path.relative_to(SOURCE)} imports {other}" for other in imported_parts(path) if other in above]
    assert not wrong, wrong


def test_the_report_reads_run_folders_and_never_imports_training() -> None:
    for path in (SOURCE / "report").rglob("*.py"):
        assert imported_parts(path) <= {"report", "run", "errors", "system", "recipe"}, path


def test_every_folder_says_what_belongs_in_it() -> None:
    for folder in (path for path in SOURCE.rglob("*") if path.is_dir() and any(path.glob("*.py"))):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


@pytest.mark.parametrize(
    ("module", "and_also"),
    [
        ("deitkit.cli.main", {"torch"}),
        ("deitkit.report.write", {"torch"}),
        ("deitkit.evaluation.classify", {"scipy", "pyarrow", "tensorboard"}),
        ("deitkit.comparison.run", set()),
    ],
)
def test_libraries_that_take_long_to_import_are_imported_when_they_are_needed(module: str, and_also: set[str]) -> None:
    slow = {"timm", "torchvision", "sklearn", "matplotlib", "onnxruntime", "transformers", "gradio", "ray"} | and_also
    code = f"import {module}, sys; print(*({slow} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
