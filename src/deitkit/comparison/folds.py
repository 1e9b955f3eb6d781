"""k-fold cross-validation: one comparison for each fold, whose rows become one table.

Each fold is an ordinary comparison in its own folder, with a teacher of its own where one is trained, since it must not
have seen the test images. This module orders them and combines their results; it reads nothing but these.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, median_low

from deitkit.comparison.advice import advice
from deitkit.comparison.compare import compare, complete, has_finished
from deitkit.comparison.environment import require_same_ingredients
from deitkit.comparison.finetune import measure_checkpoint
from deitkit.comparison.images import as_begun, cache_last
from deitkit.comparison.prepare import dry_run
from deitkit.comparison.rows import best_row, corrected, corrected_differences, note_on_stops, validation_scores
from deitkit.comparison.seed_run import LOCK_SECONDS
from deitkit.comparison.verdict import Standing, verdict
from deitkit.comparison.winner import copy_winner
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.evaluation.statistics import (
    are_equal,
    clipped,
    finished,
    mean_of_finished,
    resampled_difference,
    resampled_interval,
    std_of_finished,
)
from deitkit.models.weights.pretrained import initial_weights_path, resolved
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.report.write import write_report
from deitkit.run.difference import Difference, Reference
from deitkit.run.folder import begin_run, check_run, locked
from deitkit.run.layout import fold_folder, seed_folder
from deitkit.run.observer import Watcher
from deitkit.run.provenance import envelope
from deitkit.run.reported import reported_rows
from deitkit.run.results import (
    FIT_TO_TEACH,
    FORMAT,
    Cost,
    DatasetSummary,
    FoldResults,
    Results,
    Row,
    TeacherCard,
    read_results,
    with_difference,
    write_results,
)
from deitkit.system.device import Precision
from deitkit.system.files import copy_file
from deitkit.teachers.prepare import dry_run_teachers, recheck_prepared
from deitkit.teachers.saved import origins, require_unseen
from deitkit.training.build import baseline_origin, needs_teacher, require_unseen_baseline

_MEANS = ("balanced_accuracy", "macro_f1", "teacher_agreement", "images_per_second", "train_seconds")


def compare_folds(recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False) -> FoldResults:
    """Run a comparison for each of ``recipe.data.folds``, and return the results of all in one table.

    Args:
        recipe: With ``data.folds``, without ``data.fold``.
        folder: New or empty; with ``resume`` one that this recipe has begun.
        watcher: Receives progress, and may request a stop.
        resume: Continue at the fold at which a run was stopped.

    Raises:
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    recipe = resolved(recipe)
    load = prepare_folds(recipe, folder, watcher=watcher, resume=resume)
    recipes = fold_recipes(recipe)
    homes = {fold: fold_folder(folder, fold) for fold in recipes}
    for fold, own in recipes.items():
        with locked(homes[fold], LOCK_SECONDS, watcher.say):  # a unit may still train it
            if not has_finished(homes[fold], own):
                watcher.say(f"fold {fold} of {len(recipes)}")
                compare(own, homes[fold], watcher=watcher, resume=True, dataset=load(as_begun(own.data, homes[fold])))
            complete(own, homes[fold], watcher)
    results = combine(recipe, {fold: read_results(home) for fold, home in homes.items()})
    copy_winner(results, folder, [seed_folder(home, recipe.seeds[0]) for home in homes.values()])
    if (homes[1] / "views.png").is_file():
        copy_file(homes[1] / "views.png", folder / "views.png")
    write_results(results, folder)
    write_report(folder)
    return results


def fold_recipes(recipe: Recipe) -> dict[int, Recipe]:
    """Return the recipe of each fold, by number."""
    data = {fold: recipe.data.model_copy(update={"fold": fold}) for fold in range(1, (recipe.data.folds or 1) + 1)}
    return {fold: recipe.model_copy(update={"data": own}) for fold, own in data.items()}


def prepare_folds(
    recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False
) -> Callable[[DataRecipe], Dataset]:
    """Check everything that can be checked before training, begin the run folder, and return the loader of its images.

    The arguments are those of ``compare_folds``.
    """
    recipes = fold_recipes(recipe)
    check_run(folder, recipe, resume)
    for fold, own in recipes.items():
        check_run(fold_folder(folder, fold), own, resume=True)
    load = cache_last(lambda data: load_dataset(data, watcher.reading, random_crops=recipe.has_random_crops))
    precision = Precision.of(recipe)
    dataset = load(as_begun(recipes[1].data, fold_folder(folder, 1)))
    dry_run(recipes[1], dataset, precision)
    require_same_ingredients(recipe, dataset, *(fold_folder(folder, fold) for fold in recipes))
    teachers = recipe.all_teachers if needs_teacher(recipe) else ()
    if teachers:
        dry_run_teachers(recipes[1], dataset, fold_folder(folder, 1), precision)
        for fold in recipes:
            recheck_prepared(recipe, fold_folder(folder, fold))
    # Without its damaged files a class may have no images in a split of another fold, and the images that a checkpoint
    # or a teacher was trained on may be another fold's test images.
    starts = initial_weights_path(recipe.model), baseline_origin(recipe)
    has_seen = starts != (None, None) or any(origins(teacher) for teacher in teachers)
    if dataset.skipped or has_seen:
        for fold, own in reversed(recipes.items()):  # the first one trains next
            del dataset  # before another is loaded
            dataset = load(as_begun(own.data, fold_folder(folder, fold)))
            measure_checkpoint(own, dataset, precision, Watcher())
            require_unseen_baseline(own, dataset)
            for teacher in teachers:
                require_unseen(teacher, own.data, dataset)
    begin_run(folder, recipe)
    return load


def combine(recipe: Recipe, folds: Mapping[int, Results]) -> FoldResults:
    """Combine the results of all folds, by number: rows by name, each with a value for every fold."""
    each = list(folds.values())
    first = each[0]
    by_fold = [{row.row: row for row in one.rows} for one in each]
    rows = [_combined([own[row.row] for own in by_fold], list(folds)) for row in first.rows]
    for by in dict.fromkeys(("accuracy", recipe.compare.by)):
        rows = _compared(rows, each, by)
    winner = best_row(rows, recipe.compare.by)
    teacher = None if first.teacher is None else _teacher([one.teacher for one in each], list(folds))
    standing = _standing(winner, rows, recipe.compare.by, None if teacher is None else teacher.test_top1)
    results = FoldResults(
        **envelope(FORMAT),
        recipe=recipe.model_dump(mode="json"),
        dataset=_dataset([one.dataset for one in each]),
        teacher=teacher,
        teachers=tuple(_teacher(cards, list(folds)) for cards in zip(*(one.teachers for one in each), strict=True)),
        initial=first.initial,
        seeds=recipe.seeds,
        folds=tuple(folds),
        rows=tuple(rows),
        winner=None if winner is None else winner.row,
        verdict=verdict(standing, rows),
        published=first.published,
        notes=(*_notes(each, recipe), *note_on_stops(rows, recipe)),
        machine=first.machine,
    )
    return results.model_copy(update={"advice": advice(results)})


def _combined(rows: Sequence[Row], folds: Sequence[int]) -> Row:
    """Combine the rows of one name; a fold in which a student stopped leaves the statistics."""
    top1 = tuple(row.top1[0] for row in rows)
    values = finished(top1)
    stopped = [f"fold {fold}: {row.status}" for fold, row in zip(folds, rows, strict=True) if row.status != "ok"]
    spread = len(values) > 1 and not are_equal(values)
    return rows[0].model_copy(
        update={
            "top1": top1,
            "top5": None if rows[0].top5 is None else tuple((row.top5 or (None,))[0] for row in rows),
            "n": sum(row.n for row in rows),
            "top1_mean": mean_of_finished(values),
            "top1_std": std_of_finished(values),
            "top1_ci95": clipped(resampled_interval(values, len(folds))) if spread else None,
            "validation_top1": tuple(row.validation_top1[0] for row in rows),
            "validation_balanced": tuple((row.validation_balanced or (None,))[0] for row in rows),
            "differences": {},  # those of the first fold alone
            **({"balanced_differences": {}} if rows[0].balanced_differences else {}),
            "status": "; ".join(stopped) or "ok",
            "cost": _median_cost([row.cost for row in rows]),
            **{name: mean_of_finished(getattr(row, name) for row in rows) for name in _MEANS},
        }
    )


def _compared(rows: Sequence[Row], each: Sequence[Results], by: str) -> list[Row]:
    """Return the rows with their differences over the folds, to the references that any fold has."""
    by_fold = [{row.row: _score(row, by) for row in one.rows} for one in each]
    scores = {row.row: [own[row.row] for own in by_fold] for row in rows}
    teacher = [None if one.teacher is None else _teachers_score(one.teacher, by) for one in each]
    references: dict[Reference, Sequence[float | None] | None] = {
        "labels": next((scores[row.row] for row in rows if row.reference), None),
        "before": next((scores[row.row] for row in rows if row.kind == "checkpoint"), None),
        "teacher": teacher,
        "baseline": next((scores[row.row] for row in rows if row.kind == "baseline" and row.weights == "last"), None),
    }
    compared = list(rows)
    for reference, values in references.items():
        wanted = {row.row for one in each for row in one.rows if row.differences.get(reference) is not None}
        compared = [
            with_difference(row, reference, _difference(scores[row.row], values), by)
            if row.row in wanted and values is not None
            else row
            for row in compared
        ]
        compared = corrected(compared, reference, by)
    return compared


def _score(row: Row, by: str) -> float | None:
    """Return a row's accuracy in one fold, or its balanced accuracy."""
    return row.balanced_accuracy if by == "balanced" else row.top1[0]


def _teachers_score(card: TeacherCard, by: str) -> float | None:
    return card.test_balanced if by == "balanced" else card.test_top1


def _difference(values: Sequence[float | None], others: Sequence[float | None]) -> Difference | None:
    """Compare two rows over the folds that both finished; None with fewer than two."""
    pairs = [(one, other) for one, other in zip(values, others, strict=True) if one is not None and other is not None]
    return resampled_difference([one - other for one, other in pairs], len(values)) if len(pairs) > 1 else None


def _standing(winner: Row | None, rows: Sequence[Row], by: str, teacher_top1: float | None) -> Standing | None:
    if winner is None:
        return None
    rivals = [
        row
        for row in reported_rows(rows)
        if row.kind == "student" and row.method != winner.method and row.weights == winner.weights
    ]
    own = validation_scores(winner, by)
    leads = {row.row: _difference(own, validation_scores(row, by)) for row in rivals}
    return Standing(
        winner=winner,
        leads=corrected_differences({name: lead for name, lead in leads.items() if lead is not None}),
        chosen_on=f"the validation images of {len(winner.top1)} folds",
        over=f"mean of {len(winner.top1)} folds",
        teacher_top1=teacher_top1,
        only_answer=None,
        answers_frequent=False,
        by=by,
    )


def _median_cost(costs: Sequence[Cost | None]) -> Cost | None:
    """Return the median of each figure over the folds: a fold in which the machine was busy does not tell."""
    found = [cost for cost in costs if cost is not None]
    if not found:
        return None
    return Cost(
        file_bytes=median_low(cost.file_bytes for cost in found),
        milliseconds=median(cost.milliseconds for cost in found),
        batch_size=median_low(cost.batch_size for cost in found),
        milliseconds_in_batch=median(cost.milliseconds_in_batch for cost in found),
    )


def _verdict_of_gate(cards: Sequence[TeacherCard | None], folds: Sequence[int]) -> str:
    """Return what the gate said of the teachers, with the folds of those that did not pass every test."""
    remarks: dict[str, list[int]] = {}
    for fold, card in zip(folds, cards, strict=True):
        if card is not None and card.verdict != FIT_TO_TEACH:
            remarks.setdefault(card.verdict, []).append(fold)
    if list(remarks.values()) == [list(folds)]:
        return next(iter(remarks))
    told = []
    for remark, some in remarks.items():
        *others, last = map(str, some)
        told.append(f"folds {', '.join(others)} and {last}: {remark}" if others else f"fold {last}: {remark}")
    return "; ".join(told) or FIT_TO_TEACH


def _teacher(cards: Sequence[TeacherCard | None], folds: Sequence[int]) -> TeacherCard:
    """Combine a teacher's cards: the mean of its accuracies; no hash where each fold trained another."""
    found = [card for card in cards if card is not None]
    shares = ("top1", "chance", "test_top1", "test_balanced", "test_macro_f1", "own_px_top1", "view_px_top1")
    means = {name: mean_of_finished(getattr(card, name) for card in found) for name in shares}
    return found[0].model_copy(
        update=means
        | {
            "n": sum(card.n for card in found),
            "sha256": found[0].sha256 if len({card.sha256 for card in found}) == 1 else None,
            "verdict": _verdict_of_gate(cards, folds),
            "cost": _median_cost([card.cost for card in found]),
            "weak": any(card.weak for card in found),
        }
    )


def _dataset(each: Sequence[DatasetSummary]) -> DatasetSummary:
    """Describe the training images of the first fold, and the test images of all: every image once."""
    together = hashlib.sha256(" ".join(one.fingerprint for one in each).encode()).hexdigest()
    by_class = [one.test_by_class for one in each if one.test_by_class is not None]
    counts = tuple(map(sum, zip(*by_class, strict=True))) if len(by_class) == len(each) else None
    tested = {"test": sum(one.test for one in each), "test_by_class": counts}
    return each[0].model_copy(update=tested | {"fingerprint": together})


def _notes(each: Sequence[Results], recipe: Recipe) -> tuple[str, ...]:
    tested = (
        f"Every image is a test image of one of {len(each)} folds"
        if each[0].recipe["data"]["test_images"] is None
        else f"The test images are drawn from each of {len(each)} folds"
    )
    about = (
        f"{tested}, which share most of their training images: intervals and p are those of the corrected resampled t "
        "test (Nadeau and Bengio 2003)."
    )
    of_all = (note for one in each for note in one.notes if note not in note_on_stops(one.rows, recipe))
    return about, *dict.fromkeys(of_all)
