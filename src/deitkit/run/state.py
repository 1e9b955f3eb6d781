"""Saved states of a training: nested dicts and lists of tensors and plain values, with a checksum."""

import hashlib
import json
import socket
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deitkit.errors import CheckpointError, os_reason
from deitkit.system.files import write_bytes
from deitkit.system.process import TEMPORARY_FAILURE, signals_held

FORMAT = 1
# What reading a file of any content raises.
_DAMAGED = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors and plain values, with their checksum.

    Raises:
        CheckpointError: The file cannot be written; an existing file is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(tree, tensors))
    # A single entry: safetensors writes several in a random order, and equal states must give equal files.
    entry = json.dumps({"format": FORMAT, "sha256": _checksum(structure, tensors), "tree": structure})
    write_bytes(path, save(tensors, metadata={"deitkit": entry}))


class UnreadableState(CheckpointError):  # noqa: N818 - a fact, which may pass
    """A file that the system does not let this process read: it is missing, or on a disk that has a fault."""

    exit_code = TEMPORARY_FAILURE


def load_tree(path: Path) -> Any:
    """Read what ``save_tree`` wrote, on the CPU.

    Raises:
        UnreadableState: The file is missing, or the system cannot read it now.
        CheckpointError: Anything in it differs, even one bit.
    """
    try:
        path.open("rb").close()  # its error has the system's reason
        with signals_held(), safe_open(path, framework="pt") as file:
            entry = _entry(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if entry["sha256"] != _checksum(entry["tree"], tensors):
            raise ValueError("the checksum differs")
        return _decode(json.loads(entry["tree"]), tensors)
    except OSError as error:
        raise UnreadableState(f"{path} cannot be read on {socket.gethostname()}: {os_reason(error)}") from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged or is not a checkpoint of deitkit: delete it and resume again"
        ) from error


def _entry(file: safe_open) -> dict[str, Any]:
    """Return what ``save_tree`` wrote beside the tensors."""
    return json.loads((file.metadata() or {})["deitkit"])


def save_state(path: Path, tree: Any) -> None:
    """Write the state of a run with ``save_tree``, and keep the previous state as well."""
    if path.exists():
        path.replace(_before(path))
    save_tree(path, tree)


def replace_state(path: Path, tree: Any) -> None:
    """Write the state of a run with ``save_tree``, and forget the previous state."""
    save_tree(path, tree)
    _before(path).unlink(missing_ok=True)


def load_state(path: Path, say: Callable[[str], None]) -> Any:
    """Read the newest intact state that ``save_state`` wrote; return None to start from the beginning.

    If the newest state is damaged, read the previous one; if there is no previous one yet, start from the beginning.

    Args:
        path: Of the newest state.
        say: Receives a sentence for each damaged state.

    Raises:
        UnreadableState: A state cannot be read now.
        CheckpointError: The newest state is damaged or missing, and the previous one is damaged.
    """
    before = _before(path)
    there = [file for file in (path, before) if file.exists()]
    for file in there:
        try:
            tree = load_tree(file)
        except UnreadableState:
            raise
        except CheckpointError:
            say(f"{file} is damaged")
            continue
        file.replace(path)  # otherwise the next save would replace this state by the damaged one
        return tree
    if before in there:
        names = " and ".join(file.name for file in there)
        raise CheckpointError(f"{path.parent}: {names} damaged: delete them to train that part again")
    drop_state(path)
    return None


def outline(path: Path) -> Any:
    """Return what ``load_state`` would, without values of tensors and changes to files; None if it is damaged."""
    for file in (path, _before(path)):
        try:
            with signals_held(), safe_open(file, framework="pt") as opened:
                entry = _entry(opened)
            return _decode(json.loads(entry["tree"]), defaultdict(lambda: torch.empty(0)))
        except (OSError, *_DAMAGED):
            continue
    return None


def has_state(path: Path) -> bool:
    """Return whether there is a state to resume from, the newest or the previous one."""
    return path.exists() or _before(path).exists()


def drop_state(path: Path) -> None:
    """Delete the states of a finished run."""
    for file in (path, _before(path)):
        file.unlink(missing_ok=True)


def _before(path: Path) -> Path:
    return path.with_suffix(f".before{path.suffix}")


def _checksum(structure: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors, key=int):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_encode(entry, tensors) for entry in value]}
    return {"value": value}


def _decode(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(entry, tensors) for key, entry in content}
    if kind == "list":
        return [_decode(entry, tensors) for entry in content]
    return content
