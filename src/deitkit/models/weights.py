"""Weights in: reading checkpoints of strangers safely, and loading them into a model whole or not at all."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deitkit.errors import CheckpointError

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "teacher")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint: layers loaded, missing in it, unknown to the model, or of another shape."""

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by name, without their wrappers and prefixes; nothing is unpickled.

    Args:
        path: ``.safetensors``, or anything that ``torch.load(weights_only=True)`` reads.

    Raises:
        CheckpointError: No such file, no checkpoint, or one that could run code when it is read.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check its name")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"checkpoint {path} is no weights file, or holds Python objects that could run code and are not read: "
            "save its state_dict alone, best as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise CheckpointError(f"checkpoint {path} is damaged or no weights file: copy or download it again") from None
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        content = {}
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"checkpoint {path} holds no tensors by name: save a model's state_dict")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, head: str, source: str) -> LoadReport:
    """Load a checkpoint into a model: all of it, but for a classifier of another class count, which stays new.

    Args:
        model: Changed in place, only if the checkpoint fits.
        state: Tensors by name.
        head: Dotted name of the classifier layer, which alone may differ or be absent.
        source: What to call the checkpoint in an error.

    Raises:
        CheckpointError: Other layers are missing, unknown or of another shape.
    """
    own = model.state_dict()
    mismatched = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    wrong = [name for name in (*mismatched, *missing, *unexpected) if not name.startswith(f"{head}.")]
    if wrong:
        raise CheckpointError(
            f"checkpoint {source} is no {type(model).__name__} of this shape: {len(wrong)} of its or the model's "
            f"{len(own)} layers do not fit, the first is {wrong[0]}; name the architecture that it was saved from"
        )
    fitting = {name: value for name, value in state.items() if name in own and name not in mismatched}
    model.load_state_dict(fitting, strict=False)
    described = tuple(f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here" for name in mismatched)
    return LoadReport(len(fitting), tuple(missing), tuple(unexpected), described)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
