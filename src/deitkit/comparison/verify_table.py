"""The figures of a table that follow from its students' predictions, made again and compared with what is recorded."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from deitkit.comparison.cohort_states import PREDICTIONS
from deitkit.comparison.rows import Predictions, StudentPredictions, Summary, summarise
from deitkit.comparison.seed_run import load_predictions
from deitkit.data.dataset import Dataset
from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
from deitkit.models.vit import Output
from deitkit.models.weights.read import file_sha256
from deitkit.recipe.schema import Recipe
from deitkit.run.layout import seed_folder
from deitkit.run.provenance import code_sha256
from deitkit.run.results import Results, Row
from deitkit.teachers.resolution import TeacherLogits
from deitkit.training.build import student_names

Outputs = Mapping[str, Mapping[str, Output]]  # by folder of a student and split

ACCURACIES = ("top1_mean", "top5", "validation_top1", "teacher_agreement")  # shares of images
STATISTICS = ("top1_std", "top1_ci95", "validation_balanced", "balanced_accuracy", "macro_f1")
ROUNDING = 1e-9


def wrong_figures(
    results: Results,
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    outputs: Mapping[int, Outputs],
    teacher: TeacherLogits | None,
    tolerance: float,
) -> Iterator[str]:
    """Make a table again from measured predictions, and yield a sentence for each figure that is not the recorded one.

    Accuracies are compared always, and exactly where the tolerance is 0. All that rounding may change by more (what is
    of a rare class, intervals, p, the winner) is compared on the machine of the run alone, and what is computed in
    another way since (intervals, p, the verdict) only by the code of the run. Times and costs are no part of it.

    Args:
        results: As recorded.
        recipe: Of the run.
        dataset: Of the run.
        folder: Of the run.
        outputs: Of every student that finished, by seed.
        teacher: What the teachers, as one, compute for the test images.
        tolerance: Allowed difference of an accuracy.
    """
    predictions = _measured(recipe, folder, outputs)
    if predictions is None:
        return
    summary = summarise(recipe, dataset, predictions, teacher, [])
    if teacher is not None and results.teacher is not None:
        top1 = top_k_accuracy(teacher.as_used, dataset.test.labels)
        yield from _wrong("teacher", "test_top1", results.teacher.test_top1, top1, tolerance)
    recorded = {row.row: row for row in results.rows if row.kind != "checkpoint"}
    same_code = results.code == code_sha256()
    for row in summary.rows:
        if row.row in recorded:
            yield from _wrong_in_row(recorded[row.row], row, tolerance, same_code)
    if tolerance == 0:
        yield from _wrong_outcome(results, summary, same_code)
    yield from _wrong_winner(results, folder)


def _measured(recipe: Recipe, folder: Path, outputs: Mapping[int, Outputs]) -> Predictions | None:
    """Return the kept predictions with the measured scores in their place; None where a student has none kept."""
    names = student_names(recipe)
    if not all((seed_folder(folder, seed) / name / PREDICTIONS).exists() for seed in recipe.seeds for name in names):
        return None
    kept = load_predictions(folder, recipe.seeds, names)
    return {
        seed: {name: _with_scores(student, name, outputs[seed]) for name, student in students.items()}
        for seed, students in kept.items()
    }


def _with_scores(student: StudentPredictions, name: str, outputs: Outputs) -> StudentPredictions:
    scores = dict(student.scores)
    for weights in scores:
        home = f"{name}+ema" if weights == "ema" else name
        if home in outputs:
            scores[weights] = {split: readout_scores(output) for split, output in outputs[home].items()}
    return replace(student, scores=scores)


def _wrong_in_row(recorded: Row, measured: Row, tolerance: float, same_code: bool) -> Iterator[str]:
    exact = tolerance == 0
    fields = dict.fromkeys(ACCURACIES, tolerance) | (dict.fromkeys(STATISTICS, 0.0) if exact else {})
    if not same_code:
        fields.pop("top1_ci95", None)
    for name, allowed in fields.items():
        yield from _wrong(recorded.row, name, getattr(recorded, name), getattr(measured, name), allowed)
    for kind in ("differences", "balanced_differences"):
        for reference, difference in getattr(recorded, kind).items():
            again = getattr(measured, kind).get(reference)
            if again is None or (kind == "balanced_differences" and not exact):
                continue
            shown = f"{kind}.{reference}"
            yield from _wrong(recorded.row, f"{shown}.mean", difference.mean, again.mean, 2 * tolerance)
            for name in ("p", "p_holm", "ci95", "ci95_new_images") if exact and same_code else ():
                yield from _wrong(recorded.row, f"{shown}.{name}", getattr(difference, name), getattr(again, name), 0.0)


def _wrong(row: str, name: str, recorded: object, measured: object, allowed: float) -> Iterator[str]:
    """Yield a sentence if a figure, or one of several, is not as recorded; what is not recorded is not compared."""
    several = isinstance(recorded, tuple) and isinstance(measured, tuple)
    pairs = zip(recorded, measured, strict=False) if several else [(recorded, measured)]  # type: ignore[call-overload]
    for one, other in pairs:
        if isinstance(one, float | int) and not (
            isinstance(other, float | int) and abs(one - other) <= allowed + ROUNDING
        ):
            yield f"{row}: {name} is recorded as {one:.6g}, and measured as {_shown(other)}"
            return


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float | int) else "nothing"


def _wrong_outcome(results: Results, summary: Summary, same_code: bool) -> Iterator[str]:
    winner = None if summary.winner is None else summary.winner.row
    if results.winner != winner:
        yield f"the recorded winner is {results.winner}, but the predictions make it {winner}"
    elif same_code and not results.verdict.startswith(summary.verdict):  # a checkpoint's sentence may follow
        yield f"the recorded verdict is not that of the predictions: {summary.verdict}"


def _wrong_winner(results: Results, folder: Path) -> Iterator[str]:
    """Yield a sentence if the winner's folder has the weights of none of its seeds."""
    row, weights = results.row(results.winner), folder / "winner" / "model.safetensors"
    if row is None or not weights.exists():
        return
    homes = [seed_folder(folder, seed) / row.folder_name / weights.name for seed in results.seeds]
    if file_sha256(weights) not in {file_sha256(home) for home in homes if home.exists()}:
        yield f"{weights} has not the weights of {row.row} under any seed: copy one of {homes[0].parent} there"
