"""The images of a run: read as when it began, the same as then, and of one data set at a time."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, ParamSpec

import torch

from deitkit.data.cache import sha256
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import CheckpointError
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.run.folder import read_environment
from deitkit.run.layout import fold_folder
from deitkit.run.observer import Watcher

Arguments = ParamSpec("Arguments")


def load_images(recipe: Recipe, folder: Path, watcher: Watcher, dataset: Dataset | None = None) -> Dataset:
    """Load the images of a recipe, with labels and without, and check that they are those with which the run began.

    Args:
        recipe: Its ``data``.
        folder: Of the run, which may have begun.
        watcher: Receives progress.
        dataset: All of them, if they are loaded already.

    Raises:
        CheckpointError: The run was begun with other images.
        DataError: They are missing or malformed.
    """
    data = as_begun(recipe.data, folder)
    if dataset is None:
        dataset = load_dataset(data, watcher.reading, random_crops=recipe.has_random_crops)
    require_same_images(dataset, folder)
    for other in _other_folds(data, folder):
        require_same_images(dataset, other, "all_images")
    return dataset


def _other_folds(data: DataRecipe, folder: Path) -> list[Path]:
    """Return the run folders of all folds of a cross-validation that uses all images, of which one is in a folder."""
    whole, limits = folder.parent.parent, (data.train_images, data.test_images)
    if data.fold is None or folder != fold_folder(whole, data.fold) or limits != (None, None):
        return []
    return [fold_folder(whole, fold) for fold in range(1, (data.folds or 0) + 1)]


def require_same_images(dataset: Dataset, folder: Path, which: Literal["images", "all_images"] = "images") -> None:
    """Raise CheckpointError if a run folder was begun with other images or labels.

    Args:
        dataset: The images of now.
        folder: Of the run, which may have begun.
        which: ``all_images`` for the folder of another fold, which divides the same images in another way.
    """
    recorded = read_environment(folder).get(which)
    if recorded is not None and recorded != describe_images(dataset)[which]:
        raise CheckpointError(
            f"{folder} was begun with other images or labels than data.name={dataset.name} has now, and rows are "
            "compared on the same images: restore them, or name a new folder (if only Pillow has another version "
            f"here, delete {folder / 'environment.json'})"
        )


def as_begun(data: DataRecipe, folder: Path) -> DataRecipe:
    """Return a recipe's data, streamed or not as when a run folder was begun, however much memory is free now."""
    streamed = read_environment(folder).get("streamed")
    if data.streaming != "auto" or streamed is None:
        return data
    return data.model_copy(update={"streaming": streamed})


def describe_images(dataset: Dataset) -> dict[str, str]:
    """Return a SHA-256 over the pixels and labels of all splits and the class names, the same however they are read.

    Returns:
        ``splits``: of those with labels; ``images``: of these, and of the images without labels; ``all_images``: of the
        images with labels in whatever split and order.
    """
    labelled = [dataset.train, dataset.validation, dataset.test]
    labels = torch.cat([split.labels.cpu() for split in labelled])
    unlabelled = torch.zeros(0, dtype=torch.int64) if dataset.unlabelled is None else dataset.unlabelled.hashes
    hashes = [split.hashes for split in labelled]
    together = torch.cat([split.hashes for split in labelled])
    order = labels.argsort(stable=True)
    order = order[together[order].argsort(stable=True)]  # by hash, and equal images by label
    return {
        "splits": _sha256([sha256(*hashes, labels), dataset.class_names]),
        "images": _sha256([sha256(*hashes, unlabelled, labels), dataset.class_names]),
        "all_images": _sha256([sha256(together[order], labels[order]), dataset.class_names]),
    }


def _sha256(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def cache_last(load: Callable[Arguments, Dataset]) -> Callable[Arguments, Dataset]:
    """Let a loader keep its last data set, and free it before it loads another, since two may not fit in memory."""
    kept: dict[Any, Dataset] = {}

    def load_or_take(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Dataset:
        key = args, *sorted(kwargs.items())
        if key not in kept:
            kept.clear()
            kept[key] = load(*args, **kwargs)
        return kept[key]

    return load_or_take
