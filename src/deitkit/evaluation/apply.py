"""Measuring a saved model on a data set."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from deitkit.data.dataset import Dataset, load_labelled, load_test
from deitkit.data.duplicates import share_in_sketch
from deitkit.data.sources.choose import folder_within
from deitkit.errors import DataError
from deitkit.evaluation.predict import precision_of, predict
from deitkit.evaluation.readouts import named_scores, top_k_accuracy, top_k_hits
from deitkit.evaluation.seen_images import data_recipe_of, load_divided
from deitkit.evaluation.statistics import wilson_interval
from deitkit.models.card import ModelCard
from deitkit.models.saved import load_classifier
from deitkit.system.device import choose_device
from deitkit.system.words import counted, first_of


class ReadoutAccuracy(TypedDict):
    """Accuracies of a readout, as fractions.

    Attributes:
        readout: Its name.
        top1: Accuracy.
        top1_ci95: Its 95 % interval (Wilson).
        top5: None for at most five classes.
    """

    readout: str
    top1: float
    top1_ci95: tuple[float, float]
    top5: float | None


class Evaluation(TypedDict):
    """A model measured on the test images of a data set.

    Attributes:
        model: Its folder.
        dataset: Its name.
        n: Test images.
        drawn_from: Of how many images these were drawn, since the data have no test split; None if they have one.
        trained_on: The estimated share of these that the model learned from; None if its card does not tell.
        readouts: Each way in which it can answer.
        remarks: On how it was measured, as sentences without a full stop.
    """

    model: str
    dataset: str
    n: int
    drawn_from: int | None
    trained_on: float | None
    readouts: list[ReadoutAccuracy]
    remarks: list[str]


def evaluate_model(folder: Path, data: str, root: Path | None = None, *, everything: bool = False) -> Evaluation:
    """Measure a saved model on the test images of a data set, or with ``everything`` on all its images.

    Raises:
        DataError: The classes of the data set are not the model's, or with ``everything`` not some of them.
    """
    device = choose_device("auto")
    classifier, card = load_classifier(folder, device)
    load, own = partial(load_test, everything=everything), data_recipe_of(card, data, root)
    test, names, drawn_from = load_divided(load, own)
    places = _places_of_classes(names, card, data, some=everything)
    test = replace(test, labels=places[test.labels])
    precision, remarks = precision_of(card, device)
    scores = named_scores(predict(classifier, test, precision), card)
    labels, n = test.labels, len(test)
    readouts = []
    for readout, values in scores.items():
        hits = int(top_k_hits(values, labels).sum())
        top5 = top_k_accuracy(values, labels, 5) if len(card.class_names) > 5 else None
        interval = wilson_interval(hits, n)
        readouts.append(ReadoutAccuracy(readout=readout, top1=hits / n, top1_ci95=interval, top5=top5))
    shares = []
    for seen, view in card.all_seen:
        images = test if view == card.view else load_divided(load, own.model_copy(update=view))[0]
        shares.append(share_in_sketch(images.hashes, seen))
    present, known = len(labels.unique()), len(card.class_names)
    if present < known:
        remarks.append(f"these images are of {counted(present, 'class')}, and the model may answer any of its {known}")
    return Evaluation(
        model=str(folder),
        dataset=data,
        n=n,
        drawn_from=None if everything else drawn_from,
        trained_on=max(shares, default=None),
        readouts=readouts,
        remarks=remarks,
    )


def load_data_of(card: ModelCard, data: str, root: Path | None) -> Dataset:
    """Load a data set as a model takes it, under the split of its training: no training image is a test image.

    Args:
        card: Of the model.
        data: Name of the data set.
        root: Folder of named data sets.

    Raises:
        DataError: Its classes differ from the model's.
    """
    dataset = load_divided(load_labelled, data_recipe_of(card, data, root))
    places = _places_of_classes(dataset.class_names, card, data)
    train, validation, test = (
        replace(split, labels=places[split.labels]) for split in (dataset.train, dataset.validation, dataset.test)
    )
    return replace(dataset, class_names=card.class_names, train=train, validation=validation, test=test)


def _places_of_classes(
    names: Sequence[str], card: ModelCard, data: str, *, some: bool = False
) -> Int64[Tensor, " classes"]:
    """Return the place of each class of a data set among a model's, whose order differs between sources of images.

    Raises:
        DataError: They have not the same classes, or with ``some`` the data have one that the model has not.
    """
    known = set(card.class_names)
    same = len(names) == len(card.class_names) and set(names) == known
    if not same and not (some and set(names) <= known):
        raise DataError(
            f"data {data} has the classes {first_of(names)}, but the model has {first_of(card.class_names)}: "
            + (folder_within(data) or "evaluate it on data with the model's classes")
        )
    return torch.tensor([card.class_names.index(name) for name in names])
