"""Classifiers by name: timm's and torchvision's unchanged, the CNNs for small images, and those that users register.

Preparing a classifier as a teacher is in ``teachers``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from deitkit.errors import TeacherError, reason_of
from deitkit.models.built import BuiltClassifier
from deitkit.models.cnn import CIFAR_DEPTHS, CifarResNet
from deitkit.models.registered import build_function, build_registered
from deitkit.models.registered import names as registered_names
from deitkit.recipe.problems import nearest
from deitkit.system.network import no_endless_wait

LIBRARIES = ("cifar", "small", "torchvision", "timm", "own")


def create_classifier(
    name: str, *, classes: int, channels: int, pretrained: bool = False, image_px: int | None = None
) -> BuiltClassifier:
    """Build a classifier by its name, from torch's global random state.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``cifar/resnet20|32|44|56``, ``small/NAME`` or ``own/NAME``.
        classes: Number of classes.
        channels: Channels of the images, 1 or 3.
        pretrained: Load the library's weights; if their number of classes differs, the head stays new.
        image_px: Resolution at which it will be used; only for architectures with a fixed resolution.

    Raises:
        TeacherError: The name is unknown, or the weights do not exist, do not fit or cannot be downloaded.
    """
    library, architecture = require_known(name)
    if pretrained and library in ("cifar", "small", "own"):
        raise TeacherError(
            f"teacher.pretrained=true has no weights for '{name}': give a file as teacher.checkpoint, or train it here"
        )
    if pretrained and channels != 3:
        raise TeacherError(
            f"teacher.pretrained=true needs 3 channels, but the images have {channels}: set data.channels=3"
        )
    if library == "cifar":
        depth = int(architecture.removeprefix("resnet"))
        return BuiltClassifier(CifarResNet(depth, classes=classes, channels=channels), "linear", "deitkit")
    if library == "own":
        return build_registered(architecture, classes=classes, channels=channels)
    # Here, since these libraries take a second to import.
    if library == "small":
        from deitkit.models.torchvision_models import build_small

        return build_small(architecture, classes=classes, channels=channels)
    if library == "timm":
        from deitkit.models.timm_models import build
    else:
        from deitkit.models.torchvision_models import build
    with _one_sentence(name, pretrained, image_px), no_endless_wait():
        return build(architecture, classes=classes, channels=channels, pretrained=pretrained, image_px=image_px)


def pretrained_px(name: str) -> int | None:
    """Return the resolution of a library's pretrained weights, without fetching them; None if it has none.

    Raises:
        TeacherError: The name is unknown.
    """
    library, architecture = require_known(name)
    if library == "timm":
        from deitkit.models.timm_models import pretrained_px
    elif library == "torchvision":
        from deitkit.models.torchvision_models import pretrained_px
    else:
        return None
    with _one_sentence(name, pretrained=True, image_px=None):
        return pretrained_px(architecture)


def require_known(name: str) -> tuple[str, str]:
    """Return library and architecture of a name; raise TeacherError for one that is unknown or not registered."""
    library, _, architecture = name.partition("/")
    untagged = name.partition(".")[0] if library == "timm" else name
    if library == "own":
        build_function(architecture)
    elif library not in LIBRARIES or untagged not in _names_in(library):
        raise TeacherError(f"teacher.name='{name}' is unknown: {_nearest(untagged)}")
    return library, architecture


def names() -> list[str]:
    """Return every name that ``create_classifier`` accepts, without timm's tags of weights."""
    return [name for library in LIBRARIES for name in _names_in(library)]


def _names_in(library: str) -> list[str]:
    if library == "cifar":
        found = [f"resnet{depth}" for depth in CIFAR_DEPTHS]
    elif library == "own":
        found = registered_names()
    elif library == "timm":
        from deitkit.models import timm_models

        found = timm_models.names()
    else:
        from deitkit.models import torchvision_models

        found = torchvision_models.small_names() if library == "small" else torchvision_models.names()
    return [f"{library}/{name}" for name in found]


@contextmanager
def _one_sentence(name: str, pretrained: bool, image_px: int | None) -> Iterator[None]:
    """Convert any exception of a library to a TeacherError."""
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:  # from downloads to assertions, the libraries raise many types
        reason = reason_of(error)
        if pretrained:
            raise TeacherError(
                f"the pretrained weights of '{name}' cannot be loaded ({reason}): connect to the internet, "
                "or fetch them elsewhere and give the file as teacher.checkpoint"
            ) from error
        raise TeacherError(
            f"teacher.name='{name}' cannot be built with teacher.image_px={image_px} ({reason}): change either"
        ) from error


def _nearest(name: str) -> str:
    return nearest(name, names(), "/") or (
        "write timm/NAME, torchvision/NAME, small/NAME or cifar/resnet20, 32, 44 or 56, or a folder or file that exists"
    )
