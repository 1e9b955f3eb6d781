"""Building the students of a comparison, and the cohort in which they train."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import MOST_SEEN
from deitkit.distillation.methods import METHODS, Method, find_method
from deitkit.errors import RecipeError, TeacherError
from deitkit.evaluation.seen_images import say_seen, share_seen
from deitkit.models.accelerate import accelerate
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.vit import create_student
from deitkit.models.weights.initialise import card_of, load_initial_weights, weights_file
from deitkit.models.weights.pretrained import initial_weights_path, licence_of
from deitkit.models.weights.read import file_sha256, load_into, read_checkpoint, require_file
from deitkit.models.zoo import create_classifier, require_known
from deitkit.recipe.schema import OptimizerRecipe, Recipe
from deitkit.run.layout import BASELINE
from deitkit.system.device import Precision
from deitkit.system.ranks import ALONE, Ranks
from deitkit.system.seeding import derived_seed, seeded
from deitkit.training.cohort import Cohort, LogitLookup
from deitkit.training.student import Student


def student_names(recipe: Recipe) -> list[str]:
    """Return the names of a comparison's students in table order: its methods, then the CNN baseline."""
    return [*recipe.methods, *([BASELINE] if recipe.baseline is not None else [])]


def needs_teacher(recipe: Recipe) -> bool:
    """Return whether any method of a recipe learns from a teacher."""
    return any(find_method(name).teacher_signal for name in recipe.methods)


def require_sources(recipe: Recipe) -> None:
    """Check before all images are decoded that architectures and files of weights exist.

    Raises:
        TeacherError: An architecture of a teacher is unknown.
        RecipeError: That of the baseline is.
        CheckpointError: A file does not exist.
    """
    if needs_teacher(recipe):
        for teacher in recipe.all_teachers:
            _require_source(teacher.name, teacher.checkpoint)
    if recipe.baseline is not None:
        with _of_baseline():
            _require_source(baseline_architecture(recipe), recipe.baseline.checkpoint)


def _require_source(name: str, checkpoint: Path | None) -> None:
    if not Path(name).exists():  # a saved model
        require_known(name)
    if checkpoint is not None:
        require_file(checkpoint)


def build_students(
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    precision: Precision,
    say: Callable[[str], None] = lambda line: None,
    names: Collection[str] | None = None,
) -> list[Student]:
    """Build students of one seed, whose common parameters start equal.

    Args:
        recipe: Of the comparison.
        dataset: Its classes, resolution and normalisation.
        seed: Of the initial weights.
        precision: Its device.
        say: Receives the initial checkpoint, if there is one, and its adaptations to the students.
        names: A subset of ``student_names``; by default all.
    """
    names = student_names(recipe) if names is None else names
    image_px = (dataset.image_px[0], dataset.image_px[1])
    start = initial_weights_path(recipe.model)
    students = []
    changes: dict[str, list[str]] = {}
    for name in (method for method in recipe.methods if method in names):
        model = create_student(
            recipe.model,
            image_px=image_px,
            channels=dataset.channels,
            classes=dataset.classes,
            tokens=METHODS[name].tokens,
            seed=derived_seed(seed, "student"),
        )
        if start is not None:
            lines = load_initial_weights(
                model,
                start,
                class_names=dataset.class_names,
                mean=dataset.mean,
                std=dataset.std,
            )
            for line in lines:
                changes.setdefault(line, []).append(name)
        classifier = accelerate(Classifier(model, mean=dataset.mean, std=dataset.std), recipe.speed, precision.device)
        students.append(_student(name, METHODS[name], classifier, recipe.train, recipe, precision))
    if start is not None:
        say(f"students start from {describe_initial_weights(recipe)}")
    for line, changed in changes.items():
        say(line if len(changed) == len(students) else f"{', '.join(changed)}: {line}")
    if recipe.baseline is not None and BASELINE in names:
        students.append(_build_baseline(recipe, dataset, seed, precision, say))
    return students


def build_cohort(
    students: list[Student],
    recipe: Recipe,
    dataset: Dataset,
    *,
    teacher: nn.Module | None,
    seed: int,
    precision: Precision,
    ranks: Ranks = ALONE,
    logit_cache: LogitLookup | None = None,
) -> Cohort:
    """Build the cohort of some students of a seed, in every process that shares its steps; see ``Cohort``."""
    return Cohort(
        students,
        teacher=teacher,
        dataset=dataset,
        augment=recipe.augment,
        train=recipe.train,
        speed=recipe.speed,
        precision=precision,
        seed=seed,
        logit_cache=logit_cache,
        unlabelled_in_step=recipe.unlabelled_in_step,
        balanced=recipe.data.sampling == "balanced",
        ranks=ranks,
    )


def describe_initial_weights(recipe: Recipe) -> str | None:
    """Return name, hash and known licence of the students' initial weights; None for random ones."""
    start = initial_weights_path(recipe.model)
    if start is None:
        return None
    licence = licence_of(start) if recipe.model.pretrained is not None else None
    facts = f"sha256 {file_sha256(weights_file(start))[:8]}" + (f", licence {licence}" if licence else "")
    return f"{recipe.model.pretrained or start.name} ({facts})"


def baseline_architecture(recipe: Recipe) -> str:
    """Return the name of the CNN baseline's architecture."""
    assert recipe.baseline is not None
    return recipe.all_teachers[0].name if recipe.baseline.name == "teacher" else recipe.baseline.name


@contextmanager
def _of_baseline() -> Iterator[None]:
    """Name the fields of the baseline in a message about a CNN that cannot be built."""
    try:
        yield
    except TeacherError as error:
        raise RecipeError(str(error).replace("teacher.", "baseline.")) from error


def baseline_origin(recipe: Recipe) -> ModelCard | None:
    """Return the card of the weights of deitkit that the baseline starts from; None of a stranger's, or without any.

    Raises:
        CheckpointError: The card is damaged.
    """
    checkpoint = None if recipe.baseline is None else recipe.baseline.checkpoint
    return None if checkpoint is None else card_of(checkpoint)


def require_unseen_baseline(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError if the baseline starts from weights that learned from this run's test images."""
    card = baseline_origin(recipe)
    seen = 0.0 if card is None else share_seen(card, recipe.data, dataset)
    if card is not None and seen > MOST_SEEN:
        assert recipe.baseline is not None
        raise RecipeError(say_seen(seen, f"baseline.checkpoint={recipe.baseline.checkpoint}", card, dataset))


def _build_baseline(
    recipe: Recipe, dataset: Dataset, seed: int, precision: Precision, say: Callable[[str], None]
) -> Student:
    baseline = recipe.baseline
    assert baseline is not None
    architecture = baseline_architecture(recipe)
    if Path(architecture).exists():
        what = architecture if baseline.name != "teacher" else f"teacher, and teacher.name={architecture}"
        raise RecipeError(f"baseline.name={what} is a path: name an architecture, such as cifar/resnet56")
    with seeded(seed, BASELINE), _of_baseline():
        built = create_classifier(
            architecture,
            classes=dataset.classes,
            channels=dataset.channels,
            pretrained=baseline.pretrained and baseline.checkpoint is None,
            image_px=baseline.image_px,
        )
    if baseline.checkpoint is not None:
        read = read_checkpoint(baseline.checkpoint, built)
        is_new = load_into(built.model, read.state, head=built.head, source=str(baseline.checkpoint))
        what = f"{baseline.checkpoint.name} (sha256 {file_sha256(baseline.checkpoint)[:8]})"
        remarks = [*read.remarks, *(["its classifier does not fit and is left out"] if is_new else [])]
        say(f"{BASELINE} starts from {'; '.join((what, *remarks))}")
    mean, std, image_px = None, None, baseline.image_px
    if baseline.is_pretrained:
        mean, std, image_px = built.mean, built.std, image_px or built.image_px
    classifier = Classifier(built.model, mean=mean or dataset.mean, std=std or dataset.std, image_px=image_px)
    accelerate(classifier, recipe.speed, precision.device)
    return _student(BASELINE, METHODS["none"], classifier, baseline, recipe, precision)


def _student(
    name: str, method: Method, classifier: Classifier, optimizer: OptimizerRecipe, recipe: Recipe, precision: Precision
) -> Student:
    return Student(
        name,
        method,
        classifier,
        optimizer,
        precision=precision,
        batch_size=max(recipe.train.batch_size, recipe.unlabelled_in_step),
        distillation=recipe.distillation,
        speed=recipe.speed,
        ema_decay=recipe.train.ema_decay,
    )
