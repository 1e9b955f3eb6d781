"""The images that a saved model has learned from: what its card tells, and which share of a test set they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deitkit.data.dataset import Dataset, load_test
from deitkit.data.duplicates import how_to_divide, merge_sketches, share_of_tests_seen
from deitkit.data.listing import ProgressCallback
from deitkit.errors import HasTestSplit
from deitkit.models.card import ModelCard
from deitkit.recipe.schema import DataRecipe

Loaded = TypeVar("Loaded")


def card_of_data(recipe: DataRecipe, dataset: Dataset) -> dict[str, Any]:
    """Return what the card of a model that trains on a data set tells about it, for ``data_recipe_of``."""
    division = ("split_seed", "test_fraction") if recipe.folds is None else ("split_seed", "folds", "fold")
    return {
        "dataset": dataset.name,
        "channels": dataset.channels,
        "class_names": list(dataset.class_names),
        "input_px": list(dataset.image_px),
        "eval_crop": recipe.eval_crop,
        "fit": recipe.fit,
        "split": {field: getattr(recipe, field) for field in division},  # which images are test images
    }


def images_before(dataset: Dataset, origins: Sequence[ModelCard]) -> dict[str, str]:
    """Return what the card of a model tells about the images that it saw before it was used on a data set.

    Those of a model that takes them in another size, number of channels or shape are left out, since other pixels have
    other hashes.

    Args:
        dataset: The data set on which it is used.
        origins: Cards of the models that it started from.
    """
    known = [seen for origin in origins for seen, view in origin.all_seen if view == view_of(dataset)]
    return {"trained_before_on": merge_sketches(known)} if known else {}


def share_seen(card: ModelCard, data: DataRecipe, dataset: Dataset, progress: ProgressCallback | None = None) -> float:
    """Estimate which share of a run's test images a given model has learned from; 0 if its card does not tell.

    Args:
        card: Of the model.
        data: Of the run.
        dataset: The same, loaded.
        progress: Called while the test images are read as the model takes them, if the run takes them otherwise.
    """
    shares = []
    for seen, view in card.all_seen:
        test = dataset.test if view == view_of(dataset) else load_test(data.model_copy(update=view), progress)[0]
        shares.append(share_of_tests_seen(test.hashes, dataset.test.hashes, dataset.train.hashes, seen))
    return max(shares, default=0.0)


def say_seen(share: float, model: str, card: ModelCard, dataset: Dataset) -> str:
    """Return the sentence, with its remedy, that a model has learned from a share of a run's test images."""
    return (
        f"about {100 * share:.0f} % of the test images of {dataset.name} are training images of {model}: "
        f"{how_to_divide(card.split)}"
    )


def load_divided(load: Callable[[DataRecipe], Loaded], recipe: DataRecipe) -> Loaded:
    """Load images divided as a recipe says: without its folds, if they do not divide data with a test split."""
    try:
        return load(recipe)
    except HasTestSplit:
        return load(recipe.model_copy(update={"folds": None, "fold": None}))


def view_of(dataset: Dataset) -> dict[str, Any]:
    """Return how a data set's images are taken, as ``ModelCard.view``."""
    return {"image_px": min(dataset.image_px), "channels": dataset.channels, "fit": dataset.fit}


def data_recipe_of(card: ModelCard, data: str, root: Path | None) -> DataRecipe:
    """Return a data set as a model takes it, divided as for its training."""
    return DataRecipe(
        name=data,
        root=root,
        eval_crop=card.eval_crop,
        **card.view,
        **card.split,
    )
