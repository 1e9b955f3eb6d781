"""Stopping a run by Ctrl-C or SIGTERM, whoever watches it."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from deitkit.errors import Interrupted
from deitkit.run.metrics import EpochMetrics
from deitkit.run.observer import StepProgress, Watcher
from deitkit.system.process import were_launched

TORCHRUN_SECONDS = 5.0


class StopOnSignal(Watcher):
    """A watcher inside whose context Ctrl-C and SIGTERM stop the run.

    Training stops after the current step and saves; everything else stops at once, since a resumed run repeats it. A
    second Ctrl-C ends the process immediately; the run can still be resumed from what is on disk. SIGTERM may come more
    than once: schedulers send it to all processes of a job, of which one may pass it on to the others.

    Args:
        stopped: The message of a run that was stopped; by default that --resume continues it.
    """

    def __init__(self, stopped: str = "") -> None:
        self._stopped = stopped
        self._stop: int | None = None  # the signal received
        self._stopped_at = 0.0
        self._deferring = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Interrupted) and self._stop is not None:
            error.exit_code = 128 + self._stop
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:
            passed_on = were_launched() and time.monotonic() - self._stopped_at < TORCHRUN_SECONDS
            if number == signal.SIGTERM or passed_on:
                return  # after Ctrl-C, torchrun sends its own signal as well
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._stop, self._stopped_at = number, time.monotonic()
        if not self._deferring:
            raise Interrupted(self._stopped)
        self.say_that_it_stops()

    def say_that_it_stops(self) -> None:
        """Report that training stops after this step; called by the handler of the signal."""

    @contextmanager
    def defer_interrupts(self) -> Iterator[None]:
        """Defer a request to stop until the context ends; inside it, ``should_stop`` reports the request."""
        self.raise_if_stopped()
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """Raise what the signal handler raised, in case it was swallowed: Python ignores exceptions in finalisers."""
        if self._stop is not None and not self._deferring:
            raise Interrupted(self._stopped)

    def should_stop(self) -> bool:
        """Return whether Ctrl-C or SIGTERM was received."""
        return self._stop is not None


class Forwarding(StopOnSignal):
    """Tell another watcher what happens; Ctrl-C and SIGTERM stop the run as with a terminal."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def say(self, text: str) -> None:
        """Pass on a line."""
        self.raise_if_stopped()
        self.watcher.say(text)

    def reading(self, what: str, done: int, total: int) -> None:
        """Pass on how much of the data has been read."""
        self.raise_if_stopped()
        self.watcher.reading(what, done, total)

    def step(self, title: str, progress: StepProgress) -> None:
        """Pass on a step."""
        self.watcher.step(title, progress)

    def epoch(self, title: str, metrics: list[EpochMetrics]) -> None:
        """Pass on the metrics of an epoch."""
        self.watcher.epoch(title, metrics)

    def units(self, lines: Mapping[str, str], finished: int, total: int) -> None:
        """Pass on the newest line of each unit."""
        self.watcher.units(lines, finished, total)

    def should_stop(self) -> bool:
        """Return whether a signal was received, or the other watcher requests a stop."""
        return super().should_stop() or self.watcher.should_stop()
