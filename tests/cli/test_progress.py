"""The bars on a terminal of 80 columns."""

import io

from rich.console import Console

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
