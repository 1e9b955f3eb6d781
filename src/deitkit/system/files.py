"""Atomic writes: a reader never sees a partly written file. The formats belong to other modules."""

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from deitkit.errors import CheckpointError, os_reason

LEFT_OVER_SECONDS = 900.0  # without a write, after which a temporary file is that of a killed process


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value as indented text; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_temporary(path: Path) -> bool:
    """Return whether a file has the name of one that ``write_bytes`` is writing, or was when its process was killed."""
    return re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name) is not None


def delete_left_over(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder and those in it, long enough ago that none writes."""
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):  # its process may have ended just now
            if is_temporary(path) and time.time() - path.stat().st_mtime > LEFT_OVER_SECONDS:
                path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary file in the same folder, then rename it; create the folder if it does not exist.

    Synchronise file and folder with the disk, so that a loss of power after the return does not undo the write.

    Raises:
        CheckpointError: The path cannot be written; an existing file is unchanged.
    """
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # the rename must not reach the disk before the data
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write '{path}': {os_reason(error)}; correct this, then start it again, a run with --resume"
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; see `write_bytes`."""
    write_bytes(target, source.read_bytes())


def _sync_folder(folder: Path) -> None:
    """Synchronise a rename with the disk; Windows cannot open folders and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
