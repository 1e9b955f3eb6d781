"""Building a teacher as its recipe describes it, before it trains or teaches."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deitkit.data.dataset import Dataset
from deitkit.errors import TeacherError
from deitkit.models.accelerate import accelerate
from deitkit.models.built import BuiltClassifier, reset_head, reverse_channels
from deitkit.models.classifier import Classifier
from deitkit.models.weights.read import file_sha256, head_layers, load_into, read_checkpoint
from deitkit.models.zoo import create_classifier
from deitkit.recipe.schema import Recipe, TeacherRecipe
from deitkit.run.results import TeacherCard
from deitkit.system.device import Precision
from deitkit.system.seeding import seeded
from deitkit.system.words import counted
from deitkit.teachers.saved import build_saved


def build_teacher(recipe: Recipe, dataset: Dataset, name: str, precision: Precision) -> tuple[Classifier, TeacherCard]:
    """Build the only teacher of a recipe under the seed of its folder's name, on its device; see ``draft_teacher``."""
    with seeded(recipe.seeds[0], name):
        classifier, card = draft_teacher(recipe.teacher, dataset)
    accelerate(classifier, recipe.speed, precision.device)
    return classifier, card


def draft_teacher(recipe: TeacherRecipe, dataset: Dataset) -> tuple[Classifier, TeacherCard]:
    """Build a teacher with the weights of its recipe; the accuracy on its card is still 0."""
    recipe, built, readout = _build(recipe, dataset)
    source, new_head, new_body = built.source, built.new_head, not recipe.pretrained
    if recipe.checkpoint is not None:
        checkpoint = read_checkpoint(recipe.checkpoint, built)
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
        verdict_without_bound=None,
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
            for field, values in (("mean", mean), ("std", std)):
                if len(values) != dataset.channels:
                    raise TeacherError(
                        f"teacher.{field}={list(values)} has {counted(len(values), 'value')}, but the images have "
                        f"{counted(dataset.channels, 'channel')}: give one for each, or set data.channels={len(values)}"
                    )
            return mean, std
    return dataset.mean, dataset.std
