"""Images in class folders: ``train/<class>/*`` with ``test/<class>/*``, or ``<class>/*``."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from deitkit.data.decode import SUFFIXES
from deitkit.data.listing import EncodedImages, Listing
from deitkit.errors import DataError

TEST_NAMES = ("test", "val", "valid", "validation")


def has_class_folders(folder: Path) -> bool:
    """Return whether there is a ``train`` folder with class folders in it."""
    return bool(_subfolders(folder / "train"))


def list_folder(folder: Path) -> Listing:
    """List the images in class folders; classes are numbered in the order of their sorted names.

    ``train/<class>/*`` goes with ``test``, ``val``, ``valid`` or ``validation``, the first that is there; without any,
    and where class folders lie in ``folder`` itself, there is no official test split. Hidden files and folders, and
    files of other kinds, are ignored.

    Raises:
        DataError: There is no such folder, a class holds no images, or train and test differ in their classes.
    """
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}': data.name=folder:PATH needs <class>/* or train/<class>/* in PATH"
        )
    train, test = folder, None
    if has_class_folders(folder):
        train = folder / "train"
        test = next((folder / name for name in TEST_NAMES if _subfolders(folder / name)), None)
    class_names = _subfolders(train)
    if not class_names:
        raise DataError(f"'{folder}' holds no class folders: lay the images out as <class>/* or train/<class>/*")
    if test is not None:
        require_same_classes(set(class_names), set(_subfolders(test)), f"'{train}'", f"'{test}'")
    files: list[Path] = []
    labels: list[int] = []
    is_test: list[bool] = []
    for part in (train,) if test is None else (train, test):
        for label, name in enumerate(class_names):
            images = _images(part / name)
            files += images
            labels += [label] * len(images)
            is_test += [part is test] * len(images)
    return Listing(
        EncodedImages(
            [str(path.relative_to(folder)) for path in files], _reader(files), _content_key(folder, files), files
        ),
        torch.tensor(labels, dtype=torch.int64),
        None if test is None else torch.tensor(is_test),
        tuple(class_names),
    )


def require_same_classes(train: set[str], test: set[str], train_place: str, test_place: str) -> None:
    """Raise DataError if train and test differ in their classes, naming those that one of them lacks."""
    lacks = [(test_place, sorted(train - test)), (train_place, sorted(test - train))]
    told = [f"{place} lacks {_shown(names)}" for place, names in lacks if names]
    if told:
        raise DataError(f"train and test must have the same classes, but {' and '.join(told)}: add them or remove them")


def _shown(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    images = sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )
    if not images:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise DataError(f"class folder '{folder}' holds no images ({kinds}): add some or remove the folder")
    return images


def _reader(files: list[Path]) -> Callable[[list[int]], Iterator[Path | bytes]]:
    def read(positions: list[int]) -> Iterator[Path | bytes]:
        return (files[position] for position in positions)

    return read


def _content_key(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(repr(folder.resolve()).encode())
    for path in files:
        stat = path.stat()
        digest.update(repr((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()
