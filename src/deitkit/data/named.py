"""The named data sets: where each may lie, in which forms, and how one that is absent is downloaded."""

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from deitkit.data.decode import decode_images
from deitkit.data.folders import has_class_folders, list_folder
from deitkit.data.listing import EncodedImages, Listing, Progress
from deitkit.data.parquet import has_shards, list_parquet
from deitkit.errors import DataError
from deitkit.recipe import DataRecipe


@dataclass(frozen=True)
class _NamedSet:
    """A data set of images of one size, and how to recognise it."""

    torchvision: type[datasets.VisionDataset]
    classes: int
    shape: tuple[int, int, int]
    aliases: tuple[str, ...]
    read: Callable[["_NamedSet", Path], Listing | None]


def list_named(recipe: DataRecipe, progress: Progress | None = None) -> Listing:
    """Find a data set of ``DOWNLOADABLE`` on the disk, or download it, and return it decoded at its own size.

    Looked for in ``recipe.root``, else ``$DEITKIT_DATA``, else ``~/.cache/deitkit``: in a folder called like the data
    set and in the root itself, as parquet shards, in torchvision's layout, or in class folders.

    Raises:
        DataError: It is nowhere and cannot be downloaded, or what lies there is another data set or damaged.
    """
    named = _NAMED[recipe.name]
    root = (recipe.root or Path(os.environ.get("DEITKIT_DATA") or "~/.cache/deitkit")).expanduser()
    places = [*(root / alias for alias in (recipe.name, *named.aliases)), root]
    listing = _find(named, places, recipe, progress)
    if listing is None:
        if not recipe.download:
            raise DataError(
                f"{recipe.name} is neither in '{places[0]}' nor in '{root}', and {_remedy(recipe, download=True)}"
            )
        _download(named, root, recipe)
        listing = _find(named, places, recipe, progress)
    assert listing is not None, "a completed download is found"
    return listing


def _find(named: _NamedSet, places: list[Path], recipe: DataRecipe, progress: Progress | None) -> Listing | None:
    native = recipe.model_copy(update={"image_px": None, "channels": named.shape[0]})
    for place in places:
        if has_shards(place):
            listing = list_parquet(place)
        elif (found := named.read(named, place)) is not None:
            listing = found
        elif has_class_folders(place):
            listing = list_folder(place)
        else:
            continue
        if len(listing.class_names) != named.classes:
            continue  # the root may well hold some other data set
        if listing.official_test is None:
            raise DataError(f"'{place}' holds no test split of {recipe.name}: add it or point data.root elsewhere")
        listing = _decoded(listing, native, progress)
        assert not isinstance(listing.images, EncodedImages)
        shape = tuple(listing.images.shape[1:])
        if shape != named.shape:
            raise DataError(
                f"what lies in '{place}' is not {recipe.name}, its images are {shape} instead of {named.shape}: "
                "set data.root to another folder, or data.name=folder:PATH or parquet:PATH"
            )
        return listing
    return None


def _decoded(listing: Listing, native: DataRecipe, progress: Progress | None) -> Listing:
    if not isinstance(listing.images, EncodedImages):
        return listing
    decoded = decode_images(listing.images, torch.arange(len(listing.labels)), native, progress)
    assert listing.official_test is not None
    labels, official_test = listing.labels[decoded.kept], listing.official_test[decoded.kept]
    return Listing(decoded.images, labels, official_test, listing.class_names, decoded.skipped)


def _download(named: _NamedSet, root: Path, recipe: DataRecipe) -> None:
    try:
        named.torchvision(str(root), train=True, download=True)
    except (OSError, RuntimeError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{recipe.name} is neither in '{root / recipe.name}' nor in '{root}', and cannot be downloaded ({reason}): "
            f"{_remedy(recipe, download=False)}"
        ) from None


def _remedy(recipe: DataRecipe, download: bool) -> str:
    first = "data.download=false: set it to true" if download else "connect to the internet"
    return f"{first}, put it there, point data.root or DEITKIT_DATA to it, or use data.name=digits, which is built in"


def _read_cifar(named: _NamedSet, place: Path) -> Listing | None:
    """Read torchvision's layout of CIFAR; only torchvision unpickles it, and only after its own checksum."""
    first_batch = named.torchvision.train_list[0][0]
    folder = next((f for f in (place / named.torchvision.base_folder, place) if (f / first_batch).is_file()), None)
    if folder is None:
        return None
    # A subclass without the subfolder reads the batches wherever they lie.
    here = type(named.torchvision.__name__, (named.torchvision,), {"base_folder": ""})
    try:
        train, test = here(str(folder), train=True), here(str(folder), train=False)
    except (OSError, RuntimeError) as error:
        raise DataError(f"'{folder}' is incomplete or damaged ({error}): delete it and run again") from None
    pixels = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    return _listing(pixels, train.targets, test.targets, train.classes)


def _read_idx_files(named: _NamedSet, place: Path) -> Listing | None:
    for folder in (place / "FashionMNIST" / "raw", place / "raw", place):
        arrays = [
            _read_idx(folder, f"{split}-{kind}")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
            for split in ("train", "t10k")
        ]
        train_images, test_images, train_labels, test_labels = arrays
        if train_images is None or test_images is None or train_labels is None or test_labels is None:
            continue
        images = np.concatenate([train_images, test_images])[:, None]
        return _listing(images, train_labels, test_labels, named.torchvision.classes)
    return None


def _read_idx(folder: Path, name: str) -> np.ndarray | None:
    """Return the array in an idx file (LeCun's format for MNIST), plain or gzipped; None if there is none."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        return None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\0\0\x08":  # two zeros, then the type: unsigned bytes
            raise ValueError("no idx file of bytes")
        axes = content[3]
        shape = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"'{path}' is damaged ({error}): delete it and run again") from None


def _listing(pixels: np.ndarray, train_labels: object, test_labels: object, class_names: list[str]) -> Listing:
    train, test = np.asarray(train_labels, np.int64), np.asarray(test_labels, np.int64)
    labels = torch.from_numpy(np.concatenate([train, test]))
    official_test: Tensor = torch.arange(len(labels)) >= len(train)
    return Listing(torch.from_numpy(np.ascontiguousarray(pixels)), labels, official_test, tuple(class_names))


_NAMED = {
    "cifar10": _NamedSet(
        datasets.CIFAR10, 10, (3, 32, 32), ("cifar-10", "CIFAR10", "CIFAR-10", "cifar-10-batches-py"), _read_cifar
    ),
    "cifar100": _NamedSet(
        datasets.CIFAR100, 100, (3, 32, 32), ("cifar-100", "CIFAR100", "CIFAR-100", "cifar-100-python"), _read_cifar
    ),
    "fashion_mnist": _NamedSet(
        datasets.FashionMNIST, 10, (1, 28, 28), ("fashion-mnist", "FashionMNIST", "Fashion-MNIST"), _read_idx_files
    ),
}
DOWNLOADABLE = tuple(_NAMED)
