"""Images, files and names as they lie about: every kind of bad data, in memory and streamed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deitkit.compare import compare
from deitkit.data.duplicates import find_duplicates, pixel_hashes
from deitkit.data.listing import Listing
from deitkit.data.sources import load_dataset
from deitkit.recipe import DataRecipe
from deitkit.runs import Silent

STREAMED = pytest.mark.parametrize("fields", [{"streaming": False}, {"streaming": True, "workers": 0}])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def load(name, **fields):
    return load_dataset(DataRecipe(name=str(name), **fields))


# Duplicates


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4), (1, 1, 1)])
def test_hashes_tell_images_apart_as_their_bytes_do(shape):
    images = np.random.default_rng(0).integers(0, 4, (600, *shape), dtype=np.uint8)
    images[300:] = images[:300][::-1]  # equal ones in other chunks
    images[7, -1, -1, -1] += 1  # the last byte counts
    hashes, contents = pixel_hashes(images).tolist(), [image.tobytes() for image in images]
    assert len(set(hashes)) == len(set(contents)) == len(set(zip(hashes, contents)))


def test_pairs_are_those_of_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randint(-20, 20, (30,), generator=generator), torch.randint(-20, 20, (40,), generator=generator)
    naive = [
        [place, train.tolist().index(value)] for place, value in enumerate(test.tolist()) if value in train.tolist()
    ]
    assert find_duplicates(train, test).tolist() == naive
    assert find_duplicates(train[:0], test).shape == (0, 2)


def write_split(root, kind, pixels, train):
    """Write images of two classes, the first ones for training; return what messages call each."""
    names, rows = [], {"train": [], "test": []}
    for index, image in enumerate(pixels):
        part = "train" if index < train else "test"
        file = root / part / "ab"[index % 2] / f"{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        rows[part].append({"image": file.read_bytes(), "label": index % 2, "extra": {"more": [None, "columns"]}})
        names.append(str(file.relative_to(root)))
        if kind == "parquet":
            names[-1] = f"{part}-0.parquet row {len(rows[part]) - 1}"
    if kind == "parquet":
        for part, some in rows.items():
            pq.write_table(pa.Table.from_pylist(some), root / f"{part}-0.parquet")
    return names


@STREAMED
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_test_images_that_were_trained_on_are_counted_and_named(tmp_path, kind, fields):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 12, 16, 3), dtype=np.uint8)
    pixels[40:50] = pixels[:10]
    names = write_split(tmp_path, kind, pixels, train=40)
    data = load(f"{kind}:{tmp_path}", image_px=8, **fields)
    trained = {some.numpy().tobytes() for some in data.train.pixels(torch.arange(len(data.train)))}
    tests = data.test.pixels(torch.arange(len(data.test)))
    assert data.duplicates.count == sum(image.numpy().tobytes() in trained for image in tests)
    assert 5 <= data.duplicates.count <= 10  # validation images are no training images
    assert len(data.duplicates.examples) == 5
    assert set(data.duplicates.examples) < {(names[40 + index], names[index]) for index in range(10)}
    assert len(data.test) == 20, "nothing is removed"
    assert load(f"{kind}:{tmp_path}", image_px=8, **fields).duplicates == data.duplicates, "as kept in the cache"
    cropped = load(f"{kind}:{tmp_path}", image_px=8, eval_crop=0.5, **fields)
    assert cropped.duplicates == data.duplicates, "another crop of an image is the same image"


def test_duplicates_of_decoded_sets_are_called_by_their_place(monkeypatch):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4), dtype=np.uint8))
    official_test = torch.arange(40) >= 30
    pixels[33:37] = pixels[3]
    listing = Listing(pixels, torch.arange(40) % 2, official_test, ("a", "b"))
    monkeypatch.setattr("deitkit.data.sources.list_named", lambda *_: listing)
    seeds = (load("cifar10", split_seed=seed, image_px=8).duplicates for seed in range(9))
    examples = tuple((f"test image {place}", "training image 3") for place in range(3, 7))
    assert {(found.count, found.examples) for found in seeds} == {(4, examples), (0, ())}  # trained on or validated
    assert load("digits").duplicates.count == 0


def test_a_comparison_tells_of_duplicates(tiny_recipe, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    pixels[40:50] = pixels[:10]
    write_split(tmp_path / "data", "folder", pixels, train=40)
    said = []
    results = compare_once(tiny_recipe, tmp_path, said, f"data.name=folder:{tmp_path / 'data'}")
    found = results["dataset"]["duplicates"]
    assert len(found["examples"]) == 5
    test, train = found["examples"][0]
    sentence = f"{found['count']} test images are also among the training images, such as '{test}' (as '{train}')"
    assert sum(line.startswith(sentence) for line in said) == 1
    assert sum(note.startswith(sentence) for note in results["notes"]) == 1
    written = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert written["dataset"]["duplicates"] == {
        "count": found["count"],
        "examples": [list(p) for p in found["examples"]],
    }
    for name in ("table.md", "table.tex", "report.html"):
        assert "also among the training images" in (tmp_path / "run" / name).read_text(encoding="utf-8")


def compare_once(tiny_recipe, tmp_path, said, *overrides):
    """Run a comparison of one method into ``tmp_path / "run"``, and return its results."""
    watcher = Silent()
    watcher.say = said.append
    recipe = tiny_recipe(
        "methods=[none]", "train.batch_size=8", "train.epochs=1", "data.train_images=null", "data.test_images=null",
        "augment.crop=none", *overrides,
    )  # fmt: skip
    return compare(recipe, tmp_path / "run", watcher=watcher)
