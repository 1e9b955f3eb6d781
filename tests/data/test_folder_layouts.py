"""Folders of images as people have them: spellings of splits, subfolders, other endings, and what is left out."""

import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, features

from deitkit.data.dataset import load_dataset
from deitkit.data.sources.folders import list_folder
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from source_helpers import all_values, load, refused, write_classes


def draw(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 20, 30)).save(path, format="JPEG" if path.suffix == ".jfif" else None)


def sizes(folder: Path) -> tuple[int, int | None]:
    listing = list_folder(folder)
    return len(listing.labels), None if listing.official_test is None else int(listing.official_test.sum())


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "Testing"), ("TRAIN", "Val"), ("training", "VALIDATION"), ("Train", "valid")],
)
def test_splits_are_found_in_their_common_spellings(tmp_path: Path, train: str, test: str) -> None:
    for split, count in ((train, 3), (test, 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                draw(tmp_path / split / name / f"{number}.png")
    assert sizes(tmp_path) == (10, 4)
    assert list_folder(tmp_path).remarks == ()


def test_a_validation_split_of_its_own_is_used(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("Testing", 3), ("valid", 1)):
        for name, number in itertools.product(("cat", "dog"), range(count)):
            draw(tmp_path / split / name / f"{number}.png", 30 * number)
    data = load_dataset(DataRecipe(name=f"folder:{tmp_path}", validation_fraction=0.5))
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 6)
    assert data.names is not None
    assert {data.names("validation", place) for place in range(4)} == {
        f"val/{name}/{number}.png" for name in ("cat", "dog") for number in range(2)
    }
    assert data.remarks == (
        "the validation images are those of 'val', instead of data.validation_fraction of the training images",
        f"left out: folder 'valid' of '{tmp_path.name}'",
    )
    draw(tmp_path / "val" / "fox" / "0.png")
    listing = list_folder(tmp_path)
    assert listing.official_validation is None
    assert listing.remarks[0] == "'val' has other classes than 'train', so the validation images are taken from 'train'"


@pytest.mark.parametrize("places", [("cat", "dog"), ("train/cat", "train/dog", "test/cat", "test/dog")])
def test_a_data_set_knows_whether_it_has_a_test_split_of_its_own(tmp_path: Path, places: tuple[str, ...]) -> None:
    for place, number in itertools.product(places, range(6)):
        draw(tmp_path / place / f"{number}.png", 40 * number)
    assert load_dataset(DataRecipe(name=f"folder:{tmp_path}")).divided is ("cat" in places)


def test_class_names_are_compared_after_unicode_normalisation(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # as most systems and as macOS write it
    for place in (f"train/{composed}", "train/tea", f"test/{decomposed}", "test/tea"):
        draw(tmp_path / place / "0.png")
    listing = list_folder(tmp_path)
    assert listing.class_names == (composed, "tea")
    assert listing.labels.tolist() == [0, 1, 0, 1]
    draw(tmp_path / f"train/{decomposed}" / "0.png")
    with pytest.raises(DataError, match="two folders 'caf\u00e9', in two Unicode forms: merge them"):
        list_folder(tmp_path)


def test_images_in_subfolders_of_a_class_are_read(tmp_path: Path) -> None:
    for path in ("cat/0.png", "cat/batch2/1.png", "cat/batch2/deep/2.png", "dog/0.png", "dog/.hidden/1.png"):
        draw(tmp_path / path)
    draw(tmp_path / "dog" / "__MACOSX" / "0.png")
    assert list_folder(tmp_path).labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("ending", [".jfif", ".apng", ".avif", ".JPG", ".jpe"])
def test_what_pillow_reads_is_read(tmp_path: Path, ending: str) -> None:
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for name in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / name / f"{number}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = {".apng": "PNG", ".avif": "AVIF"}.get(ending, "JPEG")
            Image.new("RGB", (8, 8), (60 * number, 0, 200)).save(path, format=kind)
    data = load_dataset(DataRecipe(name=f"folder:{tmp_path}"))
    assert data.skipped == ()
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 8


def test_what_is_left_out_is_counted_by_its_ending(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw(tmp_path / "train" / name / "0.png")
        draw(tmp_path / "test" / name / "0.png")
        (tmp_path / "train" / name / "scan.mat").write_bytes(b"matlab")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("notes")
    (tmp_path / "train" / "labels.csv").write_text("a,b")
    (tmp_path / "train" / ".DS_Store").write_text("hidden")
    draw(tmp_path / "unlabelled" / "all" / "0.png")
    assert list_folder(tmp_path).remarks == (
        f"left out: folder 'unlabelled' of '{tmp_path.name}'",
        "left out, as no image of a class: 4 files (2 .mat, 1 .csv, 1 .txt)",
    )


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("train-00000-of-00001.parquet", "write data.name=parquet:{folder}"),
        ("plain_text/train-00000-of-00001.parquet", "write data.name=parquet:{folder}"),
        ("labels.csv", "write data.name=csv:{folder}/labels.csv"),
        ("model.safetensors", "name the folder of your images"),
        ("cat/notes.txt", "add some or remove the folder"),
    ],
)
def test_a_folder_of_another_kind_is_named_as_what_it_is(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=re.escape(advice.format(folder=tmp_path))):
        list_folder(tmp_path)


def test_a_linked_folder_is_counted_and_one_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "photos", {"a": 6, "b": 6})
    write_classes(tmp_path / "elsewhere", {"more": 5})
    (tmp_path / "photos" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    data = load(f"folder:{tmp_path / 'photos'}")
    assert len(all_values(data)) == 12
    assert data.remarks == ("left out, as no image of a class: 1 file (1 linked folder)",)
    walk = os.walk

    def refused_walk(top: Path, onerror: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", str(top)))
        return walk(top)

    monkeypatch.setattr("deitkit.data.sources.folders.os.walk", refused_walk)
    refused(f"folder:{tmp_path / 'photos'}", "cannot be read", "Permission denied")


def test_a_class_without_images_is_not_taken_for_a_parquet_repository(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog" / "1.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="add some or remove the folder"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    "names", [("training_set", "test_set"), ("seg_train", "seg_test"), ("val", "test"), ("Train images",)]
)
def test_splits_of_other_names_are_no_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        write_classes(tmp_path / "photos" / name, {"cat": 6, "dog": 6})
    refused(f"folder:{tmp_path / 'photos'}", "which look like splits and would be the classes", "'train'")


def test_a_class_may_have_a_name_as_of_a_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "photos" / "train station", {"2021": 6, "2022": 6})
    write_classes(tmp_path / "photos" / "airport", {"2021": 6, "2022": 6})
    assert load(f"folder:{tmp_path / 'photos'}", image_px=8).class_names == ("airport", "train station")


def test_folders_that_change_places_change_the_labels(tmp_path: Path) -> None:
    """Files from an archive may all have one size and one date."""
    photos = tmp_path / "photos"
    for name, value in (("cat", 10), ("dog", 200)):
        (photos / name).mkdir(parents=True)
        for index in range(12):
            path = photos / name / f"{index}.bmp"
            Image.new("L", (8, 8), value + index).save(path)
            os.utime(path, ns=(0, 0))
    before = load(f"folder:{photos}")
    for old, new in (("cat", "third"), ("dog", "cat"), ("third", "dog")):
        (photos / old).rename(photos / new)
    after = load(f"folder:{photos}")
    for data, dog in ((before, 1), (after, 0)):
        assert (data.train.images[:, 0, 0, 0] >= 200).long().tolist() == (data.train.labels == dog).long().tolist()
