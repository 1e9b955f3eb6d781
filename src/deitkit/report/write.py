"""Writing all reports of a run folder, from its files alone."""

from collections.abc import Iterator
from pathlib import Path

from deitkit.report.ablation import write_differences
from deitkit.report.cost_chart import write_costs
from deitkit.report.figures import write_curves
from deitkit.report.page import write_page
from deitkit.report.table import write_tables
from deitkit.run.layout import fold_folder, variant_folder
from deitkit.run.metrics import EpochMetrics, read_metrics
from deitkit.run.results import AblationResults, FoldResults, Results, VariantRow, read_results


def write_report(folder: Path) -> list[Path]:
    """Write the tables, curves and page of a run folder.

    Returns:
        The files: ``table.md|csv|tex``, ``curves.png|svg`` (where there are metrics), ``cost.png|svg`` (where
        costs were measured), of an ablation ``differences.png|svg``, and ``report.html``.

    Raises:
        CheckpointError: ``results.json`` is missing or malformed, or the folder cannot be written.
    """
    results = read_results(folder)
    metrics = _metrics_of(results, folder)
    written = write_tables(results, folder) + write_curves(results, metrics, folder)
    if isinstance(results, AblationResults):
        written += write_differences(results, folder)
    else:
        written += write_costs(results, metrics, folder)
    teacher_metrics = [line for home in sorted(folder.glob("teacher*")) for line in read_metrics(home)]
    return written + write_page(results, metrics, teacher_metrics, folder)


def _metrics_of(results: Results, folder: Path) -> list[EpochMetrics]:
    """Return the metrics of the trainings in the table, which a resumed run that was interrupted may have left behind.

    Of folds they are those of all, with the fold as seed; of variants with ``VARIANT: STUDENT``.
    """
    shown = set(_trainings_of(results))
    return [line for line in _read_all(results, folder) if (line.student, line.seed) in shown]


def _trainings_of(results: Results) -> Iterator[tuple[str, int]]:
    """Yield student and seed of each training; a stopped seed is left out, as from a row's mean, unless all are."""
    for row in results.rows:
        student = f"{row.variant}: {row.method}" if isinstance(row, VariantRow) else row.method
        top1 = zip(results.repetitions, row.top1, strict=False)
        finished = [number for number, value in top1 if value is not None]
        yield from ((student, number) for number in finished or results.repetitions)


def _read_all(results: Results, folder: Path) -> list[EpochMetrics]:
    if isinstance(results, FoldResults):
        return [
            line.model_copy(update={"seed": fold})
            for fold in results.folds
            for line in read_metrics(fold_folder(folder, fold))
        ]
    variants = results.variants if isinstance(results, AblationResults) else ()
    return read_metrics(folder) + [
        line.model_copy(update={"student": f"{name}: {line.student}"})
        for name in variants
        for line in read_metrics(variant_folder(folder, name))
    ]
