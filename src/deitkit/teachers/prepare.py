"""Preparing the teachers of a comparison.

A teacher is built from a name, gets weights from a file, a library or training here, passes the gate, and is frozen.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deitkit.data.dataset import Dataset, as_read
from deitkit.data.duplicates import sketch
from deitkit.distillation.methods import METHODS
from deitkit.errors import CheckpointError, TeacherError
from deitkit.evaluation.readouts import top_k_accuracy
from deitkit.evaluation.seen_images import card_of_data, images_before
from deitkit.models.accelerate import accelerate
from deitkit.models.built import BuiltClassifier, reset_head, reverse_channels
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier, save_tensors
from deitkit.models.weights.read import file_sha256, head_layers, load_into, read_checkpoint, read_state
from deitkit.models.zoo import create_classifier
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
from deitkit.system.seeding import seeded
from deitkit.system.words import counted
from deitkit.teachers.frozen import FrozenTeacher, Teachers, mean_teacher_logits
from deitkit.teachers.gate import doubt, gate, judge_again, larger_usual_px
from deitkit.teachers.images import STREAMED, load_teacher_images, require_batch
from deitkit.teachers.resolution import measure_at_own_resolution
from deitkit.teachers.saved import build_saved, origins, require_unseen
from deitkit.training.cohort import Cohort
from deitkit.training.fit import train_to_end
from deitkit.training.shared import SharedTraining, ranks_that_share, require_parts
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
        return teacher, judge_again(card, recipe.teacher)
    with seeded(recipe.seeds[0], folder.name):
        classifier, card = draft_teacher(recipe.teacher, dataset)
    accelerate(classifier, recipe.speed, precision.device)
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
        require_parts({"teacher.train.batch_size": recipe.train.batch_size})
    if trained and not recipe.all_images:
        require_batch(recipe, len(dataset.train))
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


def draft_teacher(recipe: TeacherRecipe, dataset: Dataset) -> tuple[Classifier, TeacherCard]:
    """Build a teacher with the weights of its recipe; the accuracy on its card is still 0."""
    recipe, built, readout = _build(recipe, dataset)
    source, new_head, new_body = built.source, built.new_head, not recipe.pretrained
    if recipe.checkpoint is not None:
        checkpoint = read_checkpoint(recipe.checkpoint)
        new_head = load_into(built.model, checkpoint.state, head=built.head, source=str(recipe.checkpoint))
        source = f"{recipe.checkpoint.name} (sha256 {file_sha256(recipe.checkpoint)[:8]})"
        source = "; ".join((source, *checkpoint.remarks))
        if new_head and not recipe.reset_head:
            source = f"{source}, whose classifier does not fit ({_classifier_of(checkpoint.state, built.head)})"
        new_body = False
    if recipe.channel_order == "bgr":
        if not reverse_channels(built.model):
            raise TeacherError(f"teacher.channel_order=bgr does not suit {recipe.name}: it has no layer of 3 channels")
        source = f"{source}, channels reversed"
    if recipe.reset_head:
        reset_head(built, dataset.classes)
        source, new_head = f"{source}, classifier replaced by a new one", True
    fit = recipe.fit
    if fit == "auto":
        fit = "full" if new_body else "head" if new_head else "none"
    mean, std = _normalisation(recipe, built, dataset)
    trainable = built.head if fit == "head" else None
    image_px = recipe.image_px or built.image_px
    classifier = Classifier(built.model, mean=mean, std=std, image_px=image_px, trainable=trainable, readout=readout)
    card = TeacherCard(
        name=recipe.name,
        source=source,
        fit=fit,
        top1=0.0,
        n=0,
        chance=0.0,
        verdict=_untrained(new_head, new_body and recipe.checkpoint is None) if fit == "none" else "",
        weak=False,
        parameters=sum(parameter.numel() for parameter in built.model.parameters()),
        image_px=image_px,
        mean=mean,
        std=std,
        readout=readout,
        own_px_top1=None,
        view_px_top1=None,
    )
    return classifier, card


def _build(recipe: TeacherRecipe, dataset: Dataset) -> tuple[TeacherRecipe, BuiltClassifier, str | None]:
    """Build the architecture; for a path, return the recipe and the readout with the values of its card."""
    if Path(recipe.name).exists():
        return build_saved(recipe, dataset)
    built = create_classifier(
        recipe.name,
        classes=dataset.classes,
        channels=dataset.channels,
        pretrained=recipe.pretrained and recipe.checkpoint is None,
        image_px=recipe.image_px,
    )
    return recipe, built, None


def _classifier_of(state: Mapping[str, Tensor], head: str) -> str:
    """Describe the classifier of a checkpoint that was not loaded."""
    layers = head_layers(state, head)
    weight = state.get(f"{layers[0]}.weight") if len(layers) == 1 else None
    if weight is not None:
        return counted(weight.shape[0], "class")
    return f"it has the layers {', '.join(layers)}" if layers else f"it has no layer {head}"


def _untrained(new_head: bool, new_body: bool) -> str:
    """Return the untrained part of a teacher that is not trained here, as a verdict; empty if there is none."""
    if new_body:
        return "no weights were loaded (teacher.checkpoint is not set) and none are trained here"
    return "its classifier is new and was not trained" if new_head else ""


def _normalisation(
    recipe: TeacherRecipe, built: BuiltClassifier, dataset: Dataset
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the recipe's normalisation, else the library's, else the data set's."""
    for mean, std in ((recipe.mean, recipe.std), (built.mean, built.std)):
        if mean is not None and std is not None:
            if len(mean) != dataset.channels or len(std) != dataset.channels:
                raise TeacherError(
                    f"teacher.mean={list(mean)} has {len(mean)} channels, but the images have {dataset.channels}: "
                    f"give {dataset.channels} values, or set data.channels={len(mean)}"
                )
            return mean, std
    return dataset.mean, dataset.std


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
    shared = recipe.model_copy(update={"data": as_read(recipe.data, dataset)})
    ranks.broadcast(SharedTraining(recipe=shared, folder=folder.resolve(), seed=None).model_dump(mode="json"))
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
    homes = teacher_folders(folder, len(recipe.all_teachers))
    for number, (chosen, home) in enumerate(zip(recipe.all_teachers, homes, strict=True)):
        alone = recipe.model_copy(update={"teacher": chosen, "teachers": ()})
        with _numbered(recipe, number):
            teacher, card = prepare_teacher(alone, dataset, folder=home, precision=precision, watcher=watcher)
        teachers.append(teacher)
        cards.append(card)
    return Teachers(teachers), cards


def judge_prepared(recipe: Recipe, folder: Path) -> None:
    """Raise TeacherError if a teacher in a run folder does not pass the bounds of a recipe, which may have changed."""
    homes = teacher_folders(folder, len(recipe.all_teachers))
    for number, (chosen, home) in enumerate(zip(recipe.all_teachers, homes, strict=True)):
        if is_prepared(home):
            with _numbered(recipe, number):
                judge_again(_read_card(home), chosen)


def dry_run_teachers(recipe: Recipe, dataset: Dataset, folder: Path, precision: Precision) -> None:
    """Build every teacher that a run folder lacks, and try it on a batch of views, to fail before anything is written.

    Raises:
        TeacherError: A teacher was trained on test images, cannot be built, or cannot process the views; or one that is
            ready does not pass the bounds of the recipe.
    """
    judge_prepared(recipe, folder)
    homes = teacher_folders(folder, len(recipe.all_teachers))
    for number, (chosen, home) in enumerate(zip(recipe.all_teachers, homes, strict=True)):
        if not is_prepared(home):
            with seeded(recipe.seeds[0], home.name), _numbered(recipe, number):
                require_unseen(chosen, recipe.data, dataset)
                classifier, card = draft_teacher(chosen, dataset)
                _try(accelerate(classifier, recipe.speed, precision.device), card, chosen, dataset, precision)


@contextmanager
def _numbered(recipe: Recipe, number: int) -> Iterator[None]:
    """Name the fields of one of several teachers by its number in the message of a refusal, which begins with it."""
    try:
        yield
    except TeacherError as error:
        if not recipe.teachers:
            raise
        text = re.sub(r"\bteacher\.(?=[a-z])", f"teachers.{number}.", str(error))
        raise TeacherError(f"teachers.{number}: {text}") from error


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
