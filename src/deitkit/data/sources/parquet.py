"""Images in parquet files in the layout of Hugging Face: a column of encoded images and a column of labels."""

import hashlib
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from deitkit.data.listing import EncodedImages, Listing, below_here
from deitkit.data.sources.folders import (
    TEST_NAMES,
    USUAL_SPLITS,
    SplitNames,
    remark_on_validation,
    require_same_classes,
    split_name,
)
from deitkit.errors import DataError
from deitkit.system.words import counted, display_name

_BATCH_ROWS = 256


def has_shards(folder: Path) -> bool:
    """Return whether a folder contains shards of a training split, in itself or in ``data``."""
    return "train" in _shards(folder)


def configurations(folder: Path) -> list[str]:
    """Return the subfolders with shards of a training split: configurations of a data set, or data sets."""
    return list(_configurations(folder))


def list_parquet(path: Path, splits: SplitNames = USUAL_SPLITS) -> Listing:
    """List the images in a parquet file, or in a folder of them.

    Layouts are those of the Hub's repositories: ``train-*.parquet`` or ``train/*.parquet``, also in ``data`` or in the
    folder of a configuration. The test split is ``test`` (or ``val``, ``valid``, ``validation``, the first that
    exists); beside ``test`` the first of the others is the validation split; without any there is no official test
    split, and without ``train`` too all files belong together. The images are the column with type Image in the
    schema's ``huggingface`` metadata, else a column of bytes; the labels are ``label``, ``labels``, ``fine_label`` or
    the column with type ClassLabel. Labels of a file are read by its own class names; without any, classes are named by
    the sorted labels.

    Args:
        path: A file, or a folder of them.
        splits: Names of its splits.

    Raises:
        DataError: The path does not exist or cannot be read, or a shard, a column or a label is missing or wrong.
    """
    chosen, remarks = _choose_files(path, splits)
    files = [file for part in chosen for file in part]
    columns = _columns(files[0])
    train, validation, test = ([_read_labels(file, columns) for file in part] for part in chosen)
    places = [file.relative_to(path) if file.is_relative_to(path) and file != path else file.name for file in files]
    names = [
        f"{display_name(str(place))} row {row}"
        for place, part in zip(places, train + validation + test, strict=True)
        for row in range(len(part))
    ]
    if not names:
        raise DataError(f"'{path}' contains no rows: name other files")
    labels, class_names = _number_classes(train, validation, test)
    counts = torch.tensor([sum(map(len, part)) for part in (train, validation, test)])
    part_of = torch.arange(3).repeat_interleave(counts)
    key, cache_key = _content_keys(files)
    encoded = EncodedImages(names, partial(_read_images, files, columns.image), key, cache_key=cache_key)
    return Listing(
        encoded,
        torch.from_numpy(labels),
        part_of == 2 if test else None,
        class_names,
        remarks=(*remarks, *columns.remarks),
        official_validation=part_of == 1 if validation else None,
    )


def _choose_files(path: Path, names: SplitNames) -> tuple[tuple[list[Path], list[Path], list[Path]], list[str]]:
    """Return the files to train, to validate and to test on, each with all of its shards, and remarks."""
    if path.is_file():
        return ([path], [], []), []
    if not path.is_dir():
        raise DataError(
            f"'{path}' does not exist{below_here(path)}: data.name=parquet:PATH needs a parquet file or a folder of "
            "them"
        )
    remarks = []
    shards, configurations = _shards(path), _configurations(path)
    if not shards.keys() & {"train", *TEST_NAMES} and configurations:
        chosen = next(iter(configurations)) if len(configurations) == 1 else "default"
        if chosen not in configurations:
            raise DataError(
                f"'{path}' contains the configurations {', '.join(configurations)}: name one, such as "
                f"parquet:{path / next(iter(configurations))}"
            )
        shards = configurations[chosen]
        remarks.append(f"configuration '{chosen}' of '{path.name}' is read")
    if "train" not in shards and shards.keys() & {*TEST_NAMES}:
        raise DataError(
            f"'{path}' contains parquet files of a test split but no train-*.parquet: add them, or move the test "
            "files elsewhere"
        )
    if not shards:
        raise DataError(f"'{path}' contains no train-*.parquet: name such a file, a folder of them, or folder:PATH")
    if "train" in shards:
        splits = {name: shards[name] for name in ("train", *names.more_training) if name in shards}
        test_name = next((name for name in names.test if name in shards), None)
        held_out = names.held_out(shards)
        remarks += [] if held_out is None else [remark_on_validation(held_out)]
        others = {name: files for name, files in shards.items() if name not in (*splits, held_out, test_name)}
        remarks += [f"left out: {counted(len(files), 'parquet file')} of '{name}'" for name, files in others.items()]
    else:
        splits, held_out, test_name = {"": [file for files in shards.values() for file in files]}, None, None
    validation, test = ([] if name is None else shards[name] for name in (held_out, test_name))
    for part in (*splits.values(), validation, test):
        _require_every_shard(part)
    train = [file for part in splits.values() for file in part]
    homes = {file.parent.name for file in train + validation + test}
    partial_folders = sorted(name for name in homes if name.startswith("partial-"))
    remarks += [f"the folder '{name}' has only the first part of its images" for name in partial_folders]
    return (train, validation, test), remarks


def _configurations(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the shards of each subfolder with a training split, other than ``data``: the configurations of the Hub."""
    if not folder.is_dir():
        return {}
    reserved = ("data", "train", *TEST_NAMES)
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and split_name(entry.name) not in reserved)
    found = {entry.name: _shards(entry) for entry in inner}
    return {name: shards for name, shards in found.items() if "train" in shards}


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Group the parquet files of a folder, or of ``data`` in it, by split: that of their name, else of their subfolder.

    A split's name is that of its files without their number: ``test_new-00000-of-00002.parquet`` is of ``test_new``.
    """
    if not folder.is_dir():
        return {}
    if not any(folder.glob("*.parquet")) and (folder / "data").is_dir():
        folder = folder / "data"
    shards: dict[str, list[Path]] = {}
    splits = ("train", *TEST_NAMES)
    for file in sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet"))):
        inside = file.parent != folder
        name = re.sub(r"(?<=\w)[-_.]\d+(-of-\d+)?([-_.][0-9a-f]+)?$|(?<=[a-z])\d+$", "", file.stem)
        name = split_name(name)
        if inside and _folder_split(file) in splits:
            name = _folder_split(file)
        elif inside and name in splits:
            continue  # of a configuration
        shards.setdefault(name, []).append(file)
    return shards


def _folder_split(file: Path) -> str:
    """Return the split that a shard's folder names; ``partial-train`` has the first part of a large one."""
    return split_name(file.parent.name).removeprefix("partial-")


def _require_every_shard(files: list[Path]) -> None:
    """Raise DataError if there are not N files named ``-of-N``, rather than train on part of a data set silently."""
    counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.stem))}
    if len(counts) == 1 and len(files) < max(counts):
        raise DataError(f"only {len(files)} of {max(counts)} shards of '{files[0]}' exist: download the others too")


@dataclass(frozen=True)
class _Columns:
    """Names of the columns, and remarks on their choice."""

    image: str
    label: str
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Labels:
    """The labels of a file, int64 or str, and the class names of its schema, if any."""

    file: Path
    values: np.ndarray
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.values)


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{file}' cannot be read as parquet ({error}): get it again") from None


def _columns(file: Path) -> _Columns:
    schema = _open(file).schema_arrow
    features = _features(schema)
    images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    images += [field.name for field in schema if _holds_bytes(field.type)]
    labels = [name for name in ("label", "labels", "fine_label") if name in schema.names]
    labels += [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    if not images or not labels:
        lacks = "images (bytes, or a struct with bytes)" if not images else "labels (label, labels or fine_label)"
        raise DataError(f"'{file}' has no column of {lacks} but only {', '.join(schema.names)}: rename or convert one")
    images, labels = list(dict.fromkeys(images)), list(dict.fromkeys(labels))
    image = next((name for name in ("image", "img") if name in images), images[0])
    remarks = []
    if len(images) > 1:
        remarks.append(f"of the columns of images {', '.join(images)}, '{image}' is read")
    if len(labels) > 1:
        remarks.append(f"of the columns of labels {', '.join(labels)}, '{labels[0]}' is read")
    return _Columns(image, labels[0], tuple(remarks))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the schema's ``huggingface`` metadata by column; empty if it is absent or unreadable."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature for name, feature in features.items() if name in schema.names and isinstance(feature, dict)
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_labels(file: Path, columns: _Columns) -> _Labels:
    """Return the labels of a file, with its own class names."""
    with _open(file) as opened:
        names = _features(opened.schema_arrow).get(columns.label, {}).get("names")
        class_names = tuple(display_name(str(name)) for name in names) if isinstance(names, list) else None
        twice = [name for name, count in Counter(class_names or ()).items() if count > 1]
        if twice:
            raise DataError(
                f"the class names of '{file}' contain '{twice[0]}' twice: give every class a name of its own"
            )
        missing = [name for name in (columns.image, columns.label) if name not in opened.schema_arrow.names]
        if missing:
            raise DataError(f"'{file}' has no column '{missing[0]}', unlike other files: use the same columns in all")
        try:
            column = opened.read(columns=[columns.label])[columns.label]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"'{file}' cannot be read as parquet ({error}): get it again") from None
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        first = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"{column.null_count} of {len(column)} labels in '{file}' are missing, first in row {first}: "
            "fill them in or remove the rows"
        )
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return _Labels(file, np.asarray(column.to_numpy(), dtype=np.int64), class_names)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _Labels(file, np.asarray([display_name(name) for name in column.to_pylist()], dtype=str), None)
    raise DataError(f"column '{columns.label}' of '{file}' holds {column.type}: labels must be integers or strings")


def _number_classes(
    train: list[_Labels], validation: list[_Labels], test: list[_Labels]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class of every row, and the names of the classes: those of the first file that has any.

    Raises:
        DataError: A label is out of range, or the files do not have the same classes.
    """
    parts = train + validation + test
    first = next((part for part in parts if part.class_names is not None), None)
    if first is not None and first.class_names is not None:
        return np.concatenate([_numbers(part, first, first.class_names) for part in parts]), first.class_names
    for part in parts:
        if part.values.dtype.kind != "U":
            _require_range(part, sum(len(part) for part in parts))
    if parts[0].values.dtype.kind == "U":
        names = [{str(name) for part in side for name in part.values} for side in (train, validation, test)]
        for held_out, split in zip(names[1:], ("validation", "test"), strict=True):
            if held_out:
                require_same_classes(names[0], held_out, "the training split", f"the {split} split")
    values, labels = np.unique(np.concatenate([part.values for part in parts]), return_inverse=True)
    return labels.astype(np.int64), tuple(str(value) for value in values)


def _numbers(part: _Labels, first: _Labels, class_names: tuple[str, ...]) -> np.ndarray:
    """Return the labels of a file as places in the class names of the first file."""
    places = {name: place for place, name in enumerate(class_names)}
    is_text = part.values.dtype.kind == "U"
    own = tuple(np.unique(part.values).tolist()) if is_text else part.class_names or class_names
    if set(own) - set(class_names) or not (is_text or set(own) == set(class_names)):
        raise DataError(
            f"the class names of '{part.file}' are not those of '{first.file}': use files of one data set, with equal "
            "classes"
        )
    if is_text:
        return np.array([places[name] for name in part.values.tolist()], dtype=np.int64)
    _require_range(part, len(own))
    return np.array([places[name] for name in own], dtype=np.int64)[part.values]


def _require_range(part: _Labels, classes: int) -> None:
    """Raise DataError if a label is negative, or not below the number of classes (without names: of rows)."""
    wrong = np.flatnonzero((part.values < 0) | (part.values >= classes))
    if len(wrong):
        hint = "-1 marks a split without labels"
        if (part.values.min(), part.values.max()) == (1, classes):
            hint = f"they are numbered from 1: subtract 1, so that {classes} classes are 0..{classes - 1}"
        raise DataError(
            f"{len(wrong)} of {len(part)} labels are outside 0..{classes - 1}, first {part.values[wrong[0]]} in "
            f"{part.file.name} row {wrong[0]}: correct or remove those rows ({hint})"
        )


def _read_images(files: list[Path], column: str, positions: list[int]) -> Iterator[bytes]:
    """Yield the bytes of images at ascending positions, reading only the row groups that contain them."""
    start = 0
    for file in files:
        with _open(file) as opened:
            for group in range(opened.num_row_groups):
                stop = start + opened.metadata.row_group(group).num_rows
                wanted = positions[bisect_left(positions, start) : bisect_left(positions, stop)]
                if wanted:
                    yield from _read_group(opened, group, column, [position - start for position in wanted], file)
                start = stop


def _read_group(opened: pq.ParquetFile, group: int, column: str, rows: list[int], file: Path) -> Iterator[bytes]:
    start = 0
    try:
        for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
            stop = start + len(batch)
            wanted = [row - start for row in rows[bisect_left(rows, start) : bisect_left(rows, stop)]]
            images = batch.column(column).take(pa.array(wanted, pa.int64()))
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            yield from (image.as_py() or b"" for image in images)
            start = stop
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{file}' cannot be read as parquet ({error}): get it again") from None


def _content_keys(files: list[Path]) -> tuple[str, str]:
    """Return ``EncodedImages.key`` and ``cache_key``."""
    found = [(str(file.resolve()), file.stat()) for file in files]
    parts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    more = [(*part, stat.st_ctime_ns, stat.st_ino) for part, (_, stat) in zip(parts, found, strict=True)]
    key, cache_key = (hashlib.sha256(repr(some).encode()).hexdigest() for some in (parts, more))
    return key, cache_key
