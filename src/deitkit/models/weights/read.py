"""Reading untrusted checkpoints safely, and loading them into a model completely or not at all."""

import argparse
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from deitkit.errors import CheckpointError
from deitkit.models.built import BuiltClassifier
from deitkit.system.process import signals_held
from deitkit.system.words import first_of

State = dict[str, Tensor]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "teacher")
# Within names: of torch.compile, FSDP and activation checkpointing.
_WRAPPING = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MOST_NESTED = 8  # names in a prefix; a bound for names that somebody made up
# What is no part of a classifier: losses with weights, GoogLeNet's and Inception's further classifiers for training;
# counters of averages, and of operations (thop).
_ADDED = ("criterion.", "loss.", "loss_fn.", "aux1.", "aux2.", "AuxLogits.")
_COUNTERS = ("n_averaged", "total_ops", "total_params")
FACTS = "deitkit"  # where our own export of a single file keeps what a card would tell
MOST_COMPRESSION = 10  # ratio of an archive; weights hardly compress


class _Ignored:
    """In place of a number or an array of NumPy beside the weights, such as the best accuracy."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_OF_NUMPY = (
    "dtype",
    "ndarray",
    *(f"{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors by name, remarks on which of its parts they are, and what our own export adds."""

    state: State
    remarks: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def read_state(path: Path) -> State:
    """Return the tensors of ``read_checkpoint``."""
    return read_checkpoint(path).state


def read_checkpoint(path: Path, built: BuiltClassifier | None = None) -> Checkpoint:
    """Read a checkpoint's tensors by name, without the parts around them; nothing is unpickled.

    Args:
        path: ``.safetensors``, or anything that ``torch.load(weights_only=True)`` reads.
        built: The model that they are for, whose names they get as in ``load_into``; None leaves them as in the file.

    Raises:
        CheckpointError: The file does not exist, is not a checkpoint, or could run code when it is read.
    """
    whole = _load(path)
    facts = whole.get(FACTS) if isinstance(whole, dict) else None
    content, remarks = _unwrapped(whole)
    named = content.items() if isinstance(content, dict) else ()
    state = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if any(value.nbytes > path.stat().st_size for value in state.values()):
        raise _damaged(path)  # a small file that claims a tensor larger than memory
    if not state:
        raise CheckpointError(f"checkpoint {path} contains no tensors by name: save a model's state_dict")
    read = Checkpoint(state, tuple(remarks), facts if isinstance(facts, dict) else {})
    if built is None:
        return read
    state, more = _named_as(built.model.state_dict(), state, built.head)
    return replace(read, state=state, remarks=(*remarks, *more))


def require_file(path: Path) -> None:
    """Raise CheckpointError unless a path names a file that can be read."""
    problem = ""
    if not path.is_file():
        problem = "is a folder: name a file" if path.is_dir() else "does not exist: check its name"
    elif not os.access(path, os.R_OK):
        problem = "cannot be read: check its rights"
    if problem:
        raise CheckpointError(f"checkpoint {path} {problem}")


def _load(path: Path) -> Any:
    """Return all that a file contains, as ``read_checkpoint`` reads it."""
    require_file(path)
    try:
        _refuse_bomb(path)
        with signals_held():
            return load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # torch's word for an object of a class outside its safe list
            raise CheckpointError(
                f"checkpoint {path} contains Python objects, which could run code and are not read: if you trust it, "
                "save its weights alone with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            ) from None
        raise _damaged(path) from None
    except Exception:  # torch's reader raises many types for a damaged pickle
        raise _damaged(path) from None


def _unwrapped(content: Any) -> tuple[Any, list[str]]:
    """Return the innermost part of a checkpoint, and remarks on the parts beside it."""
    remarks = []
    while isinstance(content, dict):
        found = [name for name in _WRAPPERS if isinstance(content.get(name), dict)]
        if not found:
            break
        if len(found) > 1:
            remarks.append(f"of its parts {', '.join(found)}, '{found[0]}' is read")
        content = content[found[0]]
    return content, remarks


def _named_as(own: Mapping[str, Tensor], state: Mapping[str, Tensor], head: str) -> tuple[State, list[str]]:
    """Return a checkpoint's tensors by the names of a model, and remarks on those that are left out.

    They keep their names if these are the model's. Otherwise the prefix under which most of its names are is removed;
    one that has not even half of them is none.
    """
    names = {name for name in own if not name.startswith(f"{head}.") and not name.endswith("num_batches_tracked")}
    names = names or set(own)  # a model of a classifier alone
    remarks: list[str] = []
    if not names <= state.keys():
        state = without_wrapping(state)
        counts = Counter(prefix for name in state for prefix in _prefixes(name, names))
        most = max(counts.values(), default=0)
        found = [prefix for prefix, count in counts.items() if count == most and 2 * most >= len(names)]
        state, remarks = take_part(state, found)
    return _with_plain_head(without_additions(state, own), own, head), remarks


def _prefixes(name: str, names: Collection[str]) -> list[str]:
    """Return what is before the names of a model in the name of a tensor: "", ``model.`` or ``ema.module.``."""
    ends = [0, *(dot.end() for _, dot in zip(range(MOST_NESTED), re.finditer(r"\.", name), strict=False))]
    return [name[:end] for end in ends if name[end:] in names]


def take_part(state: Mapping[str, Tensor], prefixes: Collection[str]) -> tuple[State, list[str]]:
    """Return the tensors under one of some prefixes by their further names, and remarks on the others.

    An average of the weights comes first, then the order of ``_WRAPPERS``; without a prefix, or with an empty one,
    tensors keep their names.
    """
    if not prefixes or "" in prefixes:
        return dict(state), []
    order = sorted(prefixes, key=_rank)
    prefix, remarks = order[0], []
    if len(order) > 1:
        remarks.append(f"of its parts {', '.join(part.rstrip('.') for part in order)}, '{prefix.rstrip('.')}' is read")
    rest = [name for name in without_additions(state) if not name.startswith(tuple(order))]
    if rest:
        remarks.append(f"its tensors outside of '{prefix.rstrip('.')}' are left out ({first_of(rest)})")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}, remarks


def _rank(prefix: str) -> tuple[bool, int]:
    part = prefix.partition(".")[0]
    return "ema" not in re.split(r"[._]", prefix), _WRAPPERS.index(part) if part in _WRAPPERS else len(_WRAPPERS)


def without_wrapping(state: Mapping[str, Tensor]) -> State:
    """Return tensors without what torch.compile, FSDP and activation checkpointing put into their names."""
    return {_WRAPPING.sub("", name): value for name, value in state.items()}


def without_additions(state: Mapping[str, Tensor], own: Collection[str] = ()) -> State:
    """Return a model's tensors without those that tools add to them; ``own`` are names that the model has."""
    return {
        name: value
        for name, value in state.items()
        if name in own or not (name.startswith(_ADDED) or name.rpartition(".")[2] in _COUNTERS)
    }


def require_whole(path: Path) -> None:
    """Raise CheckpointError if a file of safetensors is missing, or has another length than its header tells."""
    try:
        with signals_held(), safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError):
        raise CheckpointError(f"{path} is missing or damaged: copy it again") from None


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError for a decompression bomb; torch does not compress its archives."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_COMPRESSION * path.stat().st_size:
            raise ValueError(f"{unpacked} bytes when unpacked")


def _load_torch(path: Path) -> Any:
    # DeiT's and timm's checkpoints contain their arguments; torch's warnings about old formats do not help a user.
    allowed: list[Any] = [argparse.Namespace, *((_Ignored, f"numpy.{name}") for name in _OF_NUMPY)]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged or not a weights file: copy or download it again")


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, head: str, source: str) -> bool:
    """Load a checkpoint into a model completely, except a classifier of another class count, which stays new.

    A classifier that fits only in part, such as its bias, stays new as a whole. One that stands among layers without
    weights, such as ``fc.1`` behind a dropout, is that layer. If the checkpoint lacks names of the model, the prefix
    under which they are is removed, and what is beside it is left out.

    Args:
        model: Changed in place, only if the checkpoint fits.
        state: Tensors by name.
        head: Dotted name of the classifier layer, the only one that may differ or be missing.
        source: Name of the checkpoint in errors.

    Returns:
        Whether the classifier stays new.

    Raises:
        CheckpointError: Other layers are missing, unknown or of another shape.
    """
    own = model.state_dict()
    state, _ = _named_as(own, state, head)
    mismatched = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    wrong = [name for name in (*mismatched, *missing, *unexpected) if not name.startswith(f"{head}.")]
    if wrong:
        layers = {name.rpartition(".")[0] for name in (*own, *state)}
        bad = {name.rpartition(".")[0] for name in wrong}
        raise CheckpointError(
            f"checkpoint {source} is not a {type(model).__name__} of this shape: {len(bad)} of {len(layers)} layers do "
            f"not fit (first: {_difference(wrong[0], own, state)}); {_remedy(wrong, own, state)}"
        )
    new_head = any(name.startswith(f"{head}.") for name in (*mismatched, *missing))
    fitting = {
        name: value for name, value in state.items() if name in own and not (new_head and name.startswith(f"{head}."))
    }
    model.load_state_dict(fitting, strict=False)
    return new_head


def _with_plain_head(state: State, own: Collection[str], head: str) -> State:
    """Return a state whose classifier has the name ``head``, if it is a single layer at, below or around that place.

    Around is the module of ``head`` if nothing else in it has weights: ``classifier`` for ``classifier.1``.
    """
    around = head.rpartition(".")[0]
    alone = around and all(name.startswith(f"{head}.") for name in own if name.startswith(f"{around}."))
    layers = head_layers(state, around if alone else head)
    if len(layers) != 1 or layers == [head]:
        return state
    given = f"{layers[0]}."
    return {f"{head}.{name.removeprefix(given)}" if name.startswith(given) else name: state[name] for name in state}


def head_layers(state: Mapping[str, Tensor], head: str) -> list[str]:
    """Return the names of the layers with weights at and below the name of a classifier layer."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in state if name.startswith(f"{head}.")))


def _remedy(wrong: Sequence[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Return the next step: if one kernel alone has another number of input channels, it is that of the images."""
    shapes = [(tuple(state[name].shape), tuple(own[name].shape)) for name in wrong if name in own and name in state]
    if len(shapes) == len(wrong) == 1 and len(shapes[0][0]) == 4:
        theirs, ours = shapes[0]
        if theirs[:1] + theirs[2:] == ours[:1] + ours[2:] and theirs[1] in (1, 3):
            return f"it is for images of {theirs[1]} channels, so set data.channels={theirs[1]}"
    return "name the architecture of the checkpoint"


def _difference(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    sides = (("the file", state), ("the model", own))
    return f"{name}: " + ", ".join(
        f"{tuple(tensors[name].shape)} in {side}" if name in tensors else f"absent in {side}" for side, tensors in sides
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
