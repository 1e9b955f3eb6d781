"""Images in class folders: ``train/<class>/*`` with ``test/<class>/*``, or ``<class>/*``."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from deitkit.data.decode import SUFFIXES
from deitkit.data.listing import EncodedImages, Listing, below_here
from deitkit.errors import DataError
from deitkit.system.words import counted, display_name, first_of

TEST_NAMES = ("test", "val", "valid", "validation")
VALIDATION_NAMES = TEST_NAMES[1:]
_SPLIT_WORDS = {"train", "training", "test", "testing", *VALIDATION_NAMES}
_SPELLINGS = {"training": "train", "testing": "test"}


@dataclass(frozen=True)
class SplitNames:
    """Which folders or files of a data set are its splits, beside ``train``.

    Attributes:
        test: The first of these is the test split.
        validation: The first of these is held out for validation, beside a split named ``test``.
        more_training: All of these are added to the training images.
    """

    test: tuple[str, ...] = TEST_NAMES
    validation: tuple[str, ...] = VALIDATION_NAMES
    more_training: tuple[str, ...] = ()

    def held_out(self, names: Collection[str]) -> str | None:
        """Return which of the splits with these names is for validation, or None."""
        return next((name for name in self.validation if name in names), None) if "test" in names else None


USUAL_SPLITS = SplitNames()
WITHOUT_VALIDATION = SplitNames(validation=())
TESTED_ON_VALIDATION = SplitNames(VALIDATION_NAMES, ())  # of sets in whose ``test`` images have no labels


def split_name(name: str) -> str:
    """Return the name of a split in its usual spelling: ``train`` for ``Training``."""
    return _SPELLINGS.get(name.lower(), name.lower())


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders in a folder by their names, sorted; empty if the folder does not exist.

    Raises:
        DataError: Two names differ only in their Unicode form.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not _is_hidden(entry):
            if display_name(entry.name) in found:
                raise DataError(
                    f"'{folder}' contains two folders '{display_name(entry.name)}', in two Unicode forms: merge them"
                )
            found[display_name(entry.name)] = entry
    return dict(sorted(found.items()))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def list_folder(folder: Path, splits: SplitNames = USUAL_SPLITS) -> Listing:
    """List the images in class folders and their subfolders; classes are numbered in the order of their sorted names.

    The test split of ``train/<class>/*`` is the first of ``test``, ``val``, ``valid`` and ``validation`` that exists,
    also as ``Testing``; beside ``test`` the first of the others is the validation split. Without any of them, and if
    the class folders are in ``folder`` itself, there is no official test split. Hidden files and folders are ignored;
    what else is left out is counted in the remarks.

    Args:
        folder: The folder of the data set.
        splits: Names of its splits.

    Raises:
        DataError: The folder does not exist, a class has no images, or train and test differ in their classes.
    """
    if not folder.is_dir():
        needs = "data.name=folder:PATH needs <class>/* or train/<class>/* in PATH"
        raise DataError(f"folder '{folder}' does not exist{below_here(folder)}: {needs}")
    train, validation, test, remarks = _parts(folder, splits)
    class_names = tuple(class_folders(train[0]))
    if not class_names:
        advice = _other_source(folder) or "arrange the images as <class>/* or train/<class>/*"
        raise DataError(f"'{folder}' contains no class folders: {advice}")
    for part in (*train[1:], *test):
        require_same_classes(set(class_names), set(class_folders(part)), f"'{train[0]}'", f"'{part}'")
    left_out: Counter[str] = Counter()
    listed = [
        (path, label, part)
        for part in (*train, *validation, *test)
        for path, label in _list_part(part, folder, left_out)
    ]
    if left_out:
        remarks.append(_remark(left_out))
    files, labels, parts = zip(*listed, strict=True)
    return Listing(
        encoded_files(folder, list(files)),
        torch.tensor(labels),
        torch.tensor([part in test for part in parts]) if test else None,
        class_names,
        remarks=tuple(remarks),
        official_validation=torch.tensor([part in validation for part in parts]) if validation else None,
    )


def _parts(folder: Path, splits: SplitNames) -> tuple[list[Path], list[Path], list[Path], list[str]]:
    """Return the folders of classes to train on, that to validate on and that to test on, if any, and remarks."""
    named = {split_name(name): path for name, path in reversed(class_folders(folder).items())}
    named = {name: path for name, path in named.items() if class_folders(path)}
    if "train" not in named:
        if named and all(_SPLIT_WORDS.intersection(re.split(r"[^a-z]+", name)) for name in named):
            raise DataError(
                f"'{folder}' contains {first_of(list(map(repr, sorted(named))))}, which look like splits and would be "
                "the classes: name the folder of the training images 'train', and the others 'test' and 'val'"
            )
        return [folder], [], [], []
    remarks = []
    train = [named[name] for name in ("train", *splits.more_training) if name in named]
    test = [named[name] for name in splits.test if name in named][:1]
    held_out = splits.held_out(named)
    if held_out is not None and class_folders(named[held_out]).keys() != class_folders(train[0]).keys():
        remarks.append(other_classes(held_out))
        held_out = None
    validation = [] if held_out is None else [named[held_out]]
    used = (*train, *validation, *test)
    others = [name for name, path in class_folders(folder).items() if path not in used]
    remarks += [] if held_out is None else [remark_on_validation(held_out)]
    remarks += [f"left out: folder '{name}' of '{display_name(folder.name)}'" for name in others]
    return train, validation, test, remarks


def other_classes(name: str) -> str:
    """Say that a validation split is not used, since it has other classes than the training split."""
    return f"'{name}' has other classes than 'train', so the validation images are taken from 'train'"


def remark_on_validation(name: str) -> str:
    """Say that a data set has a validation split of its own."""
    return f"the validation images are those of '{name}', instead of data.validation_fraction of the training images"


def _list_part(part: Path, folder: Path, left_out: Counter[str]) -> Iterator[tuple[Path, int]]:
    """Yield the images in the class folders of a part of a folder with their labels, and count what else is there."""
    beside = (path for path in part.iterdir() if path.is_file() and not _is_hidden(path))
    left_out.update(path.suffix.lower() or "no ending" for path in beside)
    for label, home in enumerate(class_folders(part).values()):
        images = _images(home, left_out)
        if not images:
            advice = _other_source(folder) or "add some or remove the folder"
            raise DataError(f"class folder {_no_images(home, advice)}")
        yield from ((path, label) for path in images)


def list_images(folder: Path) -> Listing:
    """List all images below a folder, without labels (-1); raise DataError if there is none."""
    if not folder.is_dir():
        raise DataError(
            f"folder '{folder}' does not exist{below_here(folder)}: data.unlabelled=folder:PATH needs images in PATH"
        )
    left_out: Counter[str] = Counter()
    files = _images(folder, left_out)
    if not files:
        raise DataError(f"data.unlabelled=folder:{_no_images(folder, 'add some')}")
    remarks = [_remark(left_out)] if left_out else []
    return Listing(encoded_files(folder, files), torch.full((len(files),), -1), None, (), remarks=tuple(remarks))


def _remark(left_out: Counter[str]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5))
    return f"left out, as no image of a class: {counted(sum(left_out.values()), 'file')} ({kinds})"


def encoded_files(folder: Path, files: list[Path], remedy: str = "unpack the archive there again") -> EncodedImages:
    """Return images that are separate files, named from a folder; raise DataError with a remedy if some are missing."""
    inside = [path.relative_to(folder) if path.is_relative_to(folder) else path for path in files]
    names, missing = [display_name(str(path)) for path in inside], []

    def read(positions: list[int]) -> Iterator[Path | bytes]:
        return (files[position] for position in positions)

    digest, stored = (hashlib.sha256(repr(folder.resolve()).encode()) for _ in range(2))
    for name, path in zip(names, files, strict=True):
        try:
            stat = _stat(path)
        except FileNotFoundError:
            missing.append(name)
            continue
        digest.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
        # Files from an archive may all have one size and date, and then change places.
        stored.update(repr((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)).encode())
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} images are not in '{folder}', such as '{missing[0]}': {remedy}"
        )
    return EncodedImages(names, read, digest.hexdigest(), files, stored.hexdigest())


def require_same_classes(train: set[str], test: set[str], train_place: str, test_place: str) -> None:
    """Raise DataError if train and test differ in their classes, with the names that one of them lacks."""
    missing = [(test_place, train - test), (train_place, test - train)]
    lacks = [f"{place} lacks {first_of(list(map(repr, sorted(names))))}" for place, names in missing if names]
    if lacks:
        raise DataError(
            f"train and test must have the same classes, but {' and '.join(lacks)}: add them or remove them"
        )


def _stat(path: Path) -> os.stat_result:
    """Return the status of a file or of a broken link; raise FileNotFoundError if there is neither."""
    try:
        return path.stat()
    except OSError:
        return path.lstat()


def _is_broken_link(path: Path) -> bool:
    """Return whether a path is a link to a missing file, or to itself."""
    return path.is_symlink() and not os.path.exists(path)  # noqa: PTH110 - Path.exists raises on a loop before 3.12


def _images(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the images in a folder and its subfolders, and count its other files by their ending."""
    images = []
    for path in files_below(folder):
        if path.suffix.lower() in SUFFIXES and (path.is_file() or _is_broken_link(path)):
            images.append(path)
        else:
            left_out["linked folder" if path.is_dir() else path.suffix.lower() or "no ending"] += 1
    return sorted(images)


def _no_images(folder: Path, advice: str) -> str:
    kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"'{folder}' contains no images ({kinds}): {advice}"


def _other_source(folder: Path) -> str:
    """Return how a folder without images of a class is to be named, by the files in it; empty if they do not say."""
    kinds: dict[str, list[Path]] = {}
    for path in files_below(folder):
        kinds.setdefault(path.suffix.lower(), []).append(path)
    if SUFFIXES & kinds.keys():
        return ""
    if ".parquet" in kinds:
        return f"it holds parquet files, so write data.name=parquet:{folder}"
    if ".csv" in kinds:
        return f"it holds a CSV file, so write data.name=csv:{min(kinds['.csv'])}"
    if ".safetensors" in kinds:
        return "it holds weights and no images, so name the folder of your images"
    return ""


def files_below(folder: Path) -> Iterator[Path]:
    """Yield everything in a folder and its subfolders that is not a folder, and links to folders; nothing hidden.

    Raises:
        OSError: A folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(Path(name))]
        links = [name for name in folders if Path(place, name).is_symlink()]  # which are not entered
        yield from (Path(place, name) for name in (*links, *files) if not _is_hidden(Path(name)))
