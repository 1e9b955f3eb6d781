"""A disk cache of decoded images, so that a data set is decoded once. It may be deleted at any time."""

import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deitkit.recipe.section import from_home
from deitkit.system.process import signals_held


def cache_folder() -> Path:
    """Return the cache folder: ``$DEITKIT_CACHE``, else ``~/.cache/deitkit/decoded``."""
    return from_home(Path(os.environ.get("DEITKIT_CACHE") or "~/.cache/deitkit/decoded"))


def sha256(*tensors: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, over shape, type and content of tensors in memory."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.contiguous().numpy()
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load_cached(key: str) -> tuple[dict[str, Tensor], list[str]] | None:
    """Return the tensors and names stored under a key; None if there is no file or it is damaged."""
    path = cache_folder() / f"{key}.safetensors"
    try:
        with signals_held(), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        names = json.loads(metadata["names"])
        intact = metadata["checksum"] == _checksum(tensors)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (tensors, names) if intact else None


def store(key: str, tensors: dict[str, Tensor], names: list[str]) -> None:
    """Store tensors and names under a key; do nothing if the folder cannot be written, or a copy exceeds the memory."""
    if sum(tensor.nbytes for tensor in tensors.values()) > 0.9 * psutil.virtual_memory().available:
        return  # safetensors copies everything before it writes
    metadata = {"names": json.dumps(names), "checksum": _checksum(tensors)}
    temporary: Path | None = None
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=cache_folder())
        os.close(handle)
        temporary = Path(name)
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(cache_folder() / f"{key}.safetensors")
    except (OSError, SafetensorError):
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return a checksum against accidental damage: CRC-32, since a SHA-256 takes longer than reading the file."""
    return " ".join(str(zlib.crc32(tensors[name].numpy().reshape(-1).data)) for name in sorted(tensors))
