"""A classifier of a library with what is needed to use it: its head, normalisation and resolution."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class BuiltClassifier:
    """A classifier with the facts needed to use it.

    Attributes:
        model: Takes normalised images ``[batch, channels, height, width]``, returns logits ``[batch, classes]``.
        head: Dotted name of the classifier layer.
        source: Origin of architecture and weights, for reports.
        mean: The library's normalisation of values in [0, 1], per channel; None if any will do.
        std: As ``mean``.
        image_px: Resolution of the pretrained weights, or of an architecture with a fixed one; None if any will do.
        new_head: Whether the backbone is pretrained but the head is new, because the classes differ.
    """

    model: nn.Module
    head: str
    source: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_px: int | None = None
    new_head: bool = False


def reset_head(built: BuiltClassifier, classes: int) -> None:
    """Replace the classifier layer by a new one, in place, from torch's global random state."""
    old: Any = built.model.get_submodule(built.head)
    options = {"bias": old.bias is not None, "device": old.weight.device}
    if isinstance(old, nn.Conv2d):  # SqueezeNet's classifier, among others
        new: nn.Module = nn.Conv2d(old.in_channels, classes, 1, **options)
    else:
        new = nn.Linear(old.in_features, classes, **options)
    built.model.set_submodule(built.head, new)


def reverse_channels(model: nn.Module) -> bool:
    """Turn a model of red, green, blue into one of blue, green, red, or back, by its first convolution, in place.

    Returns:
        Whether it has a convolution of three channels.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            layer.weight.data = layer.weight.data.flip(1)
            return True
    return False


def head_name(model: nn.Module, classes: int) -> str:
    """Return the name of the last layer with ``classes`` outputs; raise IndexError if there is none."""
    widths = {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    return [name for name, width in widths.items() if width == classes][-1]


def absent_weights(name: str, reason: str, url: str) -> str:
    """Return the first part of a sentence on pretrained weights that cannot be downloaded."""
    return (
        f"the pretrained weights of '{name}' are not on this machine, and {reason}: connect to the internet, or fetch "
        f"{url} elsewhere"
    )


def as_file(image_px: int) -> str:
    """Return the rest of the sentence for a teacher, whose images have a side of ``image_px``."""
    return f" and set teacher.checkpoint to the file and teacher.image_px={image_px}"
