"""Reading ``metrics.jsonl``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deitkit.errors import CheckpointError


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, in order; an empty list if the file does not exist.

    Ignore a last line that a kill cut short. If a resumed run wrote an epoch twice, the later line counts.

    Raises:
        CheckpointError: Any other line is not a JSON object with ``seed``, ``student`` and ``epoch``.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = {(line["seed"], line["student"], line["epoch"]): line for line in _metric_lines(path)}
    return list(lines.values())


def _metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and {"seed", "student", "epoch"} <= line.keys():
            yield line
        elif number < len(texts):  # a whole line ends in a newline, so only the last text can be half of one
            raise CheckpointError(
                f"line {number} of '{path}' is not a line of metrics: remove it, then run `deitkit report` again"
            )


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, with None for numbers that are not finite; raise ValueError on a mistake."""
    return json.loads(text, parse_constant=lambda name: None)
