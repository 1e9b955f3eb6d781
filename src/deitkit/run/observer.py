"""Who observes a run: what is reported to it, and how it asks a run to stop."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass
class Progress:
    """Where a cohort stands, for whoever watches."""

    seed: int
    epoch: int  # from 1
    epochs: int
    step: int  # of the epoch, from 1
    steps_per_epoch: int
    images_per_second: float
    seconds_left: float  # of this cohort's training, at the speed of this epoch
    losses: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Watcher(Protocol):
    """Whoever watches a run: a terminal, or nobody."""

    def say(self, text: str) -> None:
        """A stage of the run has begun or ended."""

    def reading(self, what: str, done: int, total: int) -> None:
        """Some of the data has been read."""

    def step(self, title: str, progress: Progress) -> None:
        """A step has been done."""

    def epoch(self, title: str, records: list[dict[str, Any]]) -> None:
        """An epoch has been done."""

    def defer_interrupts(self) -> AbstractContextManager[None]:
        """While inside, a request to stop waits until ``should_stop`` is asked; outside it may end the run at once."""

    def should_stop(self) -> bool:
        """Whether the user asked to stop."""


class Silent:
    """A watcher that shows nothing and never stops."""

    def say(self, text: str) -> None:
        pass

    def reading(self, what: str, done: int, total: int) -> None:
        pass

    def step(self, title: str, progress: Progress) -> None:
        pass

    def epoch(self, title: str, records: list[dict[str, Any]]) -> None:
        pass

    def defer_interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()

    def should_stop(self) -> bool:
        return False
