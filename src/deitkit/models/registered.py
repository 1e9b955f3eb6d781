"""Architectures of the user, registered under a name: ``own/NAME`` in a recipe."""

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy

from deitkit.errors import NotRegistered, RecipeError, TeacherError, reason_of
from deitkit.models.built import BuiltClassifier, head_name
from deitkit.system.user_code import IMPORT

OWN = "own/"  # before the names of registered architectures in a recipe
Build: TypeAlias = Callable[..., nn.Module]
_REGISTERED: dict[str, Build] = {}


def register_model(name: str) -> Callable[[Build], Build]:
    """Register an architecture of one's own as ``own/NAME``, for ``teacher.name`` and ``baseline.name``.

        @deitkit.register_model("my-net")
        def my_net(classes: int, channels: int) -> torch.nn.Module: ...

    The function returns a model with new weights, drawn from torch's global random state, which maps normalised images
    ``[batch, channels, height, width]`` to logits ``[batch, classes]``. Its last linear layer, or convolution, with
    ``classes`` outputs is its classifier. A later registration of the same name replaces it.

    Args:
        name: Letters, digits, dots, dashes and underscores.

    Raises:
        RecipeError: The name has other characters.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise RecipeError(f"register_model: '{name}' is no name: use letters, digits, '.', '-' and '_'")

    def register(build: Build) -> Build:
        _REGISTERED[name] = build
        return build

    return register


def names() -> list[str]:
    """Return the names that are registered."""
    return sorted(_REGISTERED)


def build_function(architecture: str) -> Build:
    """Return the function, or class, that builds a registered architecture; raise NotRegistered for an unknown one."""
    if architecture not in _REGISTERED:
        known = f" (registered are {', '.join(names())})" if _REGISTERED else ""
        raise NotRegistered(
            f"'{OWN}{architecture}' is not registered{known}: import the module that registers it; on the command "
            f"line, set {IMPORT} to its file"
        )
    return _REGISTERED[architecture]


def build_registered(architecture: str, *, classes: int, channels: int) -> BuiltClassifier:
    """Build a registered architecture.

    Raises:
        TeacherError: It is not registered, its function raises an error or returns something else than a model, or the
            model has no classifier layer.
    """
    name = OWN + architecture
    build = build_function(architecture)
    try:
        model = build(classes=classes, channels=channels)
    except Exception as error:  # the user's code may raise any
        raise TeacherError(
            f"'{name}' cannot be built for {classes} classes and {channels} channels ({type(error).__name__}: "
            f"{reason_of(error)}): correct its function"
        ) from error
    if not isinstance(model, nn.Module):
        raise TeacherError(
            f"the function of '{name}' returned a {type(model).__name__}: let it return a torch.nn.Module"
        )
    if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise TeacherError(
            f"'{name}' has lazy layers, whose size is unknown until they are used: give them their sizes"
        )
    try:
        head = head_name(model, classes)
    except IndexError:
        raise TeacherError(
            f"'{name}' has no linear layer or convolution with {classes} outputs, one for each class: let its "
            "classifier be one"
        ) from None
    return BuiltClassifier(model, head, _source(build))


def _source(build: Build) -> str:
    """Return for reports which file registers an architecture, as it is now."""
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(build)) or "")
        return f"{file.name} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"
    except (TypeError, OSError):  # of a notebook, or an object that can be called
        return "the user's code"
