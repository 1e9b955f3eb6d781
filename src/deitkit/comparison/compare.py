"""A comparison: recipe -> teacher -> cohorts over seeds -> test set, once -> results.json -> report.

Each stage writes its result into the run folder, so that a stopped run resumes at the stage that it had reached.
"""

import filecmp
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from deitkit.comparison.advice import advice
from deitkit.comparison.cost import add_costs
from deitkit.comparison.describe import describe_data, describe_device, describe_students, seeds_left_out
from deitkit.comparison.environment import machine_of, require_same_ingredients, write_environment
from deitkit.comparison.estimate import estimate_training
from deitkit.comparison.finetune import StartingPoint, add_checkpoint_row, measure_checkpoint
from deitkit.comparison.finished_run import answers_to_tests
from deitkit.comparison.images import load_images
from deitkit.comparison.rows import note_on_stops, summarise, validation_scores
from deitkit.comparison.seed_run import (
    SeedRun,
    gather_metrics,
    load_predictions,
    run_seed,
    step_images,
)
from deitkit.data.augment.augment import Augment
from deitkit.data.augment.preview import draw_views
from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import Duplicates
from deitkit.distillation.methods import find_method, require_losses
from deitkit.errors import RecipeError
from deitkit.evaluation.readouts import balanced_accuracy, macro_f1, top_k_accuracy
from deitkit.models.accelerate import forget_compiled, release
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.schema import Recipe
from deitkit.report.published import published_figures
from deitkit.report.write import write_report
from deitkit.run.folder import begin_run, check_run
from deitkit.run.layout import BASELINE, REPORT, seed_folder, teacher_folders
from deitkit.run.metrics import read_metrics
from deitkit.run.observer import Watcher
from deitkit.run.provenance import envelope
from deitkit.run.results import (
    FORMAT,
    DatasetSummary,
    DuplicateImages,
    Results,
    TeacherCard,
    read_results,
    write_results,
)
from deitkit.system.device import Precision
from deitkit.system.files import copy_file, write_json
from deitkit.system.ranks import current_ranks
from deitkit.system.words import as_sentence
from deitkit.teachers.frozen import Teachers, mean_teacher_logits
from deitkit.teachers.logit_cache import kept_logits
from deitkit.teachers.prepare import common_card, dry_run_teachers, is_prepared, prepare_teachers
from deitkit.teachers.saved import of_unknown_training
from deitkit.training.build import (
    baseline_architecture,
    build_students,
    describe_initial_weights,
    needs_teacher,
    require_sources,
    require_unseen_baseline,
    student_names,
)
from deitkit.training.shared import require_parts
from deitkit.training.trial import failure_of

MODEL_FILES = ("model.safetensors", "model.json")


@dataclass(frozen=True)
class Begun:
    """A comparison whose folder is begun and whose teachers are ready: what its seeds and its results need."""

    recipe: Recipe
    dataset: Dataset
    precision: Precision
    teachers: Teachers | None
    cards: Sequence[TeacherCard]
    checkpoint: StartingPoint | None
    remarks: Sequence[str]


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    watcher: Watcher,
    resume: bool = False,
    dataset: Dataset | None = None,
    costs: bool = True,
) -> Results:
    """Run a comparison into a folder and return its results.

    Args:
        recipe: What to compare.
        folder: New or empty; with ``resume`` one that this recipe has begun.
        watcher: Receives progress, and may request a stop.
        resume: Continue a run that was stopped, or train the methods and seeds that it lacks; a finished run is only
            reported again.
        dataset: What ``recipe.data`` names, if it is loaded already.
        costs: Measure what each model costs to use, which other processes on this machine would disturb.

    Raises:
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    begun = begin(recipe, folder, watcher=watcher, resume=resume, dataset=dataset)
    recipe, precision = begun.recipe, begun.precision
    for seed in recipe.seeds:
        run_seed(SeedRun(recipe, begun.dataset, begun.teachers, precision, seed, folder, watcher))
    results = _results(begun, folder)
    return _conclude(_with_costs(results, recipe, folder, precision, watcher) if costs else results, folder)


def complete(recipe: Recipe, folder: Path, watcher: Watcher) -> None:
    """Measure what the models of a finished comparison cost to use, if it ended without; it ran beside others."""
    results = read_results(folder)
    if any(row.cost is None and row.top1_mean is not None and row.kind != "checkpoint" for row in results.rows):
        precision = Precision.of(recipe)
        measured = _with_costs(results, recipe, folder, precision, watcher)
        _conclude(measured.model_copy(update={"machine": machine_of(precision)}), folder)


def _with_costs(results: Results, recipe: Recipe, folder: Path, precision: Precision, watcher: Watcher) -> Results:
    watcher.say("measuring what each model costs to use")
    return add_costs(results, recipe, folder, precision)


def begin(
    recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False, dataset: Dataset | None = None
) -> Begun:
    """Check everything that can be checked before training, begin the run folder, and prepare the teachers.

    The arguments are those of ``compare``.
    """
    recipe = resolved(recipe)
    forget_compiled()
    precision = Precision.of(recipe)
    for name in recipe.methods:
        find_method(name)
    check_run(folder, recipe, resume)
    if not resume:  # a teacher that is prepared needs its file no more
        require_sources(recipe)
    for line in describe_device(recipe, precision):
        watcher.say(line)
    dataset = load_images(recipe, folder, watcher, dataset)
    for line in describe_data(dataset):
        watcher.say(line)
    remarks, parameters = dry_run(recipe, dataset, precision)
    require_same_ingredients(recipe, dataset, folder)
    for line in (*remarks, *describe_students(recipe, dataset, parameters), *seeds_left_out(folder, recipe)):
        watcher.say(line)
    if needs_teacher(recipe):
        dry_run_teachers(recipe, dataset, folder, precision)
    checkpoint = measure_checkpoint(recipe, dataset, precision, watcher)
    begin_run(folder, recipe)
    write_environment(recipe, dataset, folder, precision)
    draw_views(dataset, recipe.augment, recipe.train.label_smoothing, folder / "views.png")

    estimate = estimate_training(recipe, dataset, folder, precision)
    if estimate is not None:
        watcher.say(str(estimate))
    teachers: Teachers | None = None
    cards: list[TeacherCard] = []
    if needs_teacher(recipe):
        teachers, cards = prepare_teachers(recipe, dataset, folder=folder, precision=precision, watcher=watcher)
        unknown = list(of_unknown_training(recipe, dataset, folder, cards))
        for line in unknown:
            watcher.say(line)
        remarks += unknown
    return Begun(recipe, dataset, precision, teachers, cards, checkpoint, remarks)


def train_part(recipe: Recipe, folder: Path, seed: int, names: Sequence[str], *, watcher: Watcher) -> None:
    """Train some students of a seed of a comparison that ``begin`` has begun, while other processes train others.

    Raises:
        RecipeError: It is not begun.
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    recipe = resolved(recipe)
    precision = Precision.of(recipe)
    for line in describe_device(recipe, precision):
        watcher.say(line)
    homes = teacher_folders(folder, len(recipe.all_teachers) if needs_teacher(recipe) else 0)
    check_run(folder, recipe, resume=True)
    if not (folder / "recipe.yaml").exists() or not all(map(is_prepared, homes)):
        raise RecipeError(f"{folder} is not prepared, or its teacher is not: run --unit prepare first")
    dataset = load_images(recipe, folder, watcher)
    require_same_ingredients(recipe, dataset, folder)
    teachers = None
    if homes:
        teachers, _ = prepare_teachers(recipe, dataset, folder=folder, precision=precision, watcher=watcher)
    run_seed(SeedRun(recipe, dataset, teachers, precision, seed, folder, watcher), part=names)


def _conclude(results: Results, folder: Path) -> Results:
    """Add the advice, and write the winner, the results and the reports."""
    results = results.model_copy(update={"advice": advice(results)})
    copy_winner(results, folder, [seed_folder(folder, seed) for seed in results.seeds])
    (folder / REPORT).unlink(missing_ok=True)  # which is written last, so that its absence tells of a kill before
    write_results(results, folder)
    write_report(folder)
    return results


def has_finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether a run folder holds results of all methods and seeds of a recipe and of no others, and a report."""
    if not (folder / "results.json").exists() or not (folder / REPORT).exists():
        return False
    results = read_results(folder)
    return results.recipe["methods"] == list(recipe.methods) and results.seeds == recipe.seeds


def dry_run(recipe: Recipe, dataset: Dataset, precision: Precision) -> tuple[list[str], dict[str, int]]:
    """Build the students once, to fail before the teacher trains.

    Returns:
        Remarks, and the initial checkpoint and its adaptations, line by line (empty without both), and the number of
        parameters of each student.
    """
    _require_whole_batches(recipe, len(dataset.train))
    _require_policies(recipe, dataset)
    for name in recipe.methods:
        require_losses(name, recipe.distillation, dataset.classes)
    top = kept_logits(recipe, dataset.classes)
    if top is not None and current_ranks().count > 1:
        raise RecipeError(
            f"cache_top={top} changes the answers of a teacher, and several processes do not use the cache: drop it, "
            "or start one process"
        )
    require_parts(step_images(recipe, dataset), precision.device)
    remarks = [
        f"{name}.cache_top={teacher.cache_top} has no effect without {name}.cache=true"
        for name, teacher in recipe.named_teachers.items()
        if teacher.cache_top is not None and not teacher.cache
    ]
    require_unseen_baseline(recipe, dataset)
    students = build_students(recipe, dataset, recipe.seeds[0], precision, remarks.append)
    for cnn in (student.classifier for student in students if student.name == BASELINE):
        failure = failure_of(cnn, dataset, recipe.train.batch_size, precision, trained=True)
        if failure is not None:
            name = baseline_architecture(recipe)
            raise RecipeError(f"baseline.name={name} {failure}; name another CNN, or set another data.image_px")
    for student in students:
        release(student.classifier)
    return remarks, {one.name: sum(value.numel() for value in one.classifier.parameters()) for one in students}


def _require_policies(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError for a policy that no library has, of the students' views or of a teacher's own training."""
    teachers = {f"{name}.augment": teacher.augment for name, teacher in recipe.named_teachers.items()}
    for place, augment in ({"augment": recipe.augment} | teachers).items():
        try:
            Augment(augment, dataset.mean, dataset.std)
        except RecipeError as error:
            raise RecipeError(f"{place}.{error}") from None


def _require_whole_batches(recipe: Recipe, count: int) -> None:
    """Raise RecipeError if a step of the students, and of a teacher that trains, has more images than there are."""
    sizes = {"train.batch_size": recipe.train.batch_size}
    teacher = recipe.teacher
    if needs_teacher(recipe) and not (recipe.teachers or teacher.all_images or teacher.checkpoint):
        sizes["teacher.train.batch_size"] = teacher.train.batch_size
    large = [f"{field}={size}" for field, size in sizes.items() if size > count]
    if recipe.train.batch_size > count:
        exceed = "exceeds" if len(large) == 1 else "exceed"
        raise RecipeError(f"{' and '.join(large)} {exceed} the {count} training images: use at most {count}")


def _results(begun: Begun, folder: Path) -> Results:
    """Gather the predictions of all seeds into rows."""
    recipe, dataset, teachers, checkpoint = begun.recipe, begun.dataset, begun.teachers, begun.checkpoint
    cards, precision = begun.cards, begun.precision
    teacher_logits, used_logits, together = None, None, None
    if teachers is not None:
        views, used = answers_to_tests(teachers, recipe, dataset, folder, precision)
        teacher_logits, used_logits = mean_teacher_logits(views), mean_teacher_logits(used)
        cards = [_tested(*one, dataset) for one in zip(cards, used, views, strict=True)]
        common = common_card(teachers, cards, dataset, precision)
        together = _tested(common, used_logits, teacher_logits, dataset)
    names = student_names(recipe)
    predictions = load_predictions(folder, recipe.seeds, names)
    gather_metrics(folder, recipe.seeds, names)
    summary = summarise(recipe, dataset, predictions, teacher_logits, read_metrics(folder), used_logits)
    if checkpoint is not None:
        summary = add_checkpoint_row(summary, checkpoint, dataset, predictions, teacher_logits)
    return Results(
        **envelope(FORMAT),
        recipe=recipe.model_dump(mode="json"),
        dataset=_summary(dataset),
        teacher=together,
        teachers=tuple(cards),
        initial=describe_initial_weights(recipe),
        seeds=recipe.seeds,
        rows=summary.rows,
        winner=None if summary.winner is None else summary.winner.row,
        verdict=summary.verdict,
        published=published_figures(recipe.published),
        notes=(
            *summary.notes,
            *_on_views(cards, dataset),
            *note_on_stops(summary.rows, recipe),
            *map(as_sentence, begun.remarks),
        ),
        machine=machine_of(precision),
    )


def _tested(
    card: TeacherCard, used: Float[Tensor, "n classes"], views: Float[Tensor, "n classes"], dataset: Dataset
) -> TeacherCard:
    """Return a card with what a teacher scores on the test images: as it is used, and where that differs, on views."""
    labels = dataset.test.labels
    figures = {"test_balanced": balanced_accuracy(used, labels), "test_macro_f1": macro_f1(used, labels)}
    if used is not views and not used.equal(views):
        figures["view_test_top1"] = top_k_accuracy(views, labels)
    return card.model_copy(update={"test_top1": top_k_accuracy(used, labels), **figures})


def _on_views(cards: Sequence[TeacherCard], dataset: Dataset) -> Iterator[str]:
    """Yield a remark for each teacher that is tested on larger images than it taught with."""
    for card in cards:
        if card.view_test_top1 is not None:
            yield (
                f"The teacher {card.name} is tested as it is used, on images of {card.image_px} px; on the students' "
                f"{min(dataset.image_px)} px, with which it taught, it scores {100 * card.view_test_top1:.2f} %."
            )


def _summary(dataset: Dataset) -> DatasetSummary:
    return DatasetSummary(
        name=dataset.name,
        train=len(dataset.train),
        validation=len(dataset.validation),
        test=len(dataset.test),
        classes=dataset.classes,
        class_names=tuple(dataset.class_names),
        image_px=tuple(dataset.image_px),
        channels=dataset.channels,
        unlabelled=0 if dataset.unlabelled is None else len(dataset.unlabelled),
        skipped=len(dataset.skipped),
        skipped_files=tuple(dataset.skipped),
        fingerprint=dataset.fingerprint,
        duplicates=_recorded(dataset.duplicates),
        near_duplicates=_recorded(dataset.near_duplicates),
        test_by_class=tuple(dataset.test.labels.bincount(minlength=dataset.classes).tolist()),
        divided=dataset.divided,
    )


def _recorded(duplicates: Duplicates) -> DuplicateImages:
    return DuplicateImages(count=duplicates.count, examples=duplicates.examples)


def copy_winner(results: Results, folder: Path, homes: Sequence[Path]) -> None:
    """Copy the winner's model to ``winner/``, and record the readout by which it won.

    Of several seeds or folds, whose students are in ``homes``, it is the one with the best validation accuracy. Files
    that were exported there from another winner or readout, and a winner where there is none any more, are deleted.
    """
    row, target = results.row(results.winner), folder / "winner"
    if row is None:
        shutil.rmtree(target, ignore_errors=True)
        return
    validation = validation_scores(row, results.recipe.get("compare", {}).get("by", "accuracy"))
    place = max(range(len(homes)), key=lambda place: validation[place] or 0.0)
    source = homes[place] / row.folder_name
    weights, described = target / "model.safetensors", target / "model.json"
    try:
        before = json.loads(described.read_text(encoding="utf-8")).get("readout")
    except (OSError, ValueError):  # there was no winner, or its card is damaged
        before = None
    same = weights.exists() and filecmp.cmp(source / weights.name, weights, shallow=False)
    if not same or before != row.readout:
        for exported in (*target.glob("*.onnx"), *target.glob("*.onnx.json")):
            exported.unlink()
    for name in MODEL_FILES:
        copy_file(source / name, target / name)
    card = json.loads(described.read_text(encoding="utf-8"))
    card |= {"readout": row.readout, "test_top1": row.top1[place]}
    write_json(described, card)
