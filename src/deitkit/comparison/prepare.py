"""What comes before training: check everything that can be checked, begin the run folder, and prepare the teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deitkit.comparison.describe import describe_data, describe_device, describe_students, seeds_left_out
from deitkit.comparison.environment import require_same_ingredients, write_environment
from deitkit.comparison.estimate import estimate_training
from deitkit.comparison.finetune import StartingPoint, measure_checkpoint
from deitkit.comparison.images import load_images
from deitkit.comparison.seed_run import step_images
from deitkit.data.augment.augment import Augment
from deitkit.data.augment.preview import draw_views
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import find_method
from deitkit.distillation.trial import require_losses
from deitkit.errors import RecipeError
from deitkit.models.accelerate import forget_compiled, release
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import begin_run, check_run
from deitkit.run.layout import BASELINE
from deitkit.run.observer import Watcher
from deitkit.run.results import TeacherCard
from deitkit.system.device import Precision
from deitkit.system.ranks import current_ranks
from deitkit.teachers.frozen import Teachers
from deitkit.teachers.logit_cache import kept_logits
from deitkit.teachers.prepare import dry_run_teachers, prepare_teachers
from deitkit.teachers.saved import of_unknown_training
from deitkit.training.build import (
    baseline_architecture,
    build_students,
    needs_teacher,
    require_sources,
    require_unseen_baseline,
)
from deitkit.training.shared import require_parts
from deitkit.training.trial import failure_of


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison whose folder is begun and whose teachers are ready: what its seeds and its results need."""

    recipe: Recipe
    dataset: Dataset
    precision: Precision
    teachers: Teachers | None
    cards: Sequence[TeacherCard]
    checkpoint: StartingPoint | None
    remarks: Sequence[str]


def prepare_comparison(
    recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False, dataset: Dataset | None = None
) -> PreparedComparison:
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
    return PreparedComparison(recipe, dataset, precision, teachers, cards, checkpoint, remarks)


def dry_run(recipe: Recipe, dataset: Dataset, precision: Precision) -> tuple[list[str], dict[str, int]]:
    """Build the students once, to fail before the teacher trains.

    Returns:
        Remarks, and the initial checkpoint and its adaptations, line by line (empty without both), and the number of
        parameters of each student.
    """
    _require_whole_batches(recipe, len(dataset.train))
    _require_policies(recipe, dataset)
    for name in recipe.methods:
        require_losses(name, recipe.distillation, dataset.classes, precision)
    _require_fit_for_cache_top(recipe, dataset.classes)
    require_parts(step_images(recipe, dataset), precision.device)
    remarks = [
        f"{name}.cache_top={teacher.cache_top} has no effect without {name}.cache=true"
        for name, teacher in recipe.named_teachers.items()
        if teacher.cache_top is not None and not teacher.cache
    ]
    few = [name for name in recipe.methods if dataset.classes < find_method(name).least_classes]
    if few:
        remarks.append(
            f"{' and '.join(few)}: with {dataset.classes} classes a part of the loss has no gradient, or all of it; "
            "other methods learn more from the teacher"
        )
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


def _require_fit_for_cache_top(recipe: Recipe, classes: int) -> None:
    """Raise RecipeError if a part of the logits is to be cached, and this run does not use it or needs all of them."""
    top = kept_logits(recipe, classes)
    if top is None:
        return
    if current_ranks().count > 1:
        raise RecipeError(
            f"cache_top={top} changes the answers of a teacher, and several processes do not use the cache: drop it, "
            "or start one process"
        )
    others = [name for name in recipe.methods if find_method(name).needs_all_logits]
    if others:
        raise RecipeError(
            f"cache_top={top} keeps little more than the teacher's softmax, and the loss of {' and '.join(others)} "
            "depends on all logits: drop it, or the method"
        )


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
