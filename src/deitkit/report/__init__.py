"""From a run folder to what a person reads. Nothing here trains, or knows how a run was made."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deitkit.errors import CheckpointError
from deitkit.report.figures import write_curves
from deitkit.report.page import write_page
from deitkit.report.published import published_rows
from deitkit.report.table import rich_table, write_tables
from deitkit.report.variants import write_differences

__all__ = ["published_rows", "read_metrics", "read_results", "rich_table", "write_report"]

_FORMAT = 1
_REQUIRED = ("created", "recipe", "dataset", "seeds", "rows")
_REQUIRED_OF_ROW = (
    "row",
    "label",
    "method",
    "readout",
    "weights",
    "labels",
    "teacher",
    "top1",
    "n",
    "top1_mean",
    "status",
)
_REQUIRED_OF_VARIANT = (
    "variant",
    "changed",
    "teacher_name",
    "teacher_test_top1",
    "difference_vs_base",
    "difference_vs_base_ci95",
    "p_vs_base",
    "p_vs_base_test",
)


def write_report(folder: Path) -> list[Path]:
    """Write tables, curves and the page of a run folder, from what lies in it alone.

    Returns:
        The files: ``table.md|csv|tex``, ``curves.png|svg`` (where there are metrics), of an ablation
        ``differences.png|svg``, and ``report.html``.

    Raises:
        CheckpointError: ``results.json`` is missing or malformed, or the folder cannot be written.
    """
    results = read_results(folder)
    metrics = _metrics_of(results, folder)
    written = write_tables(results, folder) + write_curves(results, metrics, folder)
    if "variants" in results:
        written += write_differences(results, folder)
    lessons = [line for home in sorted(folder.glob("teacher*")) for line in read_metrics(home)]
    return written + write_page(results, metrics, lessons, folder)


def _metrics_of(results: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics; of an ablation those of all variants, whose students then bear the variant's name."""
    return read_metrics(folder) + [
        line | {"student": f"{name}: {line['student']}"}
        for name in results.get("variants", {})
        for line in read_metrics(folder / "variants" / name)
    ]


def read_results(folder: Path) -> dict[str, Any]:
    """Return ``results.json`` of a run folder; numbers that are not finite are None.

    Raises:
        CheckpointError: It is missing, no JSON, of another format than 1, or lacks what every comparison writes.
    """
    path = folder / "results.json"
    try:
        results = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"no results in '{folder}': {path.name} cannot be read; finish the comparison first"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is no valid JSON: run the comparison again with --resume") from error
    if not isinstance(results, dict) or results.get("format") != _FORMAT:
        found = results.get("format") if isinstance(results, dict) else None
        raise CheckpointError(
            f"'{path}' has format {found!r}, this version reads format {_FORMAT}: use the deitkit that wrote it"
        )
    lacking = [name for name in _REQUIRED if name not in results]
    required = _REQUIRED_OF_ROW + (_REQUIRED_OF_VARIANT if "variants" in results else ())
    for row in results.get("rows") or []:
        lacking += [f"rows.{name}" for name in required if name not in row]
    if lacking or not results["rows"]:
        what = ", ".join(dict.fromkeys(lacking)) or "rows"
        raise CheckpointError(f"'{path}' lacks {what}: run the comparison again with --resume")
    return results


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, in order; none where there is no such file.

    A last line that was cut short by a kill is left out; of an epoch written twice (a run resumed) the later counts.

    Raises:
        CheckpointError: Any other line is no JSON object with ``seed``, ``student`` and ``epoch``.
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
            line = _parse(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and {"seed", "student", "epoch"} <= line.keys():
            yield line
        elif number < len(texts):  # a whole line ends in a newline, so only the last text can be half of one
            raise CheckpointError(
                f"'{path}' line {number} is no line of metrics: remove it, then run `deitkit report` again"
            )


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: None)
