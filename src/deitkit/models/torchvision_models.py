"""Classifiers of torchvision by name, and with a stem for small images. Importing it takes a second."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from deitkit.errors import TeacherError
from deitkit.models.built import BuiltClassifier, absent_weights, as_file, head_name, reset_head
from deitkit.system.network import unreachable

# Default side of the images of torchvision's transformers.
TIED_PX = 224
SMALL_FAMILIES = ("resnet", "resnext", "wide_resnet", "regnet")


def names() -> list[str]:
    """Return torchvision's names of models."""
    return torchvision.models.list_models(module=torchvision.models)


def pretrained_px(architecture: str) -> int:
    """Return the resolution of torchvision's weights of a model."""
    return torchvision.models.get_model_weights(architecture).DEFAULT.transforms().crop_size[0]


def build(architecture: str, *, classes: int, channels: int, pretrained: bool, image_px: int | None) -> BuiltClassifier:
    """Build a model, see ``zoo.create_classifier``; raises TeacherError, and whatever torchvision raises."""
    weights = torchvision.models.get_model_weights(architecture).DEFAULT
    preset = weights.transforms()
    tied = architecture.startswith(("vit_", "maxvit_"))
    native_px = preset.crop_size[0] if pretrained else TIED_PX if tied else None
    options: dict[str, Any] = {}
    mean, std = tuple(preset.mean), tuple(preset.std)
    if architecture in ("googlenet", "inception_v3"):
        # With the normalisation of their weights, also in a file, instead of a conversion to it within the model.
        mean, std = (0.5,) * 3, (0.5,) * 3
        options = {"transform_input": False} if pretrained else {"aux_logits": False, "init_weights": True}
    if architecture.startswith("vit_") and not pretrained:
        options["image_size"] = native_px = image_px or native_px
    if pretrained:
        options["weights"] = weights
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        reason = None if file.exists() else unreachable(weights.url)
        if reason is not None:
            problem = absent_weights(f"torchvision/{architecture}", reason, weights.url)
            raise TeacherError(problem + as_file(preset.crop_size[0]))
    built_classes = len(weights.meta["categories"]) if pretrained else classes
    model = torchvision.models.get_model(architecture, num_classes=built_classes, **options)
    if pretrained and architecture == "inception_v3":  # whose weights come with a second classifier for training
        model.aux_logits, model.AuxLogits = False, None
    if channels != 3:
        _set_channels(model, channels)
    built = BuiltClassifier(
        model,
        head_name(model, built_classes),
        f"torchvision {torchvision.__version__}" + (f", ImageNet weights {weights.name}" if pretrained else ""),
        mean if channels == 3 else None,
        std if channels == 3 else None,
        native_px,
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


def small_names() -> list[str]:
    """Return the names that ``build_small`` accepts."""
    return [name for name in names() if name.startswith(SMALL_FAMILIES)]


def build_small(name: str, *, classes: int, channels: int) -> BuiltClassifier:
    """Build torchvision's ResNet or RegNet of that name with a 3x3 stem of stride 1 and no max-pooling.

    The feature maps of a ResNet for 32 px images then have the resolution of the original's for 128 px images.
    """
    model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if isinstance(model, torchvision.models.RegNet):
        model.stem[0] = _stem(channels, model.stem[0].out_channels)
    else:
        assert isinstance(model, torchvision.models.ResNet)
        model.conv1 = _stem(channels, model.conv1.out_channels)
        model.maxpool = nn.Identity()
    source = f"torchvision {torchvision.__version__}, deitkit's stem for small images"
    return BuiltClassifier(model, head_name(model, classes), source)


def _stem(channels: int, outputs: int) -> nn.Conv2d:
    stem = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem
