"""The bars on a terminal of 80 columns."""

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from conftest import TINY
from deitkit.cli.progress import Terminal
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
