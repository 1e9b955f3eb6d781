"""Classifiers by name: timm's and torchvision's unchanged, and the CNNs for small images.

Preparing a classifier as a teacher is in ``teachers``.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torchvision
from torch import nn

from deitkit.errors import TeacherError
from deitkit.models.cnn import CIFAR_DEPTHS, CifarResNet, small_cnn, small_names
from deitkit.system.network import no_endless_wait, unreachable

# Default side of the images of torchvision's transformers.
TIED_PX = 224


@dataclass(frozen=True)
class BuiltClassifier:
    """A classifier with the facts needed to use it.

    Attributes:
        model: Takes normalised images ``[batch, channels, height, width]``, returns logits ``[batch, classes]``.
        head: Dotted name of the classifier layer.
        mean: The library's normalisation of values in [0, 1], per channel; None if any will do.
        std: As ``mean``.
        image_px: Resolution of the pretrained weights, or of an architecture with a fixed one; None if any will do.
        source: Origin of architecture and weights, for reports.
        new_head: Whether the backbone is pretrained but the head is new, because the classes differ.
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
) -> BuiltClassifier:
    """Build a classifier by its name, from torch's global random state.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``cifar/resnet20|32|44|56`` or ``small/NAME``.
        classes: Number of classes.
        channels: Channels of the images, 1 or 3.
        pretrained: Load the library's weights; if their number of classes differs, the head stays new.
        image_px: Resolution at which it will be used; only for architectures with a fixed resolution.

    Raises:
        TeacherError: The name is unknown, or the weights do not exist, do not fit or cannot be downloaded.
    """
    library, _, architecture = name.partition("/")
    untagged = name.partition(".")[0] if library == "timm" else name
    if untagged not in names():
        raise TeacherError(f"teacher.name='{name}' is unknown: {_nearest(untagged)}")
    if pretrained and library in ("cifar", "small"):
        raise TeacherError(
            f"teacher.pretrained=true has no weights for '{name}': give a file as teacher.checkpoint, or train it here"
        )
    if pretrained and channels != 3:
        raise TeacherError(
            f"teacher.pretrained=true needs 3 channels, but the images have {channels}: set data.channels=3"
        )
    if library == "cifar":
        depth = int(architecture.removeprefix("resnet"))
        return BuiltClassifier(
            CifarResNet(depth, classes=classes, channels=channels), "linear", None, None, None, "deitkit"
        )
    if library == "small":
        model = small_cnn(architecture, classes=classes, channels=channels)
        source = f"torchvision {torchvision.__version__}, deitkit's stem for small images"
        return BuiltClassifier(model, head_name(model, classes), None, None, None, source)
    build = _from_timm if library == "timm" else _from_torchvision
    with _one_sentence(name, pretrained, image_px), no_endless_wait():
        return build(architecture, classes=classes, channels=channels, pretrained=pretrained, image_px=image_px)


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


def names() -> list[str]:
    """Return every name that ``create_classifier`` accepts, without timm's tags of weights."""
    return [
        *(f"cifar/resnet{depth}" for depth in CIFAR_DEPTHS),
        *(f"small/{name}" for name in small_names()),
        *(f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)),
        *(f"timm/{name}" for name in timm.list_models()),
    ]


def _from_timm(
    architecture: str, *, classes: int, channels: int, pretrained: bool, image_px: int | None
) -> BuiltClassifier:
    card = timm.get_pretrained_cfg(architecture)
    if pretrained and (card is None or not card.has_weights):
        raise TeacherError(
            f"teacher.pretrained=true has no weights for 'timm/{architecture}': give a file as teacher.checkpoint"
        )
    tied = card is not None and card.fixed_input_size
    sized = tied and image_px is not None
    options: dict[str, Any] = {"img_size": image_px} if sized else {}
    if pretrained:
        options["pretrained_cfg_overlay"], problem = find_timm_file(card)
        if problem is not None:
            raise TeacherError(problem + _as_file(card.input_size[-1]))
    model = timm.create_model(architecture, pretrained=pretrained, num_classes=classes, in_chans=channels, **options)
    card = model.pretrained_cfg
    head = card.get("classifier")
    if not isinstance(head, str) or not isinstance(model.get_submodule(head), nn.Linear | nn.Conv2d):
        raise TeacherError(
            f"teacher.name='timm/{architecture}' has no single classifier layer, as a teacher must: choose another"
        )
    native_px = card["input_size"][-1] if tied or pretrained else None
    return BuiltClassifier(
        model,
        head,
        tuple(card["mean"]) if channels == 3 else None,
        tuple(card["std"]) if channels == 3 else None,
        image_px if sized else native_px,
        f"timm {timm.__version__}" + (f", weights {card.get('tag') or 'default'}" if pretrained else ""),
        new_head=pretrained and card["num_classes"] != classes,
    )


def find_timm_file(card: Any) -> tuple[dict[str, Any], str | None]:
    """Find timm's weights in its cache where they cannot be downloaded.

    Returns:
        Their file as a change of their card, empty if they can be downloaded; and None, or the first part of a sentence
        on weights that are not in the cache while the Hub cannot be reached.
    """
    hub = huggingface_hub.constants.ENDPOINT
    reason = unreachable(hub) if card.hf_hub_id else None
    if reason is None:
        return {}, None
    cached = [
        huggingface_hub.try_to_load_from_cache(card.hf_hub_id, file)
        for file in (card.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
        if file
    ]
    found = next((file for file in cached if isinstance(file, str)), None)
    if found is None:
        url = f"{hub}/{card.hf_hub_id}/resolve/main/model.safetensors"
        return {}, _offline(f"timm/{card.architecture}", reason, url)
    return {"file": found}, None


def _offline(name: str, reason: str, url: str) -> str:
    return (
        f"the pretrained weights of '{name}' are not on this machine, and {reason}: connect to the internet, or fetch "
        f"{url} elsewhere"
    )


def _as_file(image_px: int) -> str:
    return f" and set teacher.checkpoint to the file and teacher.image_px={image_px}"


def _from_torchvision(
    architecture: str, *, classes: int, channels: int, pretrained: bool, image_px: int | None
) -> BuiltClassifier:
    weights = torchvision.models.get_model_weights(architecture).DEFAULT
    preset = weights.transforms()
    tied = architecture.startswith(("vit_", "maxvit_"))
    native_px = preset.crop_size[0] if pretrained else TIED_PX if tied else None
    options: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):
        options = {"aux_logits": False} if pretrained else {"aux_logits": False, "init_weights": True}
    if architecture.startswith("vit_") and not pretrained:
        options["image_size"] = native_px = image_px or native_px
    if pretrained:
        options["weights"] = weights
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        reason = None if file.exists() else unreachable(weights.url)
        if reason is not None:
            problem = _offline(f"torchvision/{architecture}", reason, weights.url)
            raise TeacherError(problem + _as_file(preset.crop_size[0]))
    built_classes = len(weights.meta["categories"]) if pretrained else classes
    model = torchvision.models.get_model(architecture, num_classes=built_classes, **options)
    if channels != 3:
        _set_channels(model, channels)
    built = BuiltClassifier(
        model,
        head_name(model, built_classes),
        tuple(preset.mean) if channels == 3 else None,
        tuple(preset.std) if channels == 3 else None,
        native_px,
        f"torchvision {torchvision.__version__}" + (f", ImageNet weights {weights.name}" if pretrained else ""),
        new_head=built_classes != classes,
    )
    if built.new_head:
        reset_head(built, classes)
    return built


def _set_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by a new one for images with another number of channels."""
    name, old = next((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    shape: Any = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    shape["bias"] = old.bias is not None
    model.set_submodule(name, nn.Conv2d(channels, old.out_channels, **shape))


def head_name(model: nn.Module, classes: int) -> str:
    """Return the name of the last layer with ``classes`` outputs."""
    widths = {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    return [name for name, width in widths.items() if width == classes][-1]


@contextmanager
def _one_sentence(name: str, pretrained: bool, image_px: int | None) -> Iterator[None]:
    """Convert any exception of a library to a TeacherError."""
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:  # from downloads to assertions, the libraries raise many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if pretrained:
            raise TeacherError(
                f"the pretrained weights of '{name}' cannot be loaded ({reason}): connect to the internet, "
                "or fetch them elsewhere and give the file as teacher.checkpoint"
            ) from error
        raise TeacherError(
            f"teacher.name='{name}' cannot be built with teacher.image_px={image_px} ({reason}): change either"
        ) from error


def _nearest(name: str) -> str:
    known = names()
    last = name.rpartition("/")[2]
    near = [full for full in known if full.partition("/")[2] == last]
    near += [full for full in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if full not in near]
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    return (
        "write timm/NAME, torchvision/NAME, small/NAME or cifar/resnet20, 32, 44 or 56, or a folder or file that exists"
    )
