"""The observer of a run: progress reports, and requests to stop."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from deitkit.run.metrics import EpochMetrics


@dataclass(frozen=True)
class StepProgress:
    """How far a cohort is, after a step."""

    seed: int
    epoch: int  # from 1
    epochs: int
    step: int  # of the epoch, from 1
    steps_per_epoch: int
    images_per_second: float
    seconds_left: float  # of this cohort's training, at the speed of the last steps
    losses: dict[str, float]  # by student, mean over the steps of the epoch


class Watcher:
    """Observer of a run, such as a terminal; this one shows nothing and never requests a stop."""

    def say(self, text: str) -> None:
        """Report that a stage of the run has begun or ended."""

    def reading(self, what: str, done: int, total: int) -> None:
        """Report how many images have been read."""

    def step(self, title: str, progress: StepProgress) -> None:
        """Report a training step."""

    def epoch(self, title: str, metrics: list[EpochMetrics]) -> None:
        """Report the metrics of an epoch, of each student."""

    def units(self, lines: Mapping[str, str], finished: int, total: int) -> None:
        """Report the newest line of each unit that runs, and how many of all are finished."""

    def defer_interrupts(self) -> AbstractContextManager[None]:
        """Defer requests to stop to the next ``should_stop`` inside the block; outside they may end the run at once."""
        return nullcontext()

    def should_stop(self) -> bool:
        """Return whether the user requested a stop."""
        return False
