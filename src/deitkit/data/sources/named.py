"""The named data sets: their locations and layouts, and downloading missing ones."""

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from deitkit.data.decode_many import decode_images
from deitkit.data.listing import EncodedImages, Listing, ProgressCallback
from deitkit.data.sources.archives import (
    imagenet_names,
    read_cars,
    read_flowers,
    read_imagenet,
    read_inaturalist,
)
from deitkit.data.sources.folders import (
    TESTED_ON_VALIDATION,
    VALIDATION_NAMES,
    WITHOUT_VALIDATION,
    SplitNames,
    class_folders,
    list_folder,
)
from deitkit.data.sources.parquet import configurations, has_shards, list_parquet
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from deitkit.recipe.section import from_home
from deitkit.system.network import no_endless_wait, unreachable

DOWNLOADING = ".deitkit-download.lock"  # in a folder of data sets, while one is downloaded there
_IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


@dataclass(frozen=True)
class NamedSet:
    """A data set with a name: how to recognise it, and how to obtain it.

    Attributes:
        classes: Number of classes.
        aliases: Names of its folder, besides its own name.
        read: Reads its special layout, torchvision's or that of its archives; None if a folder has another layout.
        torchvision: The class of torchvision that downloads it; empty if the user must download it.
        url: Where that class gets it from.
        fetch: What the user must download, from where, and its size; of a set of torchvision's also whereto, as a
            folder in ``{root}``.
        shape: Shape of its images, which are then decoded at once; None if their sizes differ.
        splits: Names of its splits in class folders and parquet files.
        spellings: Returns the class names in their official order, then alternative spellings of all of them.
    """

    classes: int
    aliases: tuple[str, ...]
    read: Callable[[Path], Listing | None]
    torchvision: str = ""
    url: str = ""
    fetch: str = ""
    shape: tuple[int, int, int] | None = None
    splits: SplitNames = WITHOUT_VALIDATION
    spellings: Callable[[], Sequence[Sequence[str]]] = tuple


def list_named(recipe: DataRecipe, progress: ProgressCallback | None = None) -> Listing:
    """Find a data set of ``NAMED_SETS`` on the disk, or download it; images of one size are decoded.

    Search ``recipe.root``, else ``$DEITKIT_DATA``, else ``~/.cache/deitkit``: a folder with the name of the data set,
    then the root itself, for parquet shards, torchvision's layout or that of its archives, or class folders.

    Raises:
        DataError: It is not found and cannot be downloaded, or the folder has another or a damaged data set.
    """
    named = NAMED_SETS[recipe.name]
    root = from_home(recipe.root or Path(os.environ.get("DEITKIT_DATA") or "~/.cache/deitkit"))
    places = [*(root / alias for alias in (recipe.name, *named.aliases)), root]
    if (root / DOWNLOADING).exists():  # by another process, whose half a file would be taken for a damaged one
        with suppress(OSError), FileLock(root / DOWNLOADING):  # it may be another user's, left by a kill
            pass
    listing = _find(named, places, recipe, progress)
    if listing is None:
        absent = f"{recipe.name} is neither in '{places[0]}' nor in '{root}', and "
        if not named.torchvision:
            raise DataError(
                f"{absent}is not downloaded by deitkit: {named.fetch} there (docs/own-data.md has the layouts), or "
                "set data.root or DEITKIT_DATA to its folder"
            )
        if not recipe.download:
            raise DataError(
                f"{absent}data.download=false: set it to true, set data.root or DEITKIT_DATA to its folder, or use "
                "data.name=digits, which is built in"
            )
        reason = unreachable(named.url)
        try:
            if reason is None:
                with _downloading(root), no_endless_wait():
                    _torchvision_class(named.torchvision)(str(root), download=True)
        except (OSError, RuntimeError, EOFError, zlib.error) as error:
            reason = " ".join(str(error).split())[:200]
        if reason is not None:
            fetch = named.fetch.format(root=root)
            raise DataError(
                f"{absent}cannot be downloaded ({reason}): connect to the internet; or fetch {fetch} and run again; or "
                "set data.root or DEITKIT_DATA to its folder, or use data.name=digits, which is built in"
            )
        listing = _find(named, places, recipe, progress)
    assert listing is not None, "a completed download is found"
    return listing


@contextmanager
def _downloading(root: Path) -> Iterator[None]:
    """Let one process at a time download into a folder; what the first has downloaded, the next finds."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / DOWNLOADING):
        try:
            yield
        finally:
            (root / DOWNLOADING).unlink(missing_ok=True)


def _find(named: NamedSet, places: list[Path], recipe: DataRecipe, progress: ProgressCallback | None) -> Listing | None:
    for place in places:
        listing = _list_at(named, place, recipe.name) or _list_inside(named, place, is_root=place == places[-1])
        if listing is None:
            continue
        if listing.official_test is None:
            raise DataError(f"'{place}' contains no test split of {recipe.name}: add it, or set another data.root")
        if named.shape is not None:
            listing = _decoded(listing, named.shape, place, recipe, progress)
        return _in_official_order(listing, named.spellings())
    return None


def _list_inside(named: NamedSet, place: Path, *, is_root: bool) -> Listing | None:
    """List the data set if it is in a configuration of the Hub in this folder.

    In the root, where other data sets may lie, a folder is one of them unless it has the name of the Hub's usual
    configurations, or classes with the names of this data set.
    """
    inner = configurations(place)
    if not inner:
        return None
    if not is_root or {*inner} & {"default", "plain_text"}:
        return _of_classes(named, list_parquet(place, named.splits))
    # Ten or a hundred numbers may be the classes of any data set.
    telling = [names for names in named.spellings() if named.classes > 100 or not names[0].isdecimal()]
    for name in inner:
        with suppress(DataError):
            listing = _of_classes(named, list_parquet(place / name, named.splits))
            if listing is not None and any(_agree(names, listing.class_names) for names in telling):
                return listing
    return None


def _of_classes(named: NamedSet, listing: Listing) -> Listing | None:
    """Return a listing if it has as many classes as the data set."""
    return listing if len(listing.class_names) == named.classes else None


def _list_at(named: NamedSet, place: Path, name: str) -> Listing | None:
    """List the data set if it is in this folder, in any layout; return None if the folder has something else."""
    if has_shards(place):
        return _of_classes(named, list_parquet(place, named.splits))
    if (found := named.read(place)) is not None:
        if len(found.class_names) != named.classes:
            raise DataError(
                f"'{place}' has {len(found.class_names)} of the {named.classes} classes of {name}: unpack it again"
            )
        return found
    if len(class_folders(place / "train")) == named.classes:
        return _of_classes(named, list_folder(place, named.splits))
    return None


def _in_official_order(listing: Listing, spellings: Sequence[Sequence[str]]) -> Listing:
    """Number the classes in their official order, under any known spelling; leave unknown names unchanged."""
    given = listing.class_names
    for names in spellings:
        plain, found = (names, given) if set(names) == set(given) else (_plain(names), _plain(given))
        if set(plain) == set(found) and len(set(plain)) == len(given):
            place = {name: label for label, name in enumerate(plain)}
            if found is not given and found == plain:
                return listing  # in another spelling, which stays, but in order
            labels = torch.tensor([place[name] for name in found])[listing.labels]
            return replace(listing, labels=labels, class_names=tuple(spellings[0]))
        if _agree(names, given):
            return replace(listing, class_names=tuple(spellings[0]))
    return listing


def _plain(names: Sequence[str]) -> list[str]:
    """Return names as folders and files spell them in many ways: letters and digits alone, in lower case."""
    return [re.sub(r"[\W_]+", "", name).casefold() for name in names]


def _agree(names: Sequence[str], given: Sequence[str]) -> bool:
    """Return whether class names are those of a data set: all in any order, or nine in ten in their places.

    The rest are then other spellings.
    """
    same = sum(one == other for one, other in zip(names, given, strict=False))
    return set(names) == set(given) or same >= 0.9 * max(len(names), len(given))


def _decoded(
    listing: Listing, shape: tuple[int, int, int], place: Path, recipe: DataRecipe, progress: ProgressCallback | None
) -> Listing:
    """Decode images of one size at that size, unless they are pixels already."""
    if isinstance(listing.images, EncodedImages):
        native = recipe.model_copy(update={"image_px": None, "channels": shape[0]})
        decoded = decode_images(listing.images, torch.arange(len(listing.labels)), native, progress)
        assert listing.official_test is not None
        listing = replace(
            listing,
            images=decoded.images,
            labels=listing.labels[decoded.kept],
            official_test=listing.official_test[decoded.kept],
            skipped=decoded.skipped,
        )
    assert not isinstance(listing.images, EncodedImages)
    found = tuple(listing.images.shape[1:])
    if found != shape:
        raise DataError(
            f"the data set in '{place}' is not {recipe.name}: its images are {found} instead of {shape}; "
            "set data.root to another folder, or data.name=folder:PATH or parquet:PATH"
        )
    return listing


def _torchvision_class(name: str) -> Any:
    from torchvision import datasets  # here, since it takes a second to import

    return getattr(datasets, name)


def _read_cifar(name: str, place: Path) -> Listing | None:
    """Read torchvision's layout of CIFAR; only torchvision unpickles it, after verifying its checksum."""
    kind = _torchvision_class(name)
    first_batch = kind.train_list[0][0]
    folder = next((f for f in (place / kind.base_folder, place) if (f / first_batch).is_file()), None)
    if folder is None:
        return None
    # A subclass without the subfolder reads the batches from any folder.
    here = type(kind.__name__, (kind,), {"base_folder": ""})
    try:
        train, test = here(str(folder), train=True), here(str(folder), train=False)
    except (OSError, RuntimeError) as error:
        raise DataError(f"'{folder}' is incomplete or damaged ({error}): delete it and run again") from None
    pixels = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    return _listing(pixels, train.targets, test.targets, train.classes)


def _read_fashion_mnist(place: Path) -> Listing | None:
    for folder in (place / "FashionMNIST" / "raw", place / "raw", place):
        arrays = [_read_idx(folder, f"{split}-{kind}") for kind in _IDX_KINDS for split in ("train", "t10k")]
        train_images, test_images, train_labels, test_labels = arrays
        if train_images is None or test_images is None or train_labels is None or test_labels is None:
            continue
        images = np.concatenate([train_images, test_images])[:, None]
        return _listing(images, train_labels, test_labels, _torchvision_class("FashionMNIST").classes)
    return None


def _read_idx(folder: Path, name: str) -> np.ndarray | None:
    """Return the array in an idx file (LeCun's format for MNIST), plain or gzipped; None if there is none."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        return None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\0\0\x08":  # two zeros, then the type: unsigned bytes
            raise ValueError("not an idx file of bytes")
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


def _names_or_numbers(name: str, first: int) -> tuple[tuple[str, ...], ...]:
    """Return the class names of a data set of torchvision's, or their numbers from ``first``."""
    names = tuple(_torchvision_class(name).classes)
    return names, _numbers(first, len(names))


def _numbers(first: int, count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(first, first + count))


def _inaturalist(year: int, classes: int, size: str) -> NamedSet:
    return NamedSet(
        classes,
        (f"inaturalist-{year}", f"iNaturalist{year}", f"iNat{year}"),
        partial(read_inaturalist, year),
        fetch=(
            f"fetch train_val{year}.tar.gz ({size}), train{year}.json.tar.gz, val{year}.json.tar.gz and "
            f"categories.json.tar.gz of {year} from github.com/visipedia/inat_comp and unpack them"
        ),
        splits=TESTED_ON_VALIDATION,
        spellings=lambda: (_numbers(0, classes),),
    )


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = tuple(f"{split}-{kind}" for split in ("train", "t10k") for kind in _IDX_KINDS)
FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
NAMED_SETS = {
    "cifar10": NamedSet(
        10,
        ("cifar-10", "CIFAR10", "CIFAR-10", "cifar-10-batches-py"),
        partial(_read_cifar, "CIFAR10"),
        torchvision="CIFAR10",
        url=f"{CIFAR_URL}cifar-10-python.tar.gz",
        fetch=f"{CIFAR_URL}cifar-10-python.tar.gz (170 MB) elsewhere, put it into {{root}}",
        shape=(3, 32, 32),
    ),
    "cifar100": NamedSet(
        100,
        ("cifar-100", "CIFAR100", "CIFAR-100", "cifar-100-python"),
        partial(_read_cifar, "CIFAR100"),
        torchvision="CIFAR100",
        url=f"{CIFAR_URL}cifar-100-python.tar.gz",
        fetch=f"{CIFAR_URL}cifar-100-python.tar.gz (169 MB) elsewhere, put it into {{root}}",
        shape=(3, 32, 32),
        spellings=lambda: (_numbers(0, 100),),
    ),
    "fashion_mnist": NamedSet(
        10,
        ("fashion-mnist", "FashionMNIST", "Fashion-MNIST"),
        _read_fashion_mnist,
        torchvision="FashionMNIST",
        url=FASHION_URL,
        fetch=(
            f"{', '.join(f'{file}.gz' for file in FASHION_FILES)} (30 MB) from {FASHION_URL} elsewhere, "
            "put them into {root}/FashionMNIST/raw"
        ),
        shape=(1, 28, 28),
        spellings=partial(_names_or_numbers, "FashionMNIST", 0),
    ),
    "flowers102": NamedSet(
        102,
        ("flowers-102", "Flowers102", "oxford-flowers", "oxford_flowers102"),
        read_flowers,
        torchvision="Flowers102",
        url=FLOWERS_URL,
        fetch=(
            f"102flowers.tgz (345 MB), imagelabels.mat and setid.mat from {FLOWERS_URL} elsewhere, put them into "
            "{root}/flowers-102"
        ),
        splits=SplitNames(("test",), (), more_training=VALIDATION_NAMES),
        spellings=partial(_names_or_numbers, "Flowers102", 1),
    ),
    "stanford_cars": NamedSet(
        196,
        ("stanford-cars", "StanfordCars", "cars", "car_data"),
        read_cars,
        fetch=(
            "its website is offline, so fetch cars_train, cars_test, car_devkit and cars_test_annos_withlabels.mat (2 "
            "GB) as described in github.com/pytorch/vision/issues/7545 and unpack them"
        ),
    ),
    "inat2018": _inaturalist(2018, 8142, "120 GB"),
    "inat2019": _inaturalist(2019, 1010, "74 GB"),
    "imagenet": NamedSet(
        1000,
        ("ImageNet", "imagenet-1k", "ILSVRC2012", "ilsvrc2012"),
        read_imagenet,
        fetch=(
            "sign in at image-net.org, fetch ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB) and "
            "ILSVRC2012_devkit_t12.tar.gz and unpack them"
        ),
        splits=TESTED_ON_VALIDATION,
        spellings=imagenet_names,
    ),
}
