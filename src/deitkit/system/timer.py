"""Durations: measured on the device's clock, and formatted for a reader."""

import time
from types import TracebackType

import torch


def duration_text(seconds: float) -> str:
    """Format a duration: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Stopwatch:
    """Sum of the time spent inside ``with`` blocks, on the device's clock; only reading it waits for the device."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = seconds
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "Stopwatch":
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """The sum so far, at least a nanosecond."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return max(self._seconds, 1e-9)
