"""Classifiers by name: timm's and torchvision's as the libraries have them, and the CNNs for small images.

What a classifier is shown, whether it may teach and how it is trained is decided in ``teacher``.
"""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from deitkit.errors import TeacherError
from deitkit.models.cnn import CIFAR_DEPTHS, CifarResNet, small_cnn, small_names


@dataclass(frozen=True)
class Built:
    """A classifier, and what must be known to use it.

    Attributes:
        model: Takes normalised images ``[batch, channels, height, width]``, returns logits ``[batch, classes]``.
        head: Dotted name of the classifier layer.
        mean: The library's own normalisation of values in [0, 1], per channel; None where any will do.
        std: As ``mean``.
        image_px: Resolution of the pretrained weights, or that of an architecture tied to one; None where any will do.
        source: Where architecture and weights come from, for reports.
        new_head: Whether the backbone is pretrained but the head is not, for its classes are others.
    """

    model: nn.Module
    head: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    image_px: int | None
    source: str
    new_head: bool = False


def create_classifier(
    name: str, *, classes: int, channels: int, pretrained: bool = False, image_px: int | None = None
) -> Built:
    """Build a classifier by its name, with torch's own random numbers.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``cifar/resnet20|32|44|56`` or ``small/NAME``.
        classes: Number of classes.
        channels: Channels of the images, 1 or 3.
        pretrained: Load the library's weights; where they know other classes, the head stays new.
        image_px: Resolution at which it will be used; matters to architectures that are tied to one.

    Raises:
        TeacherError: An unknown name, or weights that do not exist, do not fit or cannot be downloaded.
    """
    if name not in names():
        raise TeacherError(f"teacher.name='{name}' is unknown: {_nearest(name)}")
    library, _, architecture = name.partition("/")
    if pretrained and library in ("cifar", "small"):
        raise TeacherError(
            f"teacher.pretrained=true has no weights for '{name}': give a file as teacher.checkpoint, or train it here"
        )
    if pretrained and channels != 3:
        raise TeacherError(
            f"teacher.pretrained=true needs colour images and these have {channels} channel: set data.channels=3"
        )
    if library == "cifar":
        depth = int(architecture.removeprefix("resnet"))
        return Built(CifarResNet(depth, classes=classes, channels=channels), "linear", None, None, None, "deitkit")
    if library == "small":
        model = small_cnn(architecture, classes=classes, channels=channels)
        source = f"torchvision {torchvision.__version__}, deitkit's stem for small images"
        return Built(model, _head_name(name, model, classes), None, None, None, source)
    build = _from_timm if library == "timm" else _from_torchvision
    with _readable_failures(name, pretrained):
        return build(name, classes, channels, pretrained, image_px)


def reset_head(built: Built, classes: int) -> None:
    """Replace the classifier layer by a freshly initialised one, in place, with torch's own random numbers."""
    old = built.model.get_submodule(built.head)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, old.kernel_size, bias=old.bias is not None)  # type: ignore[arg-type]
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    built.model.set_submodule(built.head, new.to(next(old.parameters()).device))


def names() -> list[str]:
    """Return every name that ``create_classifier`` takes, without timm's tags of weights."""
    return [
        *(f"cifar/resnet{depth}" for depth in CIFAR_DEPTHS),
        *(f"small/{name}" for name in small_names()),
        *(f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)),
        *(f"timm/{name}" for name in timm.list_models()),
    ]
