"""`deitkit verify`: measure the saved students of a finished run again, and compare them with its table.

Nothing is written.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from deitkit.comparison.cohort_states import PREDICTIONS
from deitkit.comparison.finished_run import load_as_trained, predict_test_of_teachers, students_of, teachers_of
from deitkit.comparison.images import as_begun, cache_last, describe_images
from deitkit.comparison.verify_table import wrong_figures
from deitkit.data.dataset import Dataset, load_labelled
from deitkit.evaluation.predict import predict_all
from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
from deitkit.models.vit import Output
from deitkit.models.weights.read import file_sha256
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import DataRecipe
from deitkit.run.folder import read_environment
from deitkit.run.layout import fold_folder, seed_folder, teacher_folders, variant_folder
from deitkit.run.observer import Watcher
from deitkit.run.results import AblationResults, FoldResults, Row, read_results
from deitkit.run.state import outline
from deitkit.system.device import Precision, describe_machine
from deitkit.system.words import counted
from deitkit.teachers.resolution import TeacherLogits

# Tolerance for another processor or version of torch, where rounding decides images near a boundary between two
# classes; of few images it is one. On the machine of the run figures must be identical.
TOLERANCE_ELSEWHERE = 0.005


@dataclass(frozen=True)
class VerifiedRow:
    """Accuracy of a row under a seed, as recorded and as measured; ``holds`` is None where nothing is recorded."""

    row: str
    seed: int
    recorded: float | None
    measured: float | None
    holds: bool | None


@dataclass(frozen=True)
class Verification:
    """What `deitkit verify` found.

    Attributes:
        holds: Whether all of it holds.
        same_data: Whether the data have the fingerprint of the run's.
        same_teachers: Whether the teachers' weights have the run's hashes; None if none are recorded.
        tolerance: Allowed difference of an accuracy.
        rows: By seed and row.
        problems: A sentence for each model that is missing or is not the run's, and for each other figure of the table
            that does not follow from the measured predictions.
    """

    holds: bool
    same_data: bool
    same_teachers: bool | None
    tolerance: float
    rows: tuple[VerifiedRow, ...]
    problems: tuple[str, ...] = ()


def verify_run(folder: Path, watcher: Watcher, data: str | None = None, root: Path | None = None) -> Verification:
    """Measure every row and seed of a finished run again.

    Args:
        folder: Of a finished run; of an ablation every variant is measured, of a cross-validation every fold.
        watcher: Receives progress.
        data: Where the images lie now, such as ``folder:PATH``, if not where they were.
        root: The folder of the named data sets, if not that of the recipe.

    Raises:
        CheckpointError: The run is not finished, or one of its models cannot be read.
        DataError: The data cannot be loaded.
    """
    results = read_results(folder)
    moved = {"name": data, "root": root}
    changes = {field: value for field, value in moved.items() if value is not None}
    load = cache_last(lambda recipe: load_labelled(recipe.model_copy(update=changes), watcher.reading))
    found = []
    if isinstance(results, AblationResults):
        for name in results.variants:
            watcher.say(f"variant {name}")
            rows = [row for row in results.rows if row.variant == name]
            found.append(_verify(variant_folder(folder, name), rows, load, watcher))
    elif isinstance(results, FoldResults):
        for place, fold in enumerate(results.folds):
            watcher.say(f"fold {fold}")
            own = [
                row.model_copy(update={"row": f"fold {fold}: {row.row}", "top1": row.top1[place : place + 1]})
                for row in results.rows
            ]
            found.append(_verify(fold_folder(folder, fold), own, load, watcher))
    else:
        return _verify(folder, results.rows, load, watcher)
    return Verification(
        holds=all(part.holds for part in found),
        same_data=all(part.same_data for part in found),
        same_teachers=_all_or_none(part.same_teachers for part in found),
        tolerance=max(part.tolerance for part in found),
        rows=tuple(row for part in found for row in part.rows),
        problems=tuple(problem for part in found for problem in part.problems),
    )


def _verify(
    folder: Path, recorded_rows: Sequence[Row], load: Callable[[DataRecipe], Dataset], watcher: Watcher
) -> Verification:
    """Measure the students in a folder, and compare them with rows of its own table or of the ablation's."""
    results, recipe = read_results(folder), load_recipe(str(folder / "recipe.yaml"))
    precision = Precision.here(recipe)
    dataset = load(as_begun(recipe.data, folder))
    same_data = dataset.fingerprint == results.dataset.fingerprint or _are_begun_with(dataset, folder)
    homes_of_teachers = zip(results.teachers, teacher_folders(folder, len(results.teachers)), strict=True)
    teachers = [(home / "model.safetensors", card.sha256) for card, home in homes_of_teachers if card.sha256]
    problems = [problem for weights, sha256 in teachers if (problem := _not_the_teachers(weights, sha256))]
    same_teachers = not problems if teachers else None
    here = describe_machine(precision)
    tolerance, rows = 0.0, []
    outputs: dict[int, dict[str, dict[str, Output]]] = {}
    elsewhere = max(TOLERANCE_ELSEWHERE, 1 / min(len(dataset.test), len(dataset.validation)))
    for place, seed in enumerate(results.seeds):
        images = len(dataset.test) + len(dataset.validation)
        watcher.say(f"seed {seed}: measuring its students on {counted(images, 'test and validation image')}")
        homes = students_of(folder, results, seed)
        students = [load_as_trained(home, recipe.speed, precision.device) for home in homes.values()]
        test, validation = (predict_all(students, split, precision) for split in (dataset.test, dataset.validation))
        outputs[seed] = {
            name: {"test": one, "validation": other} for name, one, other in zip(homes, test, validation, strict=True)
        }
        allowed = {
            name: 0.0 if (_machine_of(home) or results.machine) == here else elsewhere for name, home in homes.items()
        }
        tolerance = max([tolerance, *allowed.values()])
        for row in recorded_rows:
            output, least = outputs[seed].get(row.folder_name, {}).get("test"), allowed.get(row.folder_name, 0.0)
            rows.append(_verified(row, place, seed, output, dataset.test.labels, least))
            if rows[-1].holds is False and rows[-1].measured is None:
                home = seed_folder(folder, seed) / row.folder_name
                problems.append(f"{home / 'model.json'} is missing: copy the student's folder back into its run")
    if not problems and same_data:
        logits = None
        if results.teacher is not None:
            taught = teachers_of(folder, recipe, dataset, precision, Watcher())
            logits = TeacherLogits.mean(predict_test_of_teachers(taught, recipe, dataset, folder, precision))
        problems += wrong_figures(results, recipe, dataset, folder, outputs, logits, tolerance)
    holds_all = same_data and not problems and all(row.holds is not False for row in rows)
    return Verification(holds_all, same_data, same_teachers, tolerance, tuple(rows), tuple(dict.fromkeys(problems)))


def _are_begun_with(dataset: Dataset, folder: Path) -> bool:
    """Return whether images have the pixels, labels and splits that a run folder recorded, wherever they lie."""
    recorded = read_environment(folder).get("splits")
    return recorded is not None and recorded == describe_images(dataset)["splits"]


def _verified(
    row: Row, place: int, seed: int, output: Output | None, labels: Int64[Tensor, " n"], tolerance: float
) -> VerifiedRow:
    """Compare a row's figure of one seed, by its place, with what the output of its student gives."""
    recorded = row.top1[place] if place < len(row.top1) else None
    measured = None if output is None else top_k_accuracy(readout_scores(output)[row.readout], labels)
    # A student that stopped has no figure to verify, and a checkpoint no model; one that is missing fails.
    holds = None
    if recorded is not None and row.kind != "checkpoint":
        holds = measured is not None and abs(recorded - measured) <= tolerance + 1e-9
    return VerifiedRow(row.row, seed, recorded, measured, holds)


def _machine_of(home: Path) -> dict[str, Any] | None:
    """Return the machine on which a student was predicted; None where its run did not record it."""
    kept = outline(home.with_name(home.name.removesuffix("+ema")) / PREDICTIONS)
    return None if kept is None else kept.get("machine")


def _not_the_teachers(weights: Path, sha256: str) -> str:
    """Say why a file is not the weights of the run's teacher; return nothing if it is."""
    if not weights.exists():
        return f"{weights} is missing: copy the teacher's folder back into its run"
    return "" if file_sha256(weights) == sha256 else f"{weights} has other weights than the run's teacher: restore them"


def _all_or_none(checks: Iterable[bool | None]) -> bool | None:
    """Return whether all known checks are True; None where none is known."""
    known = [check for check in checks if check is not None]
    return all(known) if known else None
