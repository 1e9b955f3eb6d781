"""Durations, measured on the device's clock."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

PACE_MARKS = 50  # over which the time of a step is measured


class Stopwatch:
    """Sum of the time spent inside ``with`` blocks, on the device's clock; only reading it waits for a CUDA device.

    Other accelerators are waited for at both ends of a block.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._seconds = seconds
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "Stopwatch":
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            wait(self._device)
            self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            wait(self._device)
            self._seconds += time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """The sum so far, at least a nanosecond."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return max(self._seconds, 1e-9)


class Pace:
    """The time of a step over the last ones that were marked, so that a pause or a slow start soon leaves it."""

    def __init__(self, step: int, seconds: float) -> None:
        self._marks = deque([(step, seconds)], maxlen=PACE_MARKS)

    def mark(self, step: int, seconds: float) -> float:
        """Mark how many seconds all steps so far took; return those of one step since the oldest mark."""
        first_step, first_seconds = self._marks[0]
        self._marks.append((step, seconds))
        return (seconds - first_seconds) / (step - first_step)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over repeats, the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]], *, device: torch.device, repeats: int, calls: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time functions in turn, so that a temporary slowdown of the machine affects them all.

    Args:
        functions: By name.
        device: Their device; synchronised before and after each measurement.
        repeats: Measurements of each function.
        calls: Calls per measurement.
        warm_up: Calls of each function before the first measurement.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wait(device)
            started = time.perf_counter()
            for _ in range(calls):
                function()
            wait(device)
            seconds[name].append((time.perf_counter() - started) / calls)
    return {name: Timing(statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()}
