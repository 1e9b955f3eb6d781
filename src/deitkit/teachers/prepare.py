"""Preparing the teachers of a comparison.

A teacher is built from a name, gets weights from a file, a library or training here, passes the gate, and is frozen.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import sketch
from deitkit.distillation.methods import METHODS
from deitkit.errors import CheckpointError, RecipeError, TeacherError
from deitkit.evaluation.readouts import top_k_accuracy
from deitkit.evaluation.seen_images import card_of_data, images_before
from deitkit.models.accelerate import accelerate
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier, save_tensors
from deitkit.models.weights.read import file_sha256, read_state
from deitkit.recipe.schema import Recipe, TeacherRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.folder import unreadable
from deitkit.run.layout import teacher_folders
from deitkit.run.observer import Watcher
from deitkit.run.results import TESTED, TeacherCard
from deitkit.run.state import drop_state
from deitkit.system.device import Precision
from deitkit.system.files import write_json
from deitkit.system.ranks import Ranks
from deitkit.system.words import counted
from deitkit.teachers.build import build_teacher
from deitkit.teachers.frozen import FrozenTeacher, Teachers, mean_teacher_logits
from deitkit.teachers.gate import doubt, gate, larger_usual_px, recheck
from deitkit.teachers.images import STREAMED, load_teacher_images, require_batch
from deitkit.teachers.resolution import measure_at_own_resolution
from deitkit.teachers.saved import origins, require_unseen
from deitkit.training.cohort import Cohort
from deitkit.training.fit import train_to_end
from deitkit.training.optim import build_optimizers
from deitkit.training.shared import announce, ranks_that_share, require_parts
from deitkit.training.student import Student
from deitkit.training.trial import failure_of

CARD = "card.json"  # written last: a folder with it is complete
TRAINED = "trained.safetensors"  # a teacher's weights until the gate lets it pass: a refused one is not trained again


def is_prepared(folder: Path) -> bool:
    """Return whether the folder of a teacher holds one that may teach."""
    return (folder / CARD).exists()


def is_trained(folder: Path) -> bool:
    """Return whether the folder of a teacher holds all that its training made."""
    return is_prepared(folder) or (folder / TRAINED).exists()


def read_teacher(folder: Path, speed: SpeedRecipe, precision: Precision) -> tuple[FrozenTeacher, TeacherCard]:
    """Read a prepared teacher and its card; raise CheckpointError if they are damaged."""
    try:
        classifier = accelerate(load_classifier(folder, precision.device)[0], speed, precision.device)
    except (CheckpointError, ValueError) as error:
        raise unreadable(folder, error) from None
    card = _read_card(folder)
    classifier.readout = card.readout
    return FrozenTeacher(classifier), card


def prepare_teacher(
    recipe: Recipe, dataset: Dataset, *, folder: Path, precision: Precision, watcher: Watcher
) -> tuple[FrozenTeacher, TeacherCard]:
    """Build the teacher, train it if required, check and freeze it; write its folder, or read it on resume.

    Raises:
        TeacherError: The teacher cannot be built, or the gate refuses it; the message has the likely cause.
    """
    if is_prepared(folder):
        teacher, card = read_teacher(folder, recipe.speed, precision)
        return teacher, recheck(card, recipe.teacher)
    classifier, card = build_teacher(recipe, dataset, folder.name, precision)
    usual_px = None if recipe.teacher.checkpoint is None else larger_usual_px(card, dataset)
    if usual_px is not None:
        watcher.say(
            f"teacher {card.name} sees views of {max(dataset.image_px)} px as they are: if its weights are of "
            f"{usual_px} px, as its library's, set its image_px={usual_px}"
        )
    train_data = dataset
    if card.fit != "none":
        train_data = load_teacher_images(recipe, dataset, folder, watcher.reading)
        trained = folder / TRAINED
        if trained.exists():
            classifier.model.load_state_dict(read_state(trained))
        else:
            _train(classifier, card, recipe, train_data, folder=folder, precision=precision, watcher=watcher)
            save_tensors(trained, dict(classifier.model.state_dict()))
        drop_state(folder / "checkpoint.safetensors")
        source = f"{card.source}, trained here on {counted(len(train_data.train), 'image')}"
        card = card.model_copy(update={"source": source})
    card = gate(classifier, card, dataset, recipe.teacher, precision)
    card, cost = measure_at_own_resolution(classifier, card, recipe.data, precision)
    if cost is not None:
        watcher.say(cost)
    save_classifier(folder, classifier, _model_card(card, dataset, recipe, train_data))
    card = card.model_copy(update={"sha256": file_sha256(folder / "model.safetensors")})
    write_json(folder / CARD, card.model_dump(exclude=TESTED))
    (folder / TRAINED).unlink(missing_ok=True)
    (folder / STREAMED).unlink(missing_ok=True)
    watcher.say(
        f"teacher {card.name}: {100 * card.top1:.2f} % on {counted(card.n, 'validation image')}, {card.verdict}"
    )
    if any(isinstance(module, nn.SyncBatchNorm) for module in classifier.modules()):
        # Trained by several processes: read it again as the others do, with BatchNorm of one process.
        return prepare_teacher(recipe, dataset, folder=folder, precision=precision, watcher=watcher)
    return FrozenTeacher(classifier), card


def _read_card(folder: Path) -> TeacherCard:
    try:
        return TeacherCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from None


def _try(
    classifier: Classifier, card: TeacherCard, recipe: TeacherRecipe, dataset: Dataset, precision: Precision
) -> None:
    """Raise TeacherError if a teacher cannot process the views, before anything trains."""
    trained = card.fit != "none"
    if trained and precision.device.type == "cuda":  # elsewhere one process trains a CNN
        require_parts({"teacher.train.batch_size": recipe.train.batch_size}, precision.device)
    if trained and not recipe.all_images:
        require_batch(recipe, len(dataset.train))
    if trained:
        try:
            build_optimizers(classifier.model, recipe.train)
        except RecipeError as error:
            raise TeacherError(f"teacher.train.{error}") from error
    failure = failure_of(classifier, dataset, recipe.train.batch_size if trained else 1, precision, trained=trained)
    if failure is not None:
        way = "teacher.image_px, teacher.train.batch_size" if trained else "teacher.image_px"
        raise TeacherError(f"teacher {card.name} {failure}; set another {way} or teacher.name")


def _model_card(card: TeacherCard, dataset: Dataset, recipe: Recipe, train_data: Dataset) -> dict[str, Any]:
    described = {
        "architecture": card.name,
        **card_of_data(recipe.data, dataset),
        "readout": card.readout,
        "source": card.source,
        "validation_top1": card.top1,
    }
    before = [origin for _, origin in origins(recipe.teacher)]
    own_px = None if card.image_px is None else (card.image_px, card.image_px)
    measured = card.own_px_top1 is not None and card.view_px_top1 is not None and card.own_px_top1 >= card.view_px_top1
    if card.fit == "none" and own_px is not None and (before[-1].input_px == own_px if before else measured):
        described["input_px"] = list(own_px)  # of a stranger's, which is better on images of its own resolution
    if card.fit != "none":
        described["trained_on"] = sketch(train_data.train.hashes)
    elif before:  # its training was that of another run
        described["split"] = before[-1].split
    return described | images_before(dataset, before)


def _train(
    classifier: Classifier,
    card: TeacherCard,
    recipe: Recipe,
    dataset: Dataset,
    *,
    folder: Path,
    precision: Precision,
    watcher: Watcher,
) -> None:
    """Train the teacher on labels alone: a cohort of one."""
    part = "the classifier layer" if card.fit == "head" else "all layers"
    epochs = counted(recipe.teacher.train.epochs, "epoch")
    watcher.say(f"teacher {card.name} ({card.source}): training {part} for {epochs}")
    few = doubt(dataset)
    if few is not None:
        watcher.say(few)
    student = teacher_student(folder.name, classifier, recipe.teacher, precision)
    ranks = ranks_that_share([student], recipe.teacher.train.batch_size, precision.device, watcher.say)
    announce(ranks, recipe, dataset, folder)
    cohort = teacher_cohort(student, recipe, dataset, precision, ranks)
    train_to_end(
        cohort,
        title=folder.name,
        checkpoint=folder / "checkpoint.safetensors",
        folder=folder,
        watcher=watcher,
        log_folder=folder.parent / "tensorboard",
        save_seconds=recipe.speed.save_seconds,
    )
    if student.stopped:
        raise TeacherError(f"teacher {card.name} {student.stopped}: lower teacher.train.learning_rate")


def teacher_student(name: str, classifier: Classifier, recipe: TeacherRecipe, precision: Precision) -> Student:
    """Return a teacher as the student of labels that it is in its own training."""
    batch_size = recipe.train.batch_size
    return Student(name, METHODS["none"], classifier, recipe.train, precision=precision, batch_size=batch_size)


def teacher_cohort(student: Student, recipe: Recipe, dataset: Dataset, precision: Precision, ranks: Ranks) -> Cohort:
    """Return the cohort in which a teacher trains, in every process that shares its steps."""
    return Cohort(
        [student],
        teacher=None,
        dataset=dataset,
        augment=recipe.teacher.augment,
        train=recipe.teacher.train,
        speed=recipe.speed,
        precision=precision,
        seed=recipe.seeds[0],
        balanced=recipe.data.sampling == "balanced",
        ranks=ranks,
    )


def prepare_teachers(
    recipe: Recipe, dataset: Dataset, *, folder: Path, precision: Precision, watcher: Watcher
) -> tuple[Teachers, list[TeacherCard]]:
    """Prepare every teacher of a recipe in a run folder; read those that exist already.

    Raises:
        TeacherError: A teacher cannot be built, or the gate refuses it.
    """
    teachers, cards = [], []
    for field, one, home in _with_homes(recipe, folder):
        with _naming(field):
            teacher, card = prepare_teacher(
                recipe.with_teacher(one), dataset, folder=home, precision=precision, watcher=watcher
            )
        teachers.append(teacher)
        cards.append(card)
    return Teachers(teachers), cards


def recheck_prepared(recipe: Recipe, folder: Path) -> None:
    """Raise TeacherError if a teacher in a run folder does not pass the bounds of a recipe, which may have changed."""
    for field, one, home in _with_homes(recipe, folder):
        if is_prepared(home):
            with _naming(field):
                recheck(_read_card(home), one)


def dry_run_teachers(recipe: Recipe, dataset: Dataset, folder: Path, precision: Precision) -> None:
    """Build every teacher that a run folder lacks, and try it on a batch of views, to fail before anything is written.

    Raises:
        TeacherError: A teacher was trained on test images, cannot be built, or cannot process the views; or one that is
            ready does not pass the bounds of the recipe.
    """
    recheck_prepared(recipe, folder)
    for field, one, home in _with_homes(recipe, folder):
        if not is_prepared(home):
            with _naming(field):
                require_unseen(one, recipe.data, dataset)
                classifier, card = build_teacher(recipe.with_teacher(one), dataset, home.name, precision)
                _try(classifier, card, one, dataset, precision)


def _with_homes(recipe: Recipe, folder: Path) -> Iterator[tuple[str, TeacherRecipe, Path]]:
    """Yield the field, the recipe and the folder of each teacher of a run."""
    homes = teacher_folders(folder, len(recipe.all_teachers))
    for (field, one), home in zip(recipe.named_teachers.items(), homes, strict=True):
        yield field, one, home


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Name the fields of one of several teachers by its number in the message of a refusal, which begins with it."""
    try:
        yield
    except TeacherError as error:
        if field == "teacher":
            raise
        text = re.sub(r"\bteacher\.(?=[a-z])", f"{field}.", str(error))
        raise TeacherError(f"{field}: {text}") from error


def common_card(
    teachers: Teachers, cards: Sequence[TeacherCard], dataset: Dataset, precision: Precision
) -> TeacherCard:
    """Return the card of all teachers together: that of a single teacher, or one for the mean of several."""
    if len(cards) == 1:
        return cards[0]
    top1 = top_k_accuracy(
        mean_teacher_logits(teachers.logits(dataset.validation, precision)), dataset.validation.labels.cpu()
    )
    together = {
        "name": " + ".join(card.name for card in cards),
        "source": "; ".join(card.source for card in cards),
        "top1": top1,
        "verdict": "; ".join(dict.fromkeys(card.verdict for card in cards)),
        "weak": any(card.weak for card in cards),
        "parameters": sum(card.parameters for card in cards),
        # Resolution, normalisation and readout differ between teachers.
        "image_px": None,
        "mean": (),
        "std": (),
        "readout": None,
        "sha256": None,
        "own_px_top1": None,
        "view_px_top1": None,
    }
    return cards[0].model_copy(update=together)
