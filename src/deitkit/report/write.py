"""From a run folder to what a person reads. Nothing here trains, or knows how a run was made."""

from pathlib import Path
from typing import Any

from deitkit.report.ablation import write_differences
from deitkit.report.figures import write_curves
from deitkit.report.page import write_page
from deitkit.report.table import write_tables
from deitkit.run.metrics import read_metrics
from deitkit.run.results import read_results


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
