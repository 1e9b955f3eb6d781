"""Parquet folders as the Hub and people lay them out: splits, configurations, columns and class names."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deitkit.data.listing import EncodedImages
from deitkit.data.sources.folders import WITHOUT_VALIDATION
from deitkit.data.sources.parquet import configurations, has_shards, list_parquet
from deitkit.errors import DataError

NAMES = ["ant", "bee", "cat"]


def write(path: Path, labels: list[Any], names: list[str] | None = None, **more: list[Any]) -> None:
    """Write a parquet file with an image column of bytes, labels, class names, and further columns."""
    columns: dict[str, list[Any]] = {"image": [b"image"] * len(labels), "label": labels} | more
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def splits(folder: Path, **options: Any) -> tuple[int, int | None]:
    """Return how many images are listed, and how many of them belong to the official test split."""
    listing = list_parquet(folder, **options)
    return len(listing.labels), None if listing.official_test is None else int(listing.official_test.sum())


@pytest.mark.parametrize("order", [["ant", "bee", "cat"], ["cat", "ant", "bee"], ["bee", "cat", "ant"]])
def test_each_file_is_read_by_its_own_class_names(tmp_path: Path, order: list[str]) -> None:
    write(tmp_path / "train-0.parquet", [0, 1, 2, 0], NAMES)
    write(tmp_path / "train-1.parquet", [0, 1, 2], order)
    write(tmp_path / "test-0.parquet", [0, 1, 2], order)
    listing = list_parquet(tmp_path)
    assert listing.class_names == tuple(NAMES)
    assert [NAMES[label] for label in listing.labels.tolist()] == ["ant", "bee", "cat", "ant", *order, *order]


def test_files_of_other_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1, 2], NAMES)
    write(tmp_path / "test-0.parquet", [0, 1, 2], ["ant", "bee", "dog"])
    with pytest.raises(DataError, match=r"class names of '.*test-0.parquet' are not those of '.*train-0.parquet'"):
        list_parquet(tmp_path)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1, 2], ["ant", "caf\u00e9", "cafe\u0301"])
    with pytest.raises(DataError, match="contain 'caf\u00e9' twice: give every class a name of its own"):
        list_parquet(tmp_path)


def test_strings_and_named_numbers_are_the_same_classes(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1, 2], NAMES)
    write(tmp_path / "test-0.parquet", ["cat", "ant", "bee"])
    assert list_parquet(tmp_path).labels.tolist() == [0, 1, 2, 2, 0, 1]


def test_numbers_without_names_are_named_by_themselves_and_may_start_at_one(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [1, 2, 3, 1])
    listing = list_parquet(tmp_path)
    assert listing.class_names == ("1", "2", "3")
    assert listing.labels.tolist() == [0, 1, 2, 0]


def test_named_numbers_that_start_at_one_are_refused_with_the_cause(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [1, 2, 3, 3], NAMES)
    with pytest.raises(DataError, match=r"numbered from 1: subtract 1, so that 3 classes are 0\.\.2"):
        list_parquet(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], (6, 3)),
        (["train-00000-of-00001-0a1b2c.parquet", "test-00000-of-00001-ff00aa.parquet"], (6, 3)),
        (["train.parquet", "validation.parquet"], (6, 3)),
        (["data/train-0.parquet", "data/test-0.parquet"], (6, 3)),
        (["train/0000.parquet", "test/0000.parquet"], (6, 3)),
        (["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"], (6, 3)),
        (["default/train/0000.parquet", "default/test/0000.parquet"], (6, 3)),
        (["default/train-0.parquet", "default/test-0.parquet", "other/train-0.parquet"], (6, 3)),
        (["train-0.parquet", "test_corrupted-0.parquet"], (3, None)),
        (["train-0.parquet", "test-0.parquet", "tested-0.parquet", "testing_extra-0.parquet"], (6, 3)),
        (["train-0.parquet", "train_unlabelled-0.parquet"], (3, None)),
        (["images-0.parquet", "images-1.parquet"], (6, None)),
        (["part1/images.parquet", "part2/images.parquet"], (6, None)),
        (["partial-train/0000.parquet", "partial-test/0000.parquet"], (6, 3)),
    ],
)
def test_splits_are_found_by_their_whole_name(tmp_path: Path, files: list[str], expected: tuple[int, int]) -> None:
    for file in files:
        write(tmp_path / file, [0, 1, 2], NAMES)
    assert splits(tmp_path) == expected
    assert (has_shards(tmp_path) or bool(configurations(tmp_path))) == ("train" in "".join(files))


def test_images_of_all_splits_are_read_with_their_own_labels(tmp_path: Path) -> None:
    """Rows stand in the order training, validation, test; names of files sort otherwise."""
    labels = {"train": ["ant", "bee", "cat"], "validation": ["bee", "cat", "ant"], "test": ["cat", "ant", "bee"]}
    for split, names in labels.items():
        images = [{"bytes": f"{split} {name}".encode()} for name in names]
        pq.write_table(pa.table({"image": images, "label": names}), tmp_path / f"{split}-0.parquet")
    listing = list_parquet(tmp_path)
    assert isinstance(listing.images, EncodedImages)
    contents = [content.decode() for content in listing.images.read(list(range(9))) if isinstance(content, bytes)]
    assert contents == [f"{split} {name}" for split, names in labels.items() for name in names]
    assert [NAMES[label] for label in listing.labels] == [name for names in labels.values() for name in names]
    assert [name.split("-")[0] for name in listing.images.names] == [split for split in labels for _ in range(3)]


@pytest.mark.parametrize("labels", [[0, 1, 2], ["ant", "bee", "cat"]])
def test_a_validation_split_of_its_own_is_held_out(tmp_path: Path, labels: list[Any]) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}-0.parquet", labels, NAMES if labels[0] == 0 else None)
    listing = list_parquet(tmp_path)
    assert listing.official_validation is not None
    assert listing.official_validation.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert listing.official_test is not None
    assert listing.official_test.tolist() == [False] * 6 + [True] * 3
    assert list_parquet(tmp_path, WITHOUT_VALIDATION).official_validation is None
    write(tmp_path / "validation-0.parquet", ["ant", "bee", "dog"])
    with pytest.raises(DataError):
        list_parquet(tmp_path)


def test_images_of_files_of_one_name_have_names_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "0000.parquet", [0, 1], NAMES)
    images = list_parquet(tmp_path).images
    assert isinstance(images, EncodedImages)
    assert images.names == [f"{split}/0000.parquet row {row}" for split in ("train", "test") for row in range(2)]
    alone = list_parquet(tmp_path / "test" / "0000.parquet").images
    assert isinstance(alone, EncodedImages)
    assert alone.names == ["0000.parquet row 0", "0000.parquet row 1"]


def test_what_is_left_out_or_assumed_is_remarked(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "train-0.parquet", [0, 1, 2], NAMES)
    write(tmp_path / "plain" / "test_corrupted-0.parquet", [0, 1, 2], NAMES)
    assert list_parquet(tmp_path).remarks == (
        f"configuration 'plain' of '{tmp_path.name}' is read", "left out: 1 parquet file of 'test_corrupted'",
    )  # fmt: skip


def test_several_configurations_must_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "fine" / "train-0.parquet", [0, 1], ["a", "b"])
    write(tmp_path / "coarse" / "train-0.parquet", [0, 1], ["a", "b"])
    with pytest.raises(DataError, match=r"configurations coarse, fine: name one, such as parquet:.*coarse"):
        list_parquet(tmp_path)
    assert splits(tmp_path / "fine") == (2, None)


def test_of_several_columns_of_images_that_called_image_is_read(tmp_path: Path) -> None:
    table = {"thumbnail": [b"small"] * 2, "image": [b"large"] * 2, "label": [0, 1]}
    pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
    listing = list_parquet(tmp_path)
    assert list(listing.images.read([0, 1])) == [b"large"] * 2
    assert listing.remarks == ("of the columns of images thumbnail, image, 'image' is read",)


def test_a_part_of_a_large_set_is_said(tmp_path: Path) -> None:
    for split in ("partial-train", "test"):
        write(tmp_path / "default" / split / "0000.parquet", [0, 1, 2], NAMES)
    remarks = list_parquet(tmp_path / "default").remarks
    assert remarks == ("the folder 'partial-train' has only the first part of its images",)
