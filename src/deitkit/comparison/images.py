"""The images of a run: read as when it began, the same as then, and of one data set at a time."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import torch

from deitkit.data.cache import sha256
from deitkit.data.dataset import Dataset, add_unlabelled, load_dataset
from deitkit.errors import CheckpointError
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.run.observer import Watcher

Arguments = ParamSpec("Arguments")


def load_images(recipe: Recipe, folder: Path, watcher: Watcher, dataset: Dataset | None = None) -> Dataset:
    """Load the images of a recipe, with labels (unless these are loaded already) and without.

    Args:
        recipe: Its ``data``.
        folder: Of the run, which may have begun.
        watcher: Receives progress.
        dataset: The images with labels.

    Raises:
        CheckpointError: The run was begun with other images.
        DataError: They are missing or malformed.
    """
    data = as_begun(recipe.data, folder)
    if dataset is None:
        dataset = load_dataset(data, watcher.reading, random_crops=recipe.has_random_crops)
    if data.unlabelled is not None and dataset.unlabelled is None:
        dataset = add_unlabelled(dataset, data, watcher.reading)
    if _environment(folder).get("images") not in (None, images_sha256(dataset)):
        raise CheckpointError(
            f"{folder} was begun with other images or labels than data.name={dataset.name} has now, and rows are "
            "compared on the same images: restore them, or name a new folder (if only Pillow has another version "
            f"here, delete {folder / 'environment.json'})"
        )
    return dataset


def as_begun(data: DataRecipe, folder: Path) -> DataRecipe:
    """Return a recipe's data, streamed or not as when a run folder was begun, however much memory is free now."""
    streamed = _environment(folder).get("streamed")
    if data.streaming != "auto" or streamed is None:
        return data
    return data.model_copy(update={"streaming": streamed})


def images_sha256(dataset: Dataset) -> str:
    """Return a SHA-256 over the pixels and labels of all splits and the class names, the same however they are read."""
    labels = torch.cat([split.labels.cpu() for split in (dataset.train, dataset.validation, dataset.test)])
    hashes = dataset.train_hashes, dataset.validation_hashes, dataset.test_hashes, dataset.unlabelled_hashes
    return hashlib.sha256(json.dumps([sha256(*hashes, labels), dataset.class_names]).encode()).hexdigest()


def keeping_last(load: Callable[Arguments, Dataset]) -> Callable[Arguments, Dataset]:
    """Let a loader keep its last data set, and free it before it loads another, since two may not fit in memory."""
    kept: dict[Any, Dataset] = {}

    def load_or_take(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Dataset:
        key = args, *sorted(kwargs.items())
        if key not in kept:
            kept.clear()
            kept[key] = load(*args, **kwargs)
        return kept[key]

    return load_or_take


def _environment(folder: Path) -> dict[str, Any]:
    """Return what ``begin`` wrote of a run's machine and images; nothing of a run that has not begun."""
    path = folder / "environment.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError):
        raise CheckpointError(
            f"{path} cannot be read: delete it, and check that the images are those of the run"
        ) from None
