"""Writing files so that a reader never sees half of one. What is in them is other modules' business."""

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from deitkit.errors import CheckpointError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside ``path``, then rename; makes the folder if it is not there.

    When it returns, the file is on the disk under its name: a loss of power takes nothing back.

    Raises:
        CheckpointError: The path cannot be written; what was there before is untouched.
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
        reason = (error.strerror or str(error)).lower()
        raise CheckpointError(
            f"cannot write '{path}': {reason}; mend that, or choose another folder with --out"
        ) from error


def write_figure(path: Path, figure: "Figure", **options: Any) -> None:
    """Write a figure as its suffix says; a letter of a class's name that the font lacks is a box, without a warning.

    Raises:
        CheckpointError: As of ``write_bytes``.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from|Matplotlib currently does not support .* natively")
        figure.savefig(picture, format=path.suffix.removeprefix("."), **options)
    write_bytes(path, picture.getvalue())


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk; Windows, which cannot open folders, does it by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
