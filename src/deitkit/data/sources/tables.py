"""Images listed in a CSV file: a path and a label in each row, and optionally a split and a group."""

import csv
import os
import re
import unicodedata
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from deitkit.data.listing import Listing, below_here
from deitkit.data.sources.folders import (
    TEST_NAMES,
    USUAL_SPLITS,
    encoded_files,
    other_classes,
    remark_on_validation,
    require_same_classes,
    split_name,
)
from deitkit.errors import DataError
from deitkit.system.words import counted, display_name

# Spellings of each column, in any case of letters.
_COLUMNS = {
    "path": ("path", "image", "file", "filename", "file_name", "image_path", "filepath"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "subset", "partition"),
    "group": ("group", "group_id", "patient", "patient_id", "subject"),
}


def list_csv(path: Path) -> Listing:
    """List the images of a CSV file with a header, in UTF-8; paths are relative to its folder.

    Columns are ``path`` and ``label``, in their usual spellings; ``split`` names the split of each row (``train``, and
    one of ``test``, ``val``, ``valid``, ``validation``), ``group`` what must not be on both sides of a split, such as a
    patient. Others are left out and named.

    Raises:
        DataError: The file is missing or not a CSV file; a column, a label or an image is missing; an image has two
            labels; a split is unknown; a class or a group is in only one, or in both, of train and test.
    """
    rows, columns = _read(path)
    spelled = {meaning: _column(columns, meaning) for meaning in _COLUMNS}
    for meaning in ("path", "label"):
        if spelled[meaning] is None:
            spellings = " or ".join(_COLUMNS[meaning][:3])
            raise DataError(f"'{path}' has no column '{meaning}' (it has {_shown(columns)}): name one {spellings}")
    values = {
        meaning: [display_name((row[column] or "").strip()) for row in rows]
        for meaning, column in spelled.items()
        if column is not None
    }
    for meaning, cells in values.items():
        if "" in cells:
            raise DataError(f"'{path}' has no {meaning} in row {cells.index('') + 2}: fill it in or remove the row")
    _require_one_label(values["path"], values["label"], path)
    splits = [split_name(name) for name in values.get("split", [])]
    parts, remarks = _divide(splits, values["label"], path)
    kept = sorted(place for places in parts.values() for place in places)
    class_names = _sorted_classes({values["label"][place] for place in kept})
    _require_parts(values, parts, path)
    others = [column for column in columns if column not in spelled.values()]
    if others:
        remarks.append(f"left out: {counted(len(others), 'column')} of '{path.name}' ({', '.join(others[:5])})")
    numbers = {name: number for number, name in enumerate(class_names)}
    files = [row[spelled["path"] or ""].strip() for row in rows]
    groups = None
    if "group" in values:
        numbered = {name: number for number, name in enumerate(dict.fromkeys(values["group"]))}
        groups = torch.tensor([numbered[values["group"][place]] for place in kept])
    return Listing(
        encoded_files(
            path.parent,
            [_as_spelled(path.parent, files[place]) for place in kept],
            f"correct the paths in '{path.name}', which start from its folder unless they are absolute",
        ),
        torch.tensor([numbers[values["label"][place]] for place in kept]),
        _are_in(parts["test"], kept),
        tuple(class_names),
        remarks=tuple(remarks),
        groups=groups,
        official_validation=_are_in(parts["validation"], kept),
    )


def _are_in(part: Sequence[int], kept: Sequence[int]) -> Tensor | None:
    """Return which of the rows are in a part; None if none is."""
    return torch.isin(torch.tensor(kept), torch.tensor(part)) if part else None


def _sorted_classes(names: set[str]) -> list[str]:
    """Return the names of classes in order: of whole numbers by their value, as parquet files and their authors do."""
    numbers = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names)


def _as_spelled(folder: Path, name: str) -> Path:
    """Return the path of a file as it is spelled: on one system an accent is a character of its own, on another not."""
    path = folder / name
    if name.isascii() or os.path.lexists(path):
        return path
    others = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.lexists(other)), path)


def _read(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    if not path.is_file():
        raise DataError(
            f"'{path}' does not exist{below_here(path)}: data.name=csv:FILE needs a CSV file with the columns path and "
            "label"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.read(4096)
            file.seek(0)
            delimiter = max(",;\t", key=start.partition("\n")[0].count)
            reader = csv.DictReader(file, delimiter=delimiter)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is not a CSV file in UTF-8 ({error}): save it as one") from None
    if not rows:
        raise DataError(f"'{path}' has no rows: list an image in each, with the columns path and label")
    long = next((number for number, row in enumerate(rows) if None in row), None)
    if long is not None:
        raise DataError(f"'{path}' has more values than columns in row {long + 2}: quote values with a '{delimiter}'")
    return rows, columns


def _column(columns: Sequence[str], meaning: str) -> str | None:
    """Return the column with a meaning, by the first of its spellings that occurs; of equal ones the first."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    return next((lower[name] for name in _COLUMNS[meaning] if name in lower), None)


def _require_one_label(paths: Sequence[str], labels: Sequence[str], path: Path) -> None:
    first: dict[str, str] = {}
    for image, label in zip(paths, labels, strict=True):
        other = first.setdefault(os.path.normpath(path.parent / image), label)  # ./0.png is 0.png
        if other != label:
            raise DataError(f"'{path}' has '{image}' as '{other}' and as '{label}': an image has one class here")


def _divide(splits: Sequence[str], labels: Sequence[str], path: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Return the rows of ``train``, ``validation`` and ``test``, which may have none, and remarks."""
    if not splits:
        return {"train": list(range(len(labels))), "validation": [], "test": []}, []
    unknown = next((name for name in splits if name not in ("train", *TEST_NAMES)), None)
    if unknown is not None:
        raise DataError(f"'{path}' has the split '{unknown}': write train, or one of {', '.join(TEST_NAMES)}")
    if "train" not in splits:
        raise DataError(f"'{path}' has no row of the split 'train': add some, or remove the column")
    test = next((name for name in TEST_NAMES if name in splits), None)
    validation, remarks = USUAL_SPLITS.held_out(splits), []
    if validation is not None:
        pairs = {*zip(splits, labels, strict=True)}
        own, train = ({label for split, label in pairs if split == name} for name in (validation, "train"))
        same = own == train
        remarks.append(remark_on_validation(validation) if same else other_classes(validation))
        validation = validation if same else None
    named = {"train": "train", "validation": validation, "test": test}
    parts = {part: [place for place, name in enumerate(splits) if name == own] for part, own in named.items()}
    for name in sorted(set(splits).difference(named.values())):
        remarks.append(f"left out: {counted(splits.count(name), 'row')} of the split '{name}'")
    return parts, remarks


def _require_parts(values: dict[str, list[str]], parts: dict[str, list[int]], path: Path) -> None:
    """Raise DataError if two splits differ in their classes, or share a group."""
    train, test = ({values["label"][place] for place in parts[name]} for name in ("train", "test"))
    if test:
        require_same_classes(train, test, f"the split 'train' of '{path}'", "its test split")
    for one, other in combinations(parts if "group" in values else (), 2):
        shared = {values["group"][place] for place in parts[one]} & {values["group"][place] for place in parts[other]}
        if shared:
            groups = counted(len(shared), "group")
            raise DataError(f"'{path}' has {groups} in {one} and in {other}, such as '{min(shared)}': put each in one")


def _shown(columns: Sequence[str]) -> str:
    return ", ".join(f"'{column}'" for column in columns[:6]) + (", ..." if len(columns) > 6 else "")
