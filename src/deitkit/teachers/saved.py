"""A teacher from the folder of a saved model: a CNN, or a student.

Training and checking it is in ``prepare``.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import MOST_SEEN
from deitkit.errors import CheckpointError, TeacherError
from deitkit.evaluation.seen_images import say_seen, share_seen
from deitkit.models.built import BuiltClassifier
from deitkit.models.card import ModelCard
from deitkit.models.saved import build_model, model_below, model_folder, read_card
from deitkit.models.weights.initialise import card_of
from deitkit.models.weights.read import read_state
from deitkit.recipe.schema import DataRecipe, Recipe, TeacherRecipe
from deitkit.run.layout import teacher_folders
from deitkit.run.results import TeacherCard
from deitkit.system.words import first_of


def build_saved(recipe: TeacherRecipe, dataset: Dataset) -> tuple[TeacherRecipe, BuiltClassifier, str | None]:
    """Build a teacher from the card of its folder; return its recipe completed by the card, its model and its readout.

    A student with two heads uses the readout with which it won its comparison, else its only trained head, else both
    (``joint``).

    Raises:
        TeacherError: The path has no card, the classes differ from the data's, or a field does not suit a student.
    """
    path = Path(recipe.name)
    folder = model_folder(path if path.is_dir() else path.parent)
    try:
        card = read_card(folder)
    except CheckpointError:
        if path.is_dir():
            example = model_below(path)
            raise TeacherError(
                f"teacher.name={recipe.name} is a folder without a model.json: name one with it, such as {example}"
            ) from None
        raise TeacherError(
            f"teacher.name={recipe.name} is a file without a model.json in its folder: "
            f"give the architecture, as in teacher.name=cifar/resnet56 teacher.checkpoint={recipe.name}"
        ) from None
    if recipe.checkpoint is not None:
        raise TeacherError(
            f"teacher.checkpoint={recipe.checkpoint} has no effect beside teacher.name={recipe.name}, a model with "
            "weights of its own: drop one of them, or name an architecture"
        )
    if card.class_names != dataset.class_names:
        raise TeacherError(
            f"teacher.name={recipe.name} has the classes {first_of(card.class_names)}, but the data has "
            f"{first_of(dataset.class_names)}: train it on this data, or give its weights as teacher.checkpoint"
        )
    own = {
        "name": card.architecture or recipe.name,
        "checkpoint": folder / "model.safetensors",
        "mean": recipe.mean or card.mean,
        "std": recipe.std or card.std,
        "image_px": recipe.image_px or card.image_px,
    }
    state = read_state(folder / "model.safetensors")
    built = build_model(card.model_copy(update={"image_px": own["image_px"]}), state, folder)
    if card.kind == "deit":
        _check_student(recipe, card.config or {})
    return (
        recipe.model_copy(update=own),
        built,
        card.readout or card.only_readout or _readout(card.config),
    )


def origins(recipe: TeacherRecipe) -> list[tuple[Path, ModelCard]]:
    """Return the model or the weights of deitkit that a teacher starts from, with their cards; none of strangers.

    Raises:
        CheckpointError: The card beside the weights is damaged.
    """
    found, named = [], Path(recipe.name)
    if named.exists():
        with suppress(CheckpointError):  # ``build_saved`` says what is wrong
            found.append((named, read_card(model_folder(named if named.is_dir() else named.parent))))
    beside = None if recipe.checkpoint is None else card_of(recipe.checkpoint)
    if recipe.checkpoint is not None and beside is not None:
        found.append((recipe.checkpoint, beside))
    return found


def require_unseen(recipe: TeacherRecipe, data: DataRecipe, dataset: Dataset) -> None:
    """Check that a teacher, if its card tells its training images, was not trained on this run's test images.

    Args:
        recipe: Of the teacher, which may name a model or weights with a card beside them.
        data: Of the run.
        dataset: The same, loaded.

    Raises:
        TeacherError: It was.
    """
    for given, card in origins(recipe):
        seen = share_seen(card, data, dataset)
        if seen > MOST_SEEN:
            raise TeacherError(say_seen(seen, f"the teacher {given}", card, dataset))


def of_unknown_training(recipe: Recipe, dataset: Dataset, folder: Path, cards: Sequence[TeacherCard]) -> Iterator[str]:
    """Yield a remark on each teacher that came trained on the classes of a data set, from images that nothing records.

    There is none where the data set has test images of its own, which its owner keeps apart.

    Args:
        recipe: Of the run.
        dataset: Its images.
        folder: Of the run, with the prepared teachers.
        cards: Of these.
    """
    homes = teacher_folders(folder, len(cards))
    for teacher, card, home in zip(recipe.all_teachers, cards, homes, strict=True):
        known = any(one.seen for one in (read_card(home), *(origin for _, origin in origins(teacher))))
        if dataset.divided and card.fit == "none" and not known:
            yield (
                f"nothing records from which images the teacher {card.name} learned, and the test images are drawn "
                "from all: if it has seen some of them, its accuracy and the students' distances to it are too large; "
                "put images that it has not seen into a folder test/"
            )


def _check_student(recipe: TeacherRecipe, config: dict[str, Any]) -> None:
    """Raise TeacherError for fields that a student does not support as a teacher."""
    if recipe.image_px not in (None, config["image_px"]):
        raise TeacherError(
            f"teacher.image_px={recipe.image_px} does not suit the student {recipe.name}, which needs images of "
            f"{config['image_px']} px: leave it out, and every view is resized to that"
        )
    if len(config["tokens"]) > 1 and (recipe.reset_head or recipe.fit == "head"):
        raise TeacherError(
            f"teacher.name={recipe.name} is a student with two classifier layers, but teacher.fit=head and "
            "teacher.reset_head support only one: set teacher.fit=none or full"
        )


def _readout(config: dict[str, Any] | None) -> str | None:
    """Return the default readout of a student as teacher: the paper's joint one if it has both tokens."""
    if config is None:
        return None
    tokens = config["tokens"] or ["class"]
    return "joint" if len(tokens) > 1 else str(tokens[0])
