"""Data sets whose labels lie apart from their images, in the layouts of their archives, and as folders and parquet."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from deitkit.data.sources.named import NAMED_SETS, list_named
from deitkit.recipe.schema import DataRecipe
from source_helpers import load, png, refused, values, write_classes, write_parquet

CARS = [f"Car {number} 2012" for number in range(196)]


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("DEITKIT_CACHE", str(elsewhere / "cache"))
    monkeypatch.setenv("DEITKIT_DATA", str(elsewhere / "data"))


@pytest.fixture
def four_species(monkeypatch):
    monkeypatch.setitem(NAMED_SETS, "inat2018", replace(NAMED_SETS["inat2018"], classes=4))


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value, (6 + value % 3, 6)))


def listed(name, root):
    """File, label and split of every image, and the class names."""
    listing = list_named(DataRecipe(name=name, root=root))
    samples = zip(listing.images.files, listing.labels.tolist(), listing.official_test.tolist(), strict=True)
    return {str(file.resolve()): (label, test) for file, label, test in samples}, listing.class_names


def of_torchvision(train, test):
    """The same of torchvision's splits, given as pairs of a file and a label."""
    return {str(Path(file).resolve()): (label, is_test) for part, is_test in ((train, False), (test, True))
            for file, label in part}  # fmt: skip


# Flowers


def write_flowers(folder):
    labels = np.arange(306) % 102 + 1
    for number in range(1, 307):
        write_image(folder / "jpg" / f"image_{number:05}.jpg", number)
    order = np.random.default_rng(0).permutation(306) + 1
    by_set = {
        name: sorted(n for n in order if (n - 1) // 102 == at) for at, name in enumerate(("tstid", "trnid", "valid"))
    }
    savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([numbers], np.uint16) for name, numbers in by_set.items()})


@pytest.mark.parametrize("where", ["flowers-102", "flowers102", "."])
def test_flowers_are_read_as_torchvision_reads_them(tmp_path, monkeypatch, where):
    write_flowers(tmp_path / where)
    found, names = listed("flowers102", tmp_path)
    assert names == tuple(datasets.Flowers102.classes)
    if where == "flowers-102":
        monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
        train, val, test = (datasets.Flowers102(tmp_path, part) for part in ("train", "val", "test"))
        pairs = [list(zip(part._image_files, part._labels, strict=True)) for part in (train, val, test)]
        assert found == of_torchvision(pairs[0] + pairs[1], pairs[2])
    data = load("flowers102", root=tmp_path, image_px=4)
    assert (len(data.train) + len(data.validation), len(data.test), data.image_px) == (204, 102, (4, 4))
    for split in (data.train, data.validation, data.test):
        assert [(value - 1) % 102 for value in values(split)] == split.labels.tolist()
    refused("flowers102", "differ in size", "data.image_px", root=tmp_path)


def test_flowers_that_are_incomplete_or_damaged_say_what(tmp_path):
    folder = tmp_path / "flowers-102"
    write_flowers(folder)
    (folder / "jpg" / "image_00007.jpg").unlink()
    refused("flowers102", "1 of 306 images", "image_00007.jpg", root=tmp_path)
    write_image(folder / "jpg" / "image_00007.jpg", 7)
    whole = (folder / "setid.mat").read_bytes()
    for damaged in (whole[:200], b"no mat file", b""):
        (folder / "setid.mat").write_bytes(damaged)
        refused("flowers102", "setid.mat", "damaged", root=tmp_path)
    (folder / "setid.mat").unlink()
    refused("flowers102", "lacks setid.mat", root=tmp_path)
    (folder / "setid.mat").write_bytes(whole)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 307)[None] % 120})
    refused("flowers102", "number a class", "of 102", root=tmp_path)


def test_flowers_as_folders_and_parquet_are_numbered_as_everyone_does(tmp_path):
    names = datasets.Flowers102.classes
    for form, spelling in (("names", names), ("numbers", range(1, 103))):
        for start, part in enumerate(("train", "valid", "test")):
            write_classes(tmp_path / form / "flowers102" / part, {str(name): 1 for name in spelling}, 102 * start)
        data = load("flowers102", root=tmp_path / form)
        assert data.class_names == tuple(names)
        assert (len(data.train) + len(data.validation), len(data.test)) == (204, 102)
        assert data.test.labels.tolist() == sorted(data.test.labels.tolist(), key=lambda label: str(spelling[label]))
        assert all(value % 102 == label for value, label in zip(values(data.test), data.test.labels.tolist()))
    shards = tmp_path / "parquet" / "oxford-flowers" / "data"
    reverse = names[::-1]
    for start, part in enumerate(("train", "validation", "test")):
        labels = list(range(102))
        write_parquet(shards / f"{part}-00000-of-00001.parquet", labels, reverse, image="image", start=102 * start)
    data = load("flowers102", root=tmp_path / "parquet")
    assert data.class_names == tuple(names)
    assert [101 - value % 102 for value in values(data.test)] == data.test.labels.tolist()
    assert len(data.train) + len(data.validation) == 204


def test_flowers_are_downloaded_by_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("deitkit.data.sources.named.unreachable", lambda url: None)
    monkeypatch.setattr(datasets.Flowers102, "download", lambda self: write_flowers(Path(self.root) / "flowers-102"))
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    assert len(load("flowers102", root=tmp_path, image_px=4).test) == 102


# Cars


def write_cars(folder, labelled="."):
    rows = {}
    for start, (part, count) in enumerate((("cars_train", 2), ("cars_test", 1))):
        labels = np.arange(196 * count) % 196 + 1
        for number, label in enumerate(labels, start=1):
            write_image(folder / part / f"{number:05}.jpg", label + 1000 * start)
        rows[part] = np.array(
            [((1, 2, 3, 4), label, f"{number:05}.jpg") for number, label in enumerate(labels, start=1)],
            [("bbox", object), ("class", object), ("fname", object)],
        )[None]
    (folder / "devkit").mkdir()
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(CARS, object)[None]})
    savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": rows["cars_train"]})
    savemat(folder / labelled / "cars_test_annos_withlabels.mat", {"annotations": rows["cars_test"]})


@pytest.mark.parametrize("labelled", [".", "devkit"])
def test_cars_are_read_as_torchvision_reads_them(tmp_path, labelled):
    folder = tmp_path / "stanford_cars"
    write_cars(folder, labelled)
    found, names = listed("stanford_cars", tmp_path)
    assert names == tuple(CARS)
    if labelled == ".":
        train, test = (datasets.StanfordCars(tmp_path, part) for part in ("train", "test"))
        assert found == of_torchvision(train._samples, test._samples)
        assert tuple(train.classes) == names
    data = load("stanford_cars", root=tmp_path, image_px=4)
    assert (len(data.train) + len(data.validation), len(data.test)) == (392, 196)
    assert [value - 1001 for value in values(data.test)] == data.test.labels.tolist()
    for part in ("cars_train", "cars_test"):  # as Kaggle's zip unpacks
        (folder / part).rename(folder / "moved")
        (folder / part).mkdir()
        (folder / "moved").rename(folder / part / part)
    (folder / "car_devkit").mkdir()
    (folder / "devkit").rename(folder / "car_devkit" / "devkit")
    assert load("stanford_cars", root=tmp_path, image_px=4).fingerprint == data.fingerprint


def test_cars_in_one_folder_are_the_same(tmp_path):
    rows = [(f"car_ims/{n:06}.jpg", n % 196 + 1, n >= 392) for n in range(588)]
    for name, label, test in rows:
        write_image(tmp_path / "cars" / name, label + 1000 * test)
    annotations = np.array(rows, [("relative_im_path", object), ("class", object), ("test", object)])[None]
    savemat(tmp_path / "cars" / "cars_annos.mat", {"annotations": annotations, "class_names": np.array(CARS, object)})
    data = load("stanford_cars", root=tmp_path, image_px=4)
    assert data.class_names == tuple(CARS)
    assert (len(data.train) + len(data.validation), len(data.test)) == (392, 196)
    assert [value - 1001 for value in values(data.test)] == data.test.labels.tolist()


def test_cars_that_are_incomplete_or_lead_elsewhere_say_so(tmp_path):
    folder = tmp_path / "stanford_cars"
    write_cars(folder)
    file = folder / "cars_test_annos_withlabels.mat"
    row = np.array([("../../secret.jpg", 1)], [("fname", object), ("class", object)])
    savemat(file, {"annotations": row})
    refused("stanford_cars", "leads out of the folder", root=tmp_path)
    file.unlink()
    refused("stanford_cars", "lacks cars_test_annos_withlabels.mat", root=tmp_path)
    write_cars(tmp_path / "again" / "stanford_cars")
    savemat(
        tmp_path / "again" / "stanford_cars" / "devkit" / "cars_meta.mat", {"class_names": np.array(CARS[:9], object)}
    )
    refused("stanford_cars", "number a class", "of 9", root=tmp_path / "again")


def test_cars_as_folders(tmp_path):
    write_classes(tmp_path / "car_data" / "train", dict.fromkeys(CARS, 2))
    write_classes(tmp_path / "car_data" / "test", dict.fromkeys(CARS, 1))
    assert load("stanford_cars", root=tmp_path).class_names == tuple(sorted(CARS))


# iNaturalist


def write_inaturalist(folder, year=2018, images="train_val2018", plain=False):
    species = {3: "Aster alpinus", 0: "Bufo bufo", 1: "Bufo bufo", 2: "Corvus corax"}
    kingdoms = {0: "Amphibia", 1: "Amphibia", 2: "Aves", 3: "Plantae"}
    folder.mkdir(parents=True, exist_ok=True)
    for start, (part, count) in enumerate((("train", 3), ("val", 1))):
        content = {"images": [], "annotations": []}
        for number in range(4 * count):
            category, identity = number % 4, 1000 * start + number
            name = f"{kingdoms[category]}/{category}/{identity}.jpg"
            lies = f"{category}/{identity}.jpg" if plain else name
            write_image(folder / images / lies, category + 100 * start)
            content["images"].append({"id": identity, "file_name": f"train_val{year}/{name}"})
            content["annotations"].insert(0, {"image_id": identity, "category_id": category})
        content["categories"] = [{"id": number, "name": str(number)} for number in species]
        (folder / f"{part}{year}.json").write_text(json.dumps(content))
    (folder / "categories.json").write_text(json.dumps([{"id": n, "name": name} for n, name in species.items()]))


@pytest.mark.parametrize(("images", "plain"), [("train_val2018", False), ("2018", False), ("train_val2018", True)])
def test_inaturalist_in_every_layout(tmp_path, four_species, images, plain):
    folder = tmp_path / "inat2018"
    write_inaturalist(folder, images=images, plain=plain)
    data = load("inat2018", root=tmp_path, image_px=4)
    assert data.class_names == ("Bufo bufo (1)", "Bufo bufo (2)", "Corvus corax", "Aster alpinus")
    assert (len(data.train) + len(data.validation), len(data.test)) == (12, 4)
    assert [value - 100 for value in values(data.test)] == data.test.labels.tolist()
    if images == "2018":
        reference = datasets.INaturalist(folder, "2018")
        known = {name: label for label, name in reference.index}
        found, _ = listed("inat2018", tmp_path)
        assert {Path(file).name: label for file, (label, _) in found.items()} == known
    (folder / "categories.json").unlink()
    assert load("inat2018", root=tmp_path, image_px=4).class_names == ("0", "1", "2", "3")


def test_inaturalist_that_is_incomplete_or_damaged_says_what(tmp_path, four_species):
    folder = tmp_path / "inat2018"
    write_inaturalist(folder)
    refused("inat2019", "train_val2019.tar.gz (74 GB)", root=tmp_path)  # another year is another data set
    whole = json.loads((folder / "val2018.json").read_text())
    for content, told in (
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        (json.dumps(whole | {"annotations": whole["annotations"][1:]}), "KeyError"),
        (json.dumps(whole | {"images": [{"id": 1, "file_name": "/etc/passwd"}]}), "leads out"),
    ):
        (folder / "val2018.json").write_text(content)
        refused("inat2018", "val2018.json", "damaged", told, root=tmp_path)
    (folder / "val2018.json").unlink()
    refused("inat2018", "lacks val2018.json", root=tmp_path)
    write_inaturalist(folder)
    (folder / "train_val2018" / "Aves" / "2" / "2.jpg").unlink()
    refused("inat2018", "1 of 16 images", "2.jpg", root=tmp_path)
    (folder / "categories.json").write_text("[]")
    refused("inat2018", "damaged", root=tmp_path)


def test_inaturalist_of_a_subset_is_not_taken_for_the_whole(tmp_path):
    write_inaturalist(tmp_path / "inat2018")
    refused("inat2018", "4 of the 8142 classes", root=tmp_path)


def test_inaturalist_as_folders_and_parquet_is_tested_on_its_validation_images(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED_SETS, "inat2018", replace(NAMED_SETS["inat2018"], classes=11,
                        spellings=lambda: (tuple(str(number) for number in range(11)),)))  # fmt: skip
    for start, (part, count) in enumerate((("train", 3), ("val", 1))):
        write_classes(tmp_path / "a" / "iNat2018" / part, {str(number): count for number in range(11)}, 1000 * start)
        labels = list(range(11)) * count
        write_parquet(tmp_path / "b" / "inat2018" / f"{part}-0.parquet", labels, start=1000 * start)
    write_parquet(tmp_path / "b" / "inat2018" / "test-0.parquet", [-1] * 5)  # without labels
    for root in (tmp_path / "a", tmp_path / "b"):
        data = load("inat2018", root=root)
        assert [value - 1000 for value in values(data.test)] == data.test.labels.tolist()  # 10 comes after 9


# ImageNet


@pytest.fixture(scope="module")
def wordnet_ids():
    from timm.data import ImageNetInfo

    return sorted(ImageNetInfo("imagenet-1k").label_names())


def write_imagenet(folder, wordnet_ids, flat):
    write_classes(folder / "train", dict.fromkeys(wordnet_ids, 2))
    if not flat:
        write_classes(folder / "val", dict.fromkeys(wordnet_ids, 1), start=3000)
        return []
    answers = np.random.default_rng(0).permutation(1000)
    for image, label in enumerate(answers, start=1):
        write_image(folder / "val" / f"ILSVRC2012_val_{image:08}.JPEG", int(3000 + label))
    return answers


def check_imagenet(root):
    data = load("imagenet", root=root, image_px=4)
    assert (len(data.train) + len(data.validation), len(data.test)) == (2000, 1000)
    for split, offset, per_class in ((data.train, 0, 2), (data.validation, 0, 2), (data.test, 3000, 1)):
        assert [(value - offset) // per_class for value in values(split)] == split.labels.tolist()
    assert data.class_names[0] == "tench, Tinca tinca"
    assert (data.class_names[134], data.class_names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert data.class_names[999].startswith("toilet tissue")
    assert len(set(data.class_names)) == 1000


def test_imagenet_in_class_folders(tmp_path, wordnet_ids):
    write_imagenet(tmp_path / "imagenet", wordnet_ids, flat=False)
    (tmp_path / "imagenet" / "test").mkdir()
    (tmp_path / "imagenet" / "test" / "1.JPEG").write_bytes(png(1))
    check_imagenet(tmp_path)
    found, _ = listed("imagenet", tmp_path)
    train, val = (datasets.ImageFolder(tmp_path / "imagenet" / part).samples for part in ("train", "val"))
    assert found == of_torchvision(train, val)


def write_devkit(folder, wordnet_ids, answers):
    (folder / "data").mkdir(parents=True)
    numbers = np.random.default_rng(1).permutation(1000) + 1  # the devkit numbers its classes in an order of its own
    rows = [(int(number), name) for number, name in zip(numbers, wordnet_ids, strict=True)] + [(1001, "n00001740")]
    rows.sort()
    synsets = np.array(rows, [("ILSVRC2012_ID", object), ("WNID", object)])[:, None]
    savemat(folder / "data" / "meta.mat", {"synsets": synsets})
    truth = "".join(f"{numbers[label]}\n" for label in answers)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def test_imagenet_with_a_flat_validation_folder(tmp_path, wordnet_ids):
    folder = tmp_path / "ILSVRC2012"
    answers = write_imagenet(folder, wordnet_ids, flat=True)
    refused("imagenet", "no class folders", "ILSVRC2012_devkit_t12.tar.gz", root=tmp_path)
    write_devkit(folder / "ILSVRC2012_devkit_t12", wordnet_ids, answers)
    check_imagenet(tmp_path)
    truth = folder / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("many\n")
    refused("imagenet", truth.name, "damaged", root=tmp_path)
    truth.unlink()
    refused("imagenet", f"lacks {truth.name}", root=tmp_path)


def test_imagenet_as_kaggle_lays_it_out(tmp_path, wordnet_ids):
    folder = tmp_path / "imagenet"
    answers = write_imagenet(folder / "ILSVRC" / "Data" / "CLS-LOC", wordnet_ids, flat=True)
    with (folder / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for image, label in reversed(list(enumerate(answers, start=1))):
            rows.writerow([f"ILSVRC2012_val_{image:08}", f"{wordnet_ids[label]} 1 2 3 4 {wordnet_ids[label]} 5 6 7 8"])
    check_imagenet(tmp_path)
    (folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000009.JPEG").unlink()
    refused("imagenet", "1 of 3000 images", "ILSVRC2012_val_00000009", root=tmp_path)


def test_imagenet_in_parquet_keeps_its_order_though_names_differ(tmp_path, wordnet_ids):
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k")
    names = [known.label_name_to_description(name) for name in wordnet_ids]
    names[517] = "construction crane"  # names of a schema must differ
    for start, (part, count) in enumerate((("train", 2), ("validation", 1))):
        path = tmp_path / "imagenet-1k" / "data" / f"{part}-00000-of-00001.parquet"
        write_parquet(path, np.repeat(np.arange(1000), count).tolist(), names, image="image", start=3000 * start,
                      row_group_size=500)  # fmt: skip
    write_parquet(tmp_path / "imagenet-1k" / "data" / "test-00000-of-00001.parquet", [-1] * 5, names, image="image")
    check_imagenet(tmp_path)


# All


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stanford_cars", "cars_test_annos_withlabels.mat"),
        ("inat2018", "train_val2018.tar.gz (120 GB)"),
        ("inat2019", "train_val2019.tar.gz (74 GB)"),
        ("imagenet", "ILSVRC2012_img_train.tar (138 GB)"),
    ],
)
def test_what_is_not_downloaded_says_where_it_looked_what_to_fetch_and_where_to_put_it(tmp_path, name, told):
    refused(name, f"'{tmp_path / name}'", f"'{tmp_path}'", told, "data.root", "DEITKIT_DATA", root=tmp_path)
    write_classes(tmp_path / "train", {"a": 5, "b": 5})  # the root may hold other data sets
    refused(name, told, root=tmp_path)


def test_large_sets_stream_as_folders_do(tmp_path, wordnet_ids):
    write_cars(tmp_path / "stanford_cars")
    kept = load("stanford_cars", root=tmp_path, image_px=4)
    streamed = load("stanford_cars", root=tmp_path, image_px=4, streaming=True, workers=0)
    order = torch.arange(len(kept.train))
    assert torch.equal(streamed.train.pixels(order), kept.train.images)
    assert streamed.mean == kept.mean
