import os
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deitkit.data.dataset import load_dataset, load_test
from deitkit.data.pixels import resize, to_channels
from deitkit.data.sources.choose import DATASETS
from deitkit.data.split import plan_splits
from deitkit.recipe.schema import DataRecipe
from source_helpers import all_values, load, png, refused, values, write_classes, write_parquet

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("DEITKIT_CACHE", str(elsewhere / "cache"))
    monkeypatch.setenv("DEITKIT_DATA", str(elsewhere / "data"))


# Splits


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(3, 40), min_size=2, max_size=6),
    test_fraction=st.floats(0.01, 0.5),
    validation_fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_are_stratified_disjoint_and_complete(counts, test_fraction, validation_fraction, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    recipe = DataRecipe(test_fraction=test_fraction, validation_fraction=validation_fraction, split_seed=seed)
    names = [str(index) for index in range(len(counts))]
    plan = plan_splits(labels, None, names, recipe)
    parts = (plan.train, plan.validation, plan.test)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    for part in parts:
        assert set(labels[part].tolist()) == set(range(len(counts)))
        assert part.tolist() == sorted(part.tolist())
    expected = min(max(round(test_fraction * len(labels)), len(counts)), len(labels) - 2 * len(counts))
    assert len(plan.test) == expected
    ideal = [count * expected / len(labels) for count in counts]
    if all(1 <= share <= count - 2 for share, count in zip(ideal, counts)):
        drawn = torch.bincount(labels[plan.test]).tolist()
        assert all(abs(some - share) < 1 for some, share in zip(drawn, ideal))
    again = plan_splits(labels, None, names, recipe)
    assert torch.equal(plan.train, again.train)


def test_fewer_training_images_leave_the_other_splits_as_they_are():
    full, some, few = load("digits"), load("digits", train_images=500), load("digits", train_images=50)
    assert (len(full.train), len(full.validation), len(full.test)) == (1294, 144, 359)
    assert torch.equal(full.validation.images, few.validation.images)
    assert torch.equal(full.test.images, few.test.images)
    assert torch.bincount(few.train.labels).tolist() == [5] * 10
    whole = {image.numpy().tobytes() for image in some.train.images}
    assert {image.numpy().tobytes() for image in few.train.images} <= whole
    fewest = [load("digits", test_images=20, train_images=count).test for count in (None, 500, 50)]
    assert torch.bincount(fewest[0].labels).tolist() == [2] * 10
    assert all(torch.equal(fewest[0].images, other.images) for other in fewest), "those of every training split"


def test_a_seed_moves_the_splits_and_the_fingerprint_tells():
    one, same, other = load("digits"), load("digits"), load("digits", split_seed=1)
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 64
    assert load("digits", train_images=100).fingerprint != one.fingerprint


def test_numbers_of_images_that_cannot_be_are_refused():
    refused("digits", "data.train_images=2000", "1294", train_images=2000)
    refused("digits", "data.test_images=400", "359", test_images=400)
    refused("digits", "data.train_images=9", "10 classes", train_images=9)


# Digits, sizes, channels


def test_digits_are_scaled_and_described():
    from sklearn.datasets import load_digits

    data = load("digits")
    reference = load_digits()
    known = {
        np.round(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(reference.images, reference.target)
    }
    for split in (data.train, data.validation, data.test):
        assert [known[image.numpy().tobytes()] for image in split.images] == split.labels.tolist()
    assert (data.classes, data.channels, data.image_px) == (10, 1, (8, 8))
    assert data.class_names == tuple("0123456789")
    assert data.train.images.dtype == torch.uint8
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),), rel=1e-9)
    assert data.std == pytest.approx((pixels.std(correction=0).item(),), rel=1e-9)


def test_size_and_channels_can_be_asked_for():
    native, data = load("digits"), load("digits", image_px=16, channels=3)
    assert data.train.images.shape == (1294, 3, 16, 16)
    assert torch.equal(data.test.images, to_channels(resize(native.test.images, 16), 3))
    assert len(data.mean) == 3


def test_a_split_gives_a_part_of_itself():
    split = load("digits").test
    pixels = split.pixels(torch.tensor([3, 1]))
    assert torch.equal(pixels, torch.stack([split.images[3], split.images[1]]))
    assert torch.equal(torch.cat(list(split.batches(100))), split.images)
    assert split.to(torch.device("meta")).images.device.type == "meta"


def test_an_unknown_name_is_told_its_neighbour():
    refused("cifar", "cifar10", "folder:PATH", *DATASETS)
    refused("folder:", "folder:PATH")


def test_more_than_the_memory_is_refused(monkeypatch, tmp_path):
    write_classes(tmp_path / "set", {"a": 5, "b": 5})
    memory = psutil.virtual_memory()._replace(available=500)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    refused(f"folder:{tmp_path / 'set'}", "data.image_px", "data.train_images", streaming=False)
    refused("digits", "data.train_images", image_px=64)


# Folders


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_a_folder_with_a_test_split(tmp_path, test):
    write_classes(tmp_path / "train", {"dog": 10, "cat": 20})
    write_classes(tmp_path / test, {"cat": 3, "dog": 4}, start=100)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    (tmp_path / "notes.txt").write_text("")
    data = load(f"folder:{tmp_path}", validation_fraction=0.2)
    assert data.class_names == ("cat", "dog")
    assert values(data.test) == [*range(100, 103), *range(103, 107)]
    assert data.test.labels.tolist() == [0] * 3 + [1] * 4
    assert sorted(values(data.train) + values(data.validation)) == list(range(30))
    for split in (data.train, data.validation):
        assert split.labels.tolist() == [int(value < 10) for value in values(split)]
    assert torch.bincount(data.validation.labels).tolist() == [4, 2]
    assert data.skipped == ()


def test_a_folder_of_one_level_is_divided(tmp_path):
    write_classes(tmp_path, {"a": 20, "train": 30})  # a railway is no split
    data = load(f"folder:{tmp_path}")
    assert data.class_names == ("a", "train")
    assert torch.bincount(data.test.labels).tolist() == [4, 6]
    assert sorted(all_values(data)) == list(range(50))


def test_damaged_files_are_named_and_left_out(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a" / "003.png").write_bytes(png(3)[:40])
    (tmp_path / "b" / "004.png").write_bytes(b"")
    name = f"folder:{tmp_path}"
    data = load(name)
    assert data.skipped == (os.path.join("a", "003.png"), os.path.join("b", "004.png"))  # noqa: PTH118
    assert len(data.train) + len(data.validation) + len(data.test) == 18
    for split in (data.train, data.validation, data.test):
        assert split.labels.tolist() == [int(value >= 10) for value in values(split)]
    refused(name, "003.png", corrupt="error")
    for file in (tmp_path / "b").iterdir():
        file.write_bytes(b"")
    refused(name, "class 'b'", "train split")


def test_a_changed_folder_is_read_again(tmp_path):
    write_classes(tmp_path / "set", {"a": 5, "b": 5})
    name = f"folder:{tmp_path / 'set'}"
    calls = []
    first = load(name, lambda *told: calls.append(told))
    assert load(name, lambda *told: calls.append(told)).fingerprint == first.fingerprint
    assert calls == [("decoding images", 10, 10)]
    (tmp_path / "set" / "a" / "000.png").write_bytes(png(99))
    assert load(name).fingerprint != first.fingerprint


def test_folders_that_cannot_be_used_say_why(tmp_path):
    refused(f"folder:{tmp_path / 'absent'}", "absent")
    refused(f"folder:{tmp_path}", "no class folders")
    write_classes(tmp_path / "one", {"only": 5})
    refused(f"folder:{tmp_path / 'one'}", "at least 2")
    write_classes(tmp_path / "empty", {"a": 5, "b": 0})
    refused(f"folder:{tmp_path / 'empty'}", str(Path("empty") / "b"), "no images")
    write_classes(tmp_path / "rare", {"a": 5, "b": 2})
    refused(f"folder:{tmp_path / 'rare'}", "class 'b'", "2 images", "at least 3")
    write_classes(tmp_path / "unlike" / "train", {"a": 5, "b": 5, "c": 5})
    write_classes(tmp_path / "unlike" / "test", {"a": 5, "d": 5})
    refused(f"folder:{tmp_path / 'unlike'}", "'b', 'c'", "'d'")
    write_classes(tmp_path / "sizes", {"a": 5, "b": 5})
    (tmp_path / "sizes" / "b" / "000.png").write_bytes(png(1, (9, 7)))
    refused(f"folder:{tmp_path / 'sizes'}", "6x6", "9x7", "data.image_px")
    assert load(f"folder:{tmp_path / 'sizes'}", image_px=4).image_px == (4, 4)


# Parquet


@pytest.mark.parametrize("image", ["img", "picture"])
def test_parquet_shards_with_names_in_the_schema(tmp_path, image):
    names = ["zebra", "ant"]
    for shard in range(2):
        path = tmp_path / "data" / f"train-0000{shard}-of-00002.parquet"
        write_parquet(path, [0, 1] * 10, names, image=image, start=20 * shard)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 0, 1], names, image=image, start=500)
    data = load(f"parquet:{tmp_path}")
    assert data.class_names == ("zebra", "ant")
    assert values(data.test) == [500, 501, 502]
    assert data.test.labels.tolist() == [1, 0, 1]
    assert sorted(values(data.train) + values(data.validation)) == list(range(40))
    for split in (data.train, data.validation):
        assert split.labels.tolist() == [value % 2 for value in values(split)]
    few = load(f"parquet:{tmp_path}", train_images=4)
    assert few.train.labels.tolist() == [value % 2 for value in values(few.train)]
    assert torch.equal(few.test.images, data.test.images)


def test_one_parquet_file_with_plain_bytes_and_string_labels(tmp_path):
    labels = ["pear", "fig"] * 10
    table = pa.table({"picture": [png(index) for index in range(20)], "labels": labels})
    pq.write_table(table, tmp_path / "set.parquet")
    data = load(f"parquet:{tmp_path / 'set.parquet'}")
    assert data.class_names == ("fig", "pear")
    for split in (data.train, data.validation, data.test):
        assert split.labels.tolist() == [1 - value % 2 for value in values(split)]
    assert sorted(all_values(data)) == list(range(20))


def test_parquet_without_names_counts_its_classes(tmp_path):
    write_parquet(tmp_path / "anything.parquet", [0, 1, 2] * 5)
    assert load(f"parquet:{tmp_path}").class_names == ("0", "1", "2")


def test_a_missing_or_damaged_image_in_parquet_is_named(tmp_path):
    images = [png(index) for index in range(20)]
    images[3], images[8] = None, b"no image"
    pq.write_table(pa.table({"image": pa.array(images), "label": [0, 1] * 10}), tmp_path / "set.parquet")
    assert load(f"parquet:{tmp_path}").skipped == ("set.parquet row 3", "set.parquet row 8")


def test_parquet_that_cannot_be_used_says_why(tmp_path):
    refused(f"parquet:{tmp_path / 'absent'}", "absent")
    refused(f"parquet:{tmp_path}", "no train-*.parquet")
    path = tmp_path / "set.parquet"
    name = f"parquet:{path}"
    path.write_bytes(b"PAR1 no parquet")
    refused(name, "set.parquet")
    write_parquet(path, [0, 1, None, 1, None], kind=pa.int64())
    refused(name, "2 of 5 labels", "row 2")
    write_parquet(path, [0, 1, 0, 7, -1] * 2, names=["a", "b"])
    refused(name, "4 of 10 labels", "0..1", "first 7 in set.parquet row 3")
    write_parquet(path, [0.5, 1.0])
    refused(name, "double", "integers or strings")
    write_parquet(path, [0, 1], label="kind")
    refused(name, "labels", "kind")
    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), path)
    refused(name, "images", "text")
    write_parquet(path, [0, 0, 0, 0], names=["a", "b"])
    refused(name, "class 'b'", "0 images")
    write_parquet(tmp_path / "sub" / "test-0.parquet", [0, 1])
    refused(f"parquet:{tmp_path / 'sub'}", "no train-*.parquet")
    write_parquet(tmp_path / "half" / "train-00000-of-00002.parquet", [0, 1])
    refused(f"parquet:{tmp_path / 'half'}", "1 of 2 shards")
    write_parquet(tmp_path / "str" / "train-0.parquet", ["a", "b"])
    write_parquet(tmp_path / "str" / "test-0.parquet", ["a", "c"])
    refused(f"parquet:{tmp_path / 'str'}", "'b'", "'c'")


@pytest.mark.parametrize("streaming", [False, True])
def test_test_images_alone_are_those_of_the_whole_data_set(tmp_path, streaming):
    write_classes(tmp_path / "pictures", {"a": 30, "b": 20})
    (tmp_path / "pictures" / "a" / "007.png").write_bytes(b"no image")
    for name in (f"folder:{tmp_path / 'pictures'}", "digits"):
        for fields in ({}, {"train_images": 20}, {"test_images": 10}, {"split_seed": 3}):
            streams = {"streaming": True, "workers": 0} if streaming and name != "digits" else {}
            recipe = DataRecipe(name=name, image_px=4, channels=3, **fields, **streams)
            whole = load_dataset(recipe)
            alone = load_test(recipe)[0]
            everything = torch.arange(len(whole.test))
            assert torch.equal(alone.pixels(everything), whole.test.pixels(everything))
            assert torch.equal(alone.labels, whole.test.labels)
            assert torch.equal(alone.hashes, whole.test.hashes)


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="the real CIFAR-10 is not on this machine")
def test_the_real_cifar10():
    data = load(f"parquet:{SHARED / 'cifar10'}", train_images=3_000, test_images=10, validation_fraction=0.001)
    assert torch.bincount(data.train.labels).tolist() == [300] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert data.mean == pytest.approx((0.49140, 0.48216, 0.44653), abs=0.01)
    assert data.std == pytest.approx((0.24703, 0.24349, 0.26159), abs=0.01)
    assert len(data.validation) == 50
