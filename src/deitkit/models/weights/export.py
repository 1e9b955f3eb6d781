"""Preparing weights for export: read, adapted, and described with all that other libraries need.

The files of each library are written in ``export_layouts``.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitkit.errors import CheckpointError, RecipeError
from deitkit.models.card import ModelCard
from deitkit.models.vit import TOKENS, Output
from deitkit.models.weights.adapt import Values, adapt, renormalise
from deitkit.models.weights.formats import Architecture, State
from deitkit.models.weights.initialise import Weights, read_weights
from deitkit.models.weights.read import file_sha256

# Fields of a student's card about its training: those that always hold, those of its heads, and of unchanged weights.
_ALWAYS, _OF_HEADS, _OF_WEIGHTS = (
    ("recipe", "initial", "dataset", "split"),
    ("method", "seed", "readout"),
    ("test_top1",),
)
_OF_IMAGES = ("trained_on", "labelled_share", "trained_before_on", "trained_before_view")


@dataclass(frozen=True)
class ExportedModel:
    """A vision transformer to export, with all that other libraries need to know of it.

    Attributes:
        state: By the names of ``vit``.
        architecture: For square images, with a classifier.
        class_names: One per class.
        mean: Per channel, of values in [0, 1].
        std: As ``mean``.
        eval_crop: Share of the resized side that is kept of a test image, as ``data.eval_crop``.
        fit: How an image becomes square, as ``data.fit``.
        about: Further fields of a card of deitkit.
        lines: Changes and assumptions, one line each.
        assumes_heads: As for ``Weights``.
        only_readout: As for ``Weights``.
    """

    state: State
    architecture: Architecture
    class_names: tuple[str, ...]
    mean: Values
    std: Values
    eval_crop: float
    fit: str
    about: dict[str, Any]
    lines: tuple[str, ...]
    assumes_heads: bool = False
    only_readout: str | None = None

    def build(self) -> nn.Module:
        """Build the student, in evaluation mode."""
        student = self.architecture.build()
        student.load_state_dict(self.state, strict=True)
        return student.eval()

    def logits(self, output: Output) -> Tensor:
        """Return the logits by which the model answers in timm and transformers: the mean over its trained heads."""
        heads = [output.class_logits, None if self.only_readout else output.distillation_logits]
        trained = [head for head in heads if head is not None]
        return sum(trained[1:], trained[0]) / len(trained)


@dataclass(frozen=True)
class Changes:
    """Properties to change in an export; None leaves one unchanged.

    Attributes:
        image_px: Side of the square images.
        patch_px: Side of a patch.
        channels: 1 or 3.
        classes: Number of classes.
        tokens: As ``class+distillation``; ``none`` for mean pooling.
    """

    image_px: int | None = None
    patch_px: int | None = None
    channels: int | None = None
    classes: int | None = None
    tokens: str | None = None

    def apply(self, given: Architecture) -> Architecture:
        """Return an architecture with these properties; raise RecipeError for unknown tokens."""
        return replace(
            given,
            image_px=(self.image_px, self.image_px) if self.image_px else given.image_px,
            patch_px=self.patch_px or given.patch_px,
            channels=self.channels or given.channels,
            classes=self.classes or given.classes,
            tokens=given.tokens if self.tokens is None else _parse_tokens(self.tokens),
        )


def prepare_export(
    source: Path,
    wanted: Changes,
    *,
    heads: int | None = None,
    mean: Values | None = None,
    std: Values | None = None,
) -> ExportedModel:
    """Read weights and adapt them.

    Args:
        source: See ``read_weights``.
        wanted: Properties to change.
        heads: Attention heads of a block, if no card or config is in the folder of the file.
        mean: Normalisation that the weights were trained with, if no card or config is in the folder of the file.
        std: As ``mean``.

    Raises:
        RecipeError: A property is impossible.
        CheckpointError: The weights cannot be read.
    """
    weights = read_weights(source, heads)
    if heads not in (None, weights.architecture.heads):
        raise RecipeError(
            f"--heads {heads}: {source} has {weights.architecture.heads}, which its files say: drop --heads"
        )
    given, target = weights.architecture, wanted.apply(weights.architecture)
    _check(target, source)
    mean, std, remarks = _normalisation(weights, mean, std)
    lines = [*weights.remarks, *remarks]
    state: State = weights.state
    changes: list[str] = []
    if target.channels != given.channels:  # use the mean over channels for every new channel
        single = (sum(mean) / len(mean),), (sum(std) / len(std),)
        new = (single[0] * target.channels, single[1] * target.channels)
        state, changes = renormalise(state, (mean, std), new)
        mean, std = new
    state, adaptations = adapt(state, to=target, source=str(source), image_px=given.image_px)
    changes += adaptations
    names = weights.class_names
    if names is None or len(names) != target.classes:
        names = tuple(f"class {number}" for number in range(target.classes))
        lines.append(f"class names: missing in the source; {names[0]} to {names[-1]} are written")
    if weights.eval_crop is None or weights.fit is None:
        lines.append("test images: how they are cropped is missing in the source; the largest centre square is written")
    eval_crop, fit = weights.eval_crop or 1.0, weights.fit or "crop"
    about = _about(weights, source, target, fit, changes)
    only = weights.only_readout if len(target.tokens) == 2 else None
    return ExportedModel(
        state, target, names, mean, std, eval_crop, fit, about, (*lines, *changes), weights.assumes_heads, only
    )


def _about(weights: Weights, source: Path, target: Architecture, fit: str, changes: list[str]) -> dict[str, Any]:
    """Return the fields of a card on the origin of the weights, and those on their training that still hold."""
    given, card = weights.architecture, weights.card
    origin: dict[str, Any] = {"source": f"{source.name} (sha256 {file_sha256(weights.file)[:8]})", "changes": changes}
    if card is None:
        return origin
    known = card.written()
    if "changes" in known:  # it was converted before
        origin = {"source": known.get("source", origin["source"]), "changes": [*known["changes"], *changes]}
    same_heads = (given.tokens, given.classes) == (target.tokens, target.classes)
    names = (*_ALWAYS, *(_OF_HEADS if same_heads else ()), *(() if changes else _OF_WEIGHTS))
    seen = _images_of_training(card, {"image_px": target.image_px[0], "channels": target.channels, "fit": fit})
    return {name: known[name] for name in names if name in known} | seen | origin


def _images_of_training(card: ModelCard, view: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a card on the images that a model learned from, for one that takes images as a view."""
    known = card.written()
    own = card.view if card.input_px is not None else view
    if own == view:
        return {name: known[name] for name in _OF_IMAGES if name in known}
    seen, view_of_seen = (card.seen, own) if card.seen is not None else card.seen_otherwise or (None, None)
    return {} if seen is None else {"trained_before_on": seen, "trained_before_view": view_of_seen}


def _parse_tokens(text: str) -> tuple[str, ...]:
    tokens = () if text == "none" else tuple(text.split("+"))
    if tokens != tuple(name for name in TOKENS if name in tokens):
        raise RecipeError(f"--tokens {text}: choose class, distillation, class+distillation or none")
    return tokens


def _check(target: Architecture, source: Path) -> None:
    height, width = target.image_px
    if height != width:
        raise RecipeError(
            f"{source} is for images of {height} x {width} px, but a student needs square ones: add --image-px {height}"
        )
    if height % target.patch_px:
        fitting = ", ".join(str(side) for side in range(1, height + 1) if height % side == 0)
        raise RecipeError(
            f"--patch-px {target.patch_px} does not divide images of {height} px: choose from {fitting}, "
            "or another --image-px"
        )
    if target.channels not in (1, 3):
        raise RecipeError(f"--channels {target.channels}: choose 1 or 3")
    if not target.classes:
        raise CheckpointError(f"{source} contains no classifier: add --classes N for a new one")


def _normalisation(weights: Weights, mean: Values | None, std: Values | None) -> tuple[Values, Values, list[str]]:
    """Return the normalisation of the weights: the given one, else the source's, else ImageNet's."""
    count = weights.architecture.channels
    found = weights.mean is not None and weights.std is not None
    if (mean is None) != (std is None):
        raise RecipeError("--mean and --std belong together: give both or neither")
    if mean is not None and std is not None:
        finite = all(math.isfinite(value) for value in (*mean, *std))
        if len(mean) != count or len(std) != count or not finite or min(std) <= 0:
            raise RecipeError(f"--mean and --std need {count} values each, all finite, and those of --std positive")
        if max(map(abs, (*mean, *std))) > 1:
            raise RecipeError("--mean and --std are of values from 0 to 255, not from 0 to 1: divide them by 255")
        known_mean, known_std = weights.normalisation
        if found and not torch.allclose(torch.tensor((mean, std)), torch.tensor((known_mean, known_std))):
            raise RecipeError(
                f"--mean and --std: {weights.file} was trained with a mean of {[*known_mean]} and an std of "
                f"{[*known_std]}: leave both out"
            )
        return mean, std, []
    line = "normalisation: missing in the source; ImageNet's is written (set another with --mean and --std)"
    return *weights.normalisation, [] if found else [line]
