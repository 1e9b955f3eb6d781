"""Which source a data set's name stands for."""

import difflib
from collections.abc import Callable
from pathlib import Path

import torch

from deitkit.data.listing import Listing, ProgressCallback
from deitkit.data.sources.folders import class_folders, list_folder, split_name
from deitkit.data.sources.named import NAMED_SETS, list_named
from deitkit.data.sources.parquet import list_parquet
from deitkit.data.sources.tables import list_csv
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from deitkit.recipe.section import from_home

DATASETS = ("digits", *NAMED_SETS)
DIGITS = (1, 8, 8)
SOURCES: dict[str, Callable[[Path], Listing]] = {"folder": list_folder, "parquet": list_parquet, "csv": list_csv}


def list_images_of(recipe: DataRecipe, progress: ProgressCallback | None) -> Listing:
    """Return the images of ``recipe.name``, not yet divided or decoded; raise DataError if it names no data set."""
    kind, colon, path = recipe.name.partition(":")
    if colon and kind in SOURCES:
        if not path:
            raise DataError(f"data.name={recipe.name} has no path: write {kind}:PATH")
        return SOURCES[kind](from_home(Path(path)))
    if recipe.name == "digits":
        return _list_digits()
    if recipe.name in NAMED_SETS:
        return list_named(recipe, progress)
    near = difflib.get_close_matches(recipe.name, DATASETS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    place = from_home(Path(recipe.name))
    if place.exists() or place.suffix in (".csv", ".tsv", ".parquet"):
        hint = f"did you mean {_kind_of(place)}:{recipe.name}? "
    allowed = ", ".join(DATASETS)
    raise DataError(
        f"data.name={recipe.name} is not a data set: {hint}Choose {allowed}, folder:PATH, parquet:PATH or csv:FILE"
    )


def folder_within(name: str) -> str:
    """Ask whether the only folder within a folder is meant, as of an unpacked archive; empty if it holds no classes."""
    kind, _, path = name.partition(":")
    outer = class_folders(from_home(Path(path))) if kind == "folder" else {}
    inner = {split_name(folder) for only in outer.values() for folder in class_folders(only)}
    looks_like_data = len(outer) == 1 and (len(inner) > 1 or "train" in inner)
    return f"did you mean {name.rstrip('/')}/{next(iter(outer))}?" if looks_like_data else ""


def known_shape(name: str) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images of a data set with a name; None if their sizes differ."""
    if name == "digits":
        return DIGITS
    return NAMED_SETS[name].shape if name in NAMED_SETS else None


def known_classes(name: str) -> int | None:
    """Return the number of classes of a data set with a name; None for one of the user's."""
    if name == "digits":
        return 10
    return NAMED_SETS[name].classes if name in NAMED_SETS else None


def _kind_of(path: Path) -> str:
    """Return which kind of source an existing path is."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    holds_parquet = path.suffix == ".parquet" or next(path.glob("**/*.parquet"), None) is not None
    return "parquet" if holds_parquet else "folder"


def _list_digits() -> Listing:
    from sklearn.datasets import load_digits  # here, since it takes a second to import

    digits = load_digits()
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
    names = tuple(str(name) for name in digits.target_names)
    return Listing(images[:, None], torch.from_numpy(digits.target).long(), None, names)
