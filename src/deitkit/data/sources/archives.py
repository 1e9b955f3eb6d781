"""Data sets whose archives store labels separately from images: Flowers-102, Stanford Cars, iNaturalist and ImageNet.

Each reader returns the images and labels in a folder, or None if the folder contains something else. Every image in the
annotations must exist. Nothing is unpickled: SciPy reads MATLAB's files as arrays.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from deitkit.data.listing import EncodedImages, Listing
from deitkit.data.sources.folders import TESTED_ON_VALIDATION, class_folders, encoded_files, list_folder
from deitkit.errors import DataError

_Samples = list[tuple[Path, int]]


def read_flowers(place: Path) -> Listing | None:
    """Read Flowers-102 (Nilsback & Zisserman 2008): ``jpg/``, ``imagelabels.mat`` and ``setid.mat``, as torchvision.

    The training split combines its training and validation images, 1,020 each, as in the DeiT paper (Table 6: 2,040).
    """
    label_file, set_file = place / "imagelabels.mat", place / "setid.mat"
    if not label_file.is_file() and not set_file.is_file():
        return None
    from torchvision import datasets  # here, since it takes a second to import

    (labels,) = _read_mat(label_file, "labels")
    sets = _read_mat(set_file, "trnid", "valid", "tstid")
    with _annotations(set_file):
        train, validation, test = (
            [(place / "jpg" / f"image_{number:05}.jpg", int(labels[number - 1]) - 1) for number in numbers.tolist()]
            for numbers in sets
        )
    return _list(place, (train + validation, test), datasets.Flowers102.classes)


def read_cars(place: Path) -> Listing | None:
    """Read Stanford Cars (Krause et al. 2013), in either of its released layouts.

    ``cars_train/`` and ``cars_test/`` with ``devkit/`` and ``cars_test_annos_withlabels.mat``, as torchvision; or
    ``car_ims/`` with ``cars_annos.mat``. Nested folders from a zip file (``cars_train/cars_train/``) are supported.
    """
    kit = next((place / name for name in ("devkit", "car_devkit/devkit") if (place / name).is_dir()), place)
    if not (kit / "cars_meta.mat").is_file():
        return _read_cars_together(place)
    (class_names,) = _read_mat(kit / "cars_meta.mat", "class_names")
    labelled = "cars_test_annos_withlabels.mat"
    parts: list[_Samples] = []
    for name, file in (
        ("cars_train", kit / "cars_train_annos.mat"),
        ("cars_test", kit / labelled if (kit / labelled).is_file() else place / labelled),
    ):
        folder = place / name / name if (place / name / name).is_dir() else place / name
        (rows,) = _read_mat(file, "annotations")
        with _annotations(file):
            parts.append([(_inside(folder, row["fname"]), int(row["class"]) - 1) for row in rows])
    return _list(place, parts, class_names.tolist())


def _read_cars_together(place: Path) -> Listing | None:
    file = place / "cars_annos.mat"
    if not file.is_file():
        return None
    rows, class_names = _read_mat(file, "annotations", "class_names")
    parts: list[_Samples] = [[], []]
    with _annotations(file):
        for row in rows:
            parts[bool(row["test"])].append((_inside(place, row["relative_im_path"]), int(row["class"]) - 1))
    return _list(place, parts, class_names.tolist())


def read_inaturalist(year: int, place: Path) -> Listing | None:
    """Read iNaturalist 2018 or 2019: ``train_val{year}/`` with ``train{year}.json`` and ``val{year}.json``.

    Classes are numbered by category. Their names come from ``categories.json`` if it exists, since the names in the
    annotations are obfuscated. The validation images are the test split: labels of the official test images are not
    public. Images may also be in ``{year}/`` (torchvision), or without the folders of super-categories (as the released
    DeiT code reads them).

    Source: https://github.com/visipedia/inat_comp
    """
    files = [place / f"{part}{year}.json" for part in ("train", "val")]
    if not any(file.is_file() for file in files):
        return None
    contents = [_read_json(file) for file in files]
    named = place / "categories.json"
    with _annotations(named if named.is_file() else files[0]):
        categories = _read_json(named) if named.is_file() else contents[0]["categories"]
        names = dict(sorted((int(entry["id"]), str(entry["name"])) for entry in categories))
    label = {category: index for index, category in enumerate(names)}
    parts: list[_Samples] = []
    for file, content in zip(files, contents, strict=True):
        with _annotations(file):
            category = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
            paths = _inaturalist_paths(place, year, [image["file_name"] for image in content["images"]])
            labels = [label[category[image["id"]]] for image in content["images"]]
            parts.append(list(zip(paths, labels, strict=True)))
    return _list(place, parts, list(names.values()))


def _inaturalist_paths(place: Path, year: int, names: list[str]) -> list[Path]:
    """Return the paths in the layout of the archive, torchvision or DeiT, whichever contains the first image."""
    archive = [_inside(place, name) for name in names]
    parts = [path.relative_to(place).parts for path in archive]
    torchvision = [place.joinpath(str(year), *some[1:]) for some in parts]
    deit = [place.joinpath(some[0], *some[-2:]) for some in parts]
    return next((paths for paths in (archive, torchvision, deit) if paths[0].is_file()), archive)


def read_imagenet(place: Path) -> Listing | None:
    """Read ImageNet (ILSVRC 2012) in layouts other than plain class folders: Kaggle's, or a flat ``val/``.

    The labels of a flat ``val/`` come from Kaggle's ``LOC_val_solution.csv`` or from the official devkit. Class folders
    are named by WordNet ids; their sorted order is that of all published models.
    """
    kaggle = place / "ILSVRC" / "Data" / "CLS-LOC"
    base = kaggle if kaggle.is_dir() else place
    if not class_folders(base / "train") or not (base / "val").is_dir():
        return None
    if class_folders(base / "val"):
        return list_folder(base, TESTED_ON_VALIDATION) if base is kaggle else None
    training = list_folder(base / "train")
    assert isinstance(training.images, EncodedImages)
    assert training.images.files is not None
    file, solutions = _imagenet_solutions(place, base)
    label = {wordnet_id: index for index, wordnet_id in enumerate(training.class_names)}
    with _annotations(file):
        test = [(_inside(base / "val", f"{name}.JPEG"), label[wordnet_id]) for name, wordnet_id in solutions]
    train = list(zip(training.images.files, training.labels.tolist(), strict=True))
    return _list(base, (train, test), training.class_names)


def _imagenet_solutions(place: Path, base: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Return the file with the classes of the validation images, and its content: names and WordNet ids."""
    solution, kit = place / "LOC_val_solution.csv", base / "ILSVRC2012_devkit_t12" / "data"
    if solution.is_file():
        with _annotations(solution), solution.open(newline="", encoding="utf-8") as lines:
            return solution, [(row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(lines)]
    if not kit.is_dir():
        raise DataError(
            f"'{base / 'val'}' contains no class folders, and neither '{solution}' nor '{kit.parent}' exists: "
            "unpack ILSVRC2012_devkit_t12.tar.gz there, or sort the images into class folders"
        )
    (synsets,) = _read_mat(kit / "meta.mat", "synsets")
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    with _annotations(truth):
        wordnet_ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = [int(number) for number in truth.read_text(encoding="ascii").split()]
        return truth, [(f"ILSVRC2012_val_{image:08}", wordnet_ids[n]) for image, n in enumerate(numbers, start=1)]


def imagenet_names() -> tuple[tuple[str, ...], ...]:
    """Return timm's names of ImageNet's classes, and their WordNet ids, both in the usual order."""
    from timm.data import ImageNetInfo  # here, since it takes a second to import

    info = ImageNetInfo("imagenet-1k")
    wordnet_ids = tuple(info.label_names())
    return _distinct([info.label_name_to_description(name) for name in wordnet_ids], wordnet_ids), wordnet_ids


def _list(folder: Path, parts: Sequence[_Samples], class_names: Sequence[str]) -> Listing:
    """Combine training and test images, with a distinct name for each class."""
    train, test = parts
    samples = train + test
    wrong = next((label for _, label in samples if not 0 <= label < len(class_names)), None)
    if wrong is not None:
        raise DataError(
            f"the annotations in '{folder}' number a class {wrong + 1} of {len(class_names)}: download them again"
        )
    numbers = range(1, len(class_names) + 1)
    return Listing(
        encoded_files(folder, [path for path, _ in samples]),
        torch.tensor([label for _, label in samples]),
        torch.arange(len(samples)) >= len(train),
        _distinct([str(name) for name in class_names], numbers),
    )


def _distinct(names: Sequence[str], numbers: Sequence[object]) -> tuple[str, ...]:
    """Append its number to a name that several classes share, such as ImageNet's two cranes."""
    values, counts = np.unique(np.asarray(names), return_counts=True)
    shared = set(values[counts > 1].tolist())
    return tuple(f"{name} ({number})" if name in shared else name for name, number in zip(names, numbers, strict=True))


def _inside(folder: Path, name: str) -> Path:
    """Return a path from annotations; raise ValueError if it leads out of the folder."""
    path = PurePosixPath(str(name))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"'{name}' leads out of the folder")
    return folder / path


def _read_mat(file: Path, *names: str) -> list[np.ndarray]:
    """Return arrays from a MATLAB file; SciPy executes no code from it."""
    from scipy.io import loadmat

    with _annotations(file), file.open("rb") as stream:  # given a name, SciPy would raise messages of its own
        content = loadmat(stream, squeeze_me=True, variable_names=names)
        return [np.atleast_1d(content[name]) for name in names]


def _read_json(file: Path) -> Any:
    with _annotations(file):
        return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def _annotations(file: Path) -> Iterator[None]:
    """Convert any error of reading a file, by SciPy, json or an index, to a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"'{file.parent}' lacks {file.name}: put it there (docs/own-data.md has the layouts)") from None
    except Exception as error:
        raise DataError(f"'{file}' is damaged ({type(error).__name__}: {error}): download it again") from None
