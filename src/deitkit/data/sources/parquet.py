"""Images in parquet files in the layout of Hugging Face: a column of encoded images and a column of labels."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from deitkit.data.listing import EncodedImages, Listing
from deitkit.data.sources.folders import TEST_NAMES, require_same_classes
from deitkit.errors import DataError

_BATCH_ROWS = 256


def has_shards(folder: Path) -> bool:
    """Return whether a folder contains shards of a training split."""
    return bool(_shards(folder).get("train"))


def list_parquet(path: Path, *, test_names: Sequence[str] = TEST_NAMES, more_training: Sequence[str] = ()) -> Listing:
    """List the images in a parquet file, or in a folder of them.

    In a folder, the test split of ``train-*.parquet`` is ``test-*.parquet`` (or ``val``, ``valid``, ``validation``, the
    first that exists). Without any of them, and if no file name has a split, there is no official test split. The
    images are the column with type Image in the schema's ``huggingface`` metadata, else a column of bytes; the labels
    are ``label``, ``labels``, ``fine_label`` or the column with type ClassLabel. Class names come from the metadata,
    else from the sorted strings of a column of strings, else they are "0", "1", ...

    Args:
        path: A file, or a folder of them.
        test_names: Possible names of the test split, for data sets whose ``test`` has no labels.
        more_training: Splits that are added to the training images, if they exist.

    Raises:
        DataError: The path does not exist or cannot be read, or a shard, a column or a label is missing or wrong.
    """
    train_files, test_files = _choose_files(path, test_names, more_training)
    files = train_files + test_files
    columns = _columns(files[0])
    train, test = ([_read_labels(file, columns) for file in part] for part in (train_files, test_files))
    names = [
        f"{name} row {row}"
        for name, part in zip([file.name for file in files], train + test)
        for row in range(len(part))
    ]
    if not names:
        raise DataError(f"'{path}' contains no rows: name other files")
    labels, class_names = _number_classes(train, test, columns, names)
    is_test = torch.arange(len(labels)) >= sum(len(column) for column in train)
    encoded = EncodedImages(names, partial(_read_images, files, columns.image), _content_key(files))
    return Listing(encoded, torch.from_numpy(labels), is_test if test else None, class_names)


def _choose_files(path: Path, test_names: Sequence[str], more_training: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those to test on, each with all of its shards."""
    if path.is_file():
        splits, test = [[path]], []
    elif path.is_dir():
        shards = _shards(path)
        if "train" not in shards and "" not in shards:
            raise DataError(f"'{path}' contains no train-*.parquet: name such a file, a folder of them, or folder:PATH")
        if "train" not in shards and len(shards) > 1:
            raise DataError(
                f"'{path}' contains parquet files of a test split but no train-*.parquet: add them, or move the test "
                "files elsewhere"
            )
        splits = [shards[name] for name in ("train", *more_training) if name in shards] or [shards[""]]
        test = next((shards[name] for name in test_names if name in shards), [])
    else:
        raise DataError(f"'{path}' does not exist: data.name=parquet:PATH needs a parquet file or a folder of them")
    for part in (*splits, test):
        _require_every_shard(part)
    return [file for part in splits for file in part], test


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Group the parquet files of a folder, or of ``data`` in it, by split; "" for file names without a split."""
    if not folder.is_dir():
        return {}
    if not any(folder.glob("*.parquet")) and (folder / "data").is_dir():
        folder = folder / "data"
    shards: dict[str, list[Path]] = {}
    for file in sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet"))):
        match = re.match(rf"(train|{'|'.join(TEST_NAMES)})(?![a-z0-9])", str(file.relative_to(folder)))
        shards.setdefault(match[1] if match else "", []).append(file)
    return shards


def _require_every_shard(files: list[Path]) -> None:
    """Raise DataError if there are not N files named ``-of-N``, rather than train on part of a data set silently."""
    counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.stem))}
    if len(counts) == 1 and len(files) < max(counts):
        raise DataError(f"only {len(files)} of {max(counts)} shards of '{files[0]}' exist: download the others too")


@dataclass(frozen=True)
class _Columns:
    """Names of the columns; ``class_names`` is None if the schema has none."""

    image: str
    label: str
    class_names: tuple[str, ...] | None


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
    names = features.get(labels[0], {}).get("names")
    return _Columns(images[0], labels[0], tuple(str(name) for name in names) if isinstance(names, list) else None)


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


def _read_labels(file: Path, columns: _Columns) -> np.ndarray:
    """Return the labels of a file, int64 or str."""
    with _open(file) as opened:
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
        return np.asarray(column.to_numpy(), dtype=np.int64)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.asarray(column.to_pylist(), dtype=str)
    raise DataError(f"column '{columns.label}' of '{file}' holds {column.type}: labels must be integers or strings")


def _number_classes(
    train: list[np.ndarray], test: list[np.ndarray], columns: _Columns, row_names: list[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    labels = np.concatenate(train + test)
    if labels.dtype.kind == "U":
        if test:
            require_same_classes(
                {str(name) for column in train for name in column}, {str(name) for column in test for name in column},
                "the training split", "the test split",
            )  # fmt: skip
        names, labels = np.unique(labels, return_inverse=True)
        return labels.astype(np.int64), tuple(names.tolist())
    classes = len(columns.class_names) if columns.class_names is not None else len(labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} of {len(labels)} labels are outside 0..{classes - 1}, first {labels[wrong[0]]} in "
            f"{row_names[wrong[0]]}: correct or remove those rows (-1 marks a split without labels)"
        )
    return labels, columns.class_names or tuple(str(label) for label in range(int(labels.max()) + 1))


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


def _content_key(files: list[Path]) -> str:
    parts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
