"""What tests of whole comparisons share: watchers that remember, and whether two runs are equal but for times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deitkit.run.metrics import EpochMetrics
from deitkit.run.observer import Watcher

UNREPEATABLE = ("created", "shares", "cost", "advice")  # clocks, and what follows from them


class Listener(Watcher):
    """Remembers what it is told, and which students were trained in an epoch of which seed."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.trained: set[tuple[int, str]] = set()

    def say(self, text: str) -> None:
        self.heard.append(text)

    def epoch(self, title: str, records: Sequence[EpochMetrics]) -> None:
        self.trained |= {(record.seed, record.student) for record in records if "teacher" not in title}


def timeless(value: Any) -> Any:
    """Return a JSON value without what differs between two equal runs: times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k not in UNREPEATABLE}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def assert_same_run(first: Path, second: Path) -> None:
    """Check for equal results, metrics, weights and predictions, but for times."""
    results = [timeless(json.loads((folder / "results.json").read_text())) for folder in (first, second)]
    assert results[0] == results[1]
    metrics = [
        [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (first, second)
    ]
    assert metrics[0] == metrics[1]
    for path in sorted(first.glob("seed-*/*/*.safetensors")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path
    assert (first / "winner" / "model.safetensors").read_bytes() == (second / "winner/model.safetensors").read_bytes()
