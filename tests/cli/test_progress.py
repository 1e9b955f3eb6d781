"""The bars on a terminal of 80 columns."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from conftest import TINY
from deitkit.cli.progress import Terminal
from deitkit.errors import Interrupted
from deitkit.run.observer import Progress


def test_the_time_left_fits_eighty_columns() -> None:
    stream = io.StringIO()
    progress = Progress(
        seed=0, epoch=12, epochs=100, step=1234, steps_per_epoch=3510, images_per_second=1150.0, seconds_left=11_100.0,
        losses={"none": 1.5, "token-hard": 1.3},
    )  # fmt: skip
    with Terminal(Console(file=stream, force_terminal=True, width=80)) as terminal:
        terminal.step("seed 0", progress)
    shown = stream.getvalue()
    assert "1150 images/s, 3 h 5 min left" in shown
    assert "39844/351000" in shown


def test_a_run_whose_output_nobody_reads_any_more_is_stopped_and_saved(tmp_path: Path) -> None:
    """As in `deitkit compare ... | head -1`."""
    command = [sys.executable, "-m", "deitkit", "compare", "digits", *TINY, "methods=[none]", "train.epochs=100000"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("seed 0 epoch 2/"):
            pass
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert said == "what read the output has ended; the same command with --resume continues\n"
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
    with pytest.raises(Interrupted, match=r"^what read the output has ended; nothing was written$"):
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
