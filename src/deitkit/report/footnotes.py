"""What stands under a table."""

from collections.abc import Iterable

from deitkit.report.published import (
    PAPER,
    REPRODUCTION,
    is_printed_without_labels,
)
from deitkit.run.difference import Difference
from deitkit.run.results import FIT_TO_TEACH, Results, Row
from deitkit.system.words import counted

LABELS_MARK = "*"
STATUS_MARK = "†"
UNBALANCED = 0.02
ONE_SEED = (
    "With one seed, intervals and p reflect the test images: they compare these trained students, not their methods; "
    "--seeds 5 compares methods."
)


def is_unbalanced(results: Results) -> bool:
    """Return whether a row's accuracy hides what it does in rare classes: its mean recall is 2 points away or more."""
    return any(
        abs(row.top1_mean - row.balanced_accuracy) >= UNBALANCED
        for row in results.rows
        if row.top1_mean is not None and row.balanced_accuracy is not None
    )


def footnotes(results: Results) -> list[str]:
    """Return what a reader of a comparison's table has to know of its columns and rows."""
    rows, alone = results.rows, len(results.repetitions) == 1
    counts = " or ".join(f"{count:,}" for count in sorted({row.n for row in rows}))
    notes = [f"top-1: {spread_note(results)}, on {counts} test images; weights of the last epoch, never of the best."]
    tests = test_names(row.differences.get("labels") for row in rows)
    if tests and results.reference is not None:
        notes.append(f"vs none: points of top-1 more than '{results.reference.row}', {interval_words(tests)}.")
    if tests and alone:
        notes.append(ONE_SEED)
    tests = test_names(row.differences.get("before") for row in rows)
    if tests:
        notes.append(f"vs before: points of top-1 more than the model before fine-tuning; p: {tests}.")
    tests = test_names(row.differences.get("teacher") for row in rows)
    if tests:
        notes.append(
            f"vs teacher: points of top-1 more than the teacher{'s' * (len(results.teachers) > 1)}; p: {tests}."
        )
    if any(row.cost is not None for row in rows):
        notes.append(
            "ms: for a single image on the machine of this run; in batch: for one in the fastest of a few batch sizes; "
            "MB: the file of the weights, in millions of bytes."
        )
    if is_unbalanced(results):
        notes.append(
            "balanced: mean over the classes of the share of a class's test images that is right; macro F1: mean over "
            "the classes of the harmonic mean of that and of the share of the answers with the class that are right."
        )
    if results.published and any(is_printed_without_labels(row) for row in rows):
        notes.append(
            f"{LABELS_MARK} The paper prints 'labels: no' for these rows; true labels are in their loss (deit#215)."
        )
    if len({(row.method, row.readout) for row in rows}) > len({row.method for row in rows}):
        notes.append("Rows of one method are one trained student, read out through one head or both.")
    notes += stopped_notes(rows)
    notes += [f"teacher {one.name}: {one.verdict}." for one in results.teachers if one.verdict != FIT_TO_TEACH]
    return notes + list(results.notes) + _published_notes(results)


def spread_note(results: Results) -> str:
    """Return what the spread of a top-1 is, for a footnote."""
    if len(results.repetitions) == 1:
        return "[95 % Wilson interval], one seed"
    return f"mean ± standard deviation over {counted(len(results.repetitions), results.repetition)}"


def test_names(differences: Iterable[Difference | None]) -> str:
    """Return the tests of some differences and their correction, for a footnote; empty without any."""
    found = [difference for difference in differences if difference is not None]
    names = ", ".join(sorted({difference.test for difference in found}))
    if len(found) <= 1:
        return names
    known = any(difference.p_holm is not None for difference in found)
    return f"{names}, {f'corrected for {len(found)} rows (Holm)' if known else 'not corrected for the number of rows'}"


def interval_words(tests: str) -> str:
    """Return what the intervals and the p values beside them are, for a footnote; ``tests`` as of ``test_names``."""
    alone = " (of one row, not corrected for the number of rows)" if "Holm" in tests else ""
    return f"with their 95 % interval{alone}; p: {tests}"


def stopped_notes(rows: Iterable[Row]) -> list[str]:
    """Return a footnote for every row with a stopped seed."""
    return [f"{STATUS_MARK} {row.row}: {row.status}." for row in rows if row.status != "ok"]


def _published_notes(results: Results) -> list[str]:
    notes, tables = [], {entry.table for entry in results.published}
    if REPRODUCTION in tables:
        notes.append(
            "reproduction, as published: not measured here; DeiT-Ti on CIFAR-10 for 20 epochs, taught by an untrained "
            "head; its 'no', 'usual' and 'hard' rows used mean pooling, its CNN is a ResNet-18."
        )
    if PAPER in tables:
        notes.append(
            "paper: not measured here; ImageNet for 300 epochs (arXiv 2012.12877), not comparable with our column."
        )
    return notes
