"""Progress on a terminal of 80 columns, in a notebook, and where nobody reads it any more."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conftest import TINY
from deitkit.cli.progress import Terminal
from deitkit.errors import Interrupted
from deitkit.run.metrics import EpochMetrics
from deitkit.run.observer import StepProgress


def progress_in(epoch: int) -> StepProgress:
    return StepProgress(
        seed=0, epoch=epoch, epochs=100, step=1234, steps_per_epoch=3510, images_per_second=1150.0,
        seconds_left=11_100.0, losses={"none": 1.5, "token-hard": 1.3},
    )  # fmt: skip


def test_the_time_left_fits_eighty_columns() -> None:
    stream = io.StringIO()
    with Terminal(Console(file=stream, force_terminal=True, width=80)) as terminal:
        terminal.step("seed 0", progress_in(epoch=12))
    shown = stream.getvalue()
    assert "1150 images/s, 3 h 5 min left" in shown
    assert "39844/351000" in shown


class Notebook(ModuleType):
    """IPython's ``display``, which keeps what a notebook would show."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.cells: list[str] = []

    def display(self, shown: Any, **_: Any) -> SimpleNamespace:
        text = shown["text/plain"] if isinstance(shown, dict) else shown._repr_mimebundle_(None, None)["text/plain"]
        self.cells.append(text.rstrip("\n"))
        place = len(self.cells) - 1
        return SimpleNamespace(update=lambda shown, raw: self.cells.__setitem__(place, shown["text/plain"]))


def test_a_notebook_shows_one_text_of_each_training_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    with Terminal(Console(force_jupyter=True)) as terminal:
        terminal.say("begins")
        for title in ("seed 0", "seed 1", "seed 1"):
            terminal.say(f"trains {title}")
            for epoch in (1, 2, 3):
                monkeypatch.setattr(terminal, "_drawn", -60.0)
                terminal.step(title, progress_in(epoch))
                metrics = EpochMetrics(seed=0, student="none", epoch=epoch, epochs=100, train_loss=1.25,
                                       validation={"class": 0.5}, cohort_images_per_second=900.0)  # fmt: skip
                terminal.epoch(title, [metrics])
        terminal.say("ends")
    begins, *between, ends = notebook.cells
    assert (begins, ends) == ("begins", "ends")
    assert between[::2] == ["trains seed 0", "trains seed 1", "trains seed 1"]
    trainings = between[1::2]
    assert [text.count("\n") for text in trainings] == [1, 1, 1]
    for title, text in zip(("seed 0", "seed 1", "seed 1"), trainings, strict=True):
        step, epoch = text.split("\n")
        assert step.startswith(f"{title} epoch 3/100 step 1234/3510  1150 images/s")
        assert epoch.startswith(f"{title} epoch 3/100  900 images/s")
        assert epoch.endswith("none 1.250/50.0%")


def test_a_run_whose_output_nobody_reads_any_more_is_stopped_and_saved(tmp_path: Path) -> None:
    """As in `deitkit compare ... | head -1`."""
    command = [sys.executable, "-m", "deitkit", "compare", "digits", *TINY, "methods=[none]", "train.epochs=100000"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not any(line.startswith("seed 0 epoch 2/") for line in process.stdout):
            pytest.fail(process.stderr.read())
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert (
        said.splitlines()[-1] == "the program that read the output has ended; the same command with --resume continues"
    )
    assert (tmp_path / "run" / "seed-0" / "checkpoint.safetensors").exists()


def test_a_signal_stops_a_run_whose_output_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does under `| tee`, which it ends first."""
    terminal = Terminal(Console(), stopped="stopped; nothing was written")

    def closed(*_: object, **__: object) -> None:
        raise SystemExit(1)  # rich's answer

    monkeypatch.setattr(terminal.console, "print", closed)

    def stopped_while_training() -> None:
        with terminal, terminal.defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert terminal.should_stop()

    with pytest.raises(Interrupted):
        stopped_while_training()
    again = Terminal(terminal.console, stopped="stopped; nothing was written")
    with pytest.raises(Interrupted, match=r"^the program that read the output has ended; nothing was written$"):
        again.say("a line")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.ESTALE, 75), (errno.ENOMEM, 75)])
def test_errors_of_the_system_are_mistakes_or_may_pass(
    number: int, code: int, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("deitkit.recipe.load.shipped_recipes", failing)
    found, _, said = run("compare", "digits")
    assert found == code
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
