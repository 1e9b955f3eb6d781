"""States of a training that goes on later: nested dicts and lists of tensors and plain values, with a checksum."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deitkit.errors import CheckpointError
from deitkit.system.files import write_bytes

FORMAT = 1


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors and plain values, with their checksum.

    Raises:
        CheckpointError: The disk does not take them; what was there before is untouched.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(tree, tensors))
    # In one entry: safetensors writes several in a random order, and equal states are to be equal files.
    entry = json.dumps({"format": FORMAT, "sha256": _checksum(structure, tensors), "tree": structure})
    write_bytes(path, save(tensors, metadata={"deitkit": entry}))


def load_tree(path: Path) -> Any:
    """Read what ``save_tree`` wrote, on the CPU; CheckpointError for anything else, be it one bit."""
    try:
        with safe_open(path, framework="pt") as file:
            entry = json.loads((file.metadata() or {})["deitkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if entry["sha256"] != _checksum(entry["tree"], tensors):
            raise ValueError("the checksum differs")
        return _decode(json.loads(entry["tree"]), tensors)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of deitkit: delete it and resume again") from error


def save_state(path: Path, tree: Any) -> None:
    """Write the state of a run as ``save_tree`` does, and keep the one before it as well."""
    if path.exists():
        path.replace(_before(path))
    save_tree(path, tree)


def load_state(path: Path, say: Callable[[str], None]) -> Any:
    """Read the newest state that ``save_state`` wrote and that is whole; None if there is none to go on from.

    A damaged state gives way to the one before it, and the very first, after which there is but one, to the beginning.

    Args:
        path: Of the newest.
        say: Is told in a sentence of a damaged one.

    Raises:
        CheckpointError: The newest is damaged or gone, and so is the one before.
    """
    before = _before(path)
    there = [file for file in (path, before) if file.exists()]
    for file in there:
        try:
            tree = load_tree(file)
        except CheckpointError:
            say(f"{file} is damaged")
            continue
        file.replace(path)  # or the next save would put the damaged one in the place of this
        return tree
    if before in there:
        names = " and ".join(file.name for file in there)
        raise CheckpointError(f"{path.parent}: {names} damaged: delete them, and what they held is trained again")
    drop_state(path)
    return None


def drop_state(path: Path) -> None:
    """Delete the states of a run that has come to its end."""
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
