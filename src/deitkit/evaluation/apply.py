"""Measuring a saved model on a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deitkit.data.dataset import Dataset, load_dataset, load_test
from deitkit.data.duplicates import merge_sketches, share_in_sketch, share_of_tests_seen
from deitkit.data.listing import ProgressCallback
from deitkit.errors import DataError, HasTestSplit
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import named_scores, top_k_accuracy, top_k_hits
from deitkit.evaluation.statistics import wilson_interval
from deitkit.models.card import ModelCard
from deitkit.models.saved import load_classifier
from deitkit.recipe.schema import DataRecipe
from deitkit.system.device import Precision, choose_device
from deitkit.system.words import first_of


def evaluate_model(folder: Path, data: str, root: Path | None = None) -> dict[str, Any]:
    """Measure a saved model on the test images of a data set.

    Returns:
        ``model``, ``dataset``, ``n``, ``trained_on`` (the estimated share of test images that the model was trained on;
        None if its card does not tell) and ``readouts``, each with its accuracies as fractions.

    Raises:
        DataError: The classes of the data set differ from the model's.
    """
    device = choose_device("auto")
    classifier, card = load_classifier(folder, device)
    dataset = load_data_of(card, data, root)
    scores = named_scores(predict(classifier, dataset.test, Precision.choose("auto", device)), card)
    labels, n = dataset.test.labels, len(dataset.test)
    rows = []
    for readout, values in scores.items():
        hits = int(top_k_hits(values, labels).sum())
        top5 = top_k_accuracy(values, labels, 5) if dataset.classes > 5 else None
        rows.append({"readout": readout, "top1": hits / n, "top1_ci95": wilson_interval(hits, n), "top5": top5})
    seen = None if card.seen is None else share_in_sketch(dataset.test.hashes, card.seen)
    return {"model": str(folder), "dataset": dataset.name, "n": n, "trained_on": seen, "readouts": rows}


def load_data_of(card: ModelCard, data: str, root: Path | None) -> Dataset:
    """Load a data set as a model takes it, under the split of its training: no training image is a test image.

    Args:
        card: Of the model.
        data: Name of the data set.
        root: Folder of named data sets.

    Raises:
        DataError: Its classes differ from the model's.
    """
    recipe = data_recipe_of(card, data, root)
    try:
        dataset = load_dataset(recipe)
    except HasTestSplit:  # of other data, which the folds of the training do not divide
        dataset = load_dataset(data_recipe_of(card.model_copy(update={"split": {}}), data, root))
    if dataset.class_names != card.class_names:
        raise DataError(
            f"data {data} has the classes {first_of(dataset.class_names)}, "
            f"but the model has {first_of(card.class_names)}: evaluate it on data with the model's classes"
        )
    return dataset


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
    known = [seen for origin in origins if (seen := origin.seen) and origin.view == view_of(dataset)]
    return {"trained_before_on": merge_sketches(known)} if known else {}


def share_seen(card: ModelCard, data: DataRecipe, dataset: Dataset, progress: ProgressCallback | None = None) -> float:
    """Estimate which share of a run's test images a given model has learned from; 0 if its card does not tell.

    Args:
        card: Of the model.
        data: Of the run.
        dataset: The same, loaded.
        progress: Called while the test images are read as the model takes them, if the run takes them otherwise.
    """
    if card.seen is None:
        return 0.0
    same = card.view == view_of(dataset)
    test = dataset.test if same else load_test(data.model_copy(update=card.view), progress)
    return share_of_tests_seen(test.hashes, dataset.test.hashes, dataset.train.hashes, card.seen)


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
