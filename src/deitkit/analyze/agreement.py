"""Decisions of classifiers on the same images: disagreement, confusions, agreement with the teacher.

Pure functions of decisions and labels.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from deitkit.evaluation.statistics import mean_of_finished
from deitkit.run.analysis import Confusion

Decisions: TypeAlias = Int64[Tensor, " n"]


def disagreement(rows: Mapping[str, Mapping[int, Decisions]]) -> list[list[float | None]]:
    """Return the share of images that each two rows classify differently, the mean over the seeds of both.

    Source: Touvron et al. 2020, Table 4.

    Args:
        rows: The decisions of each by seed, on the same images.

    Returns:
        A symmetric matrix in the order of ``rows``; None where two have no seed in common.
    """
    return [[_differing(first, second) for second in rows.values()] for first in rows.values()]


def _differing(first: Mapping[int, Decisions], second: Mapping[int, Decisions]) -> float | None:
    shares = [share_of(first[seed] != second[seed]) for seed in first if seed in second]
    return mean_of_finished(shares)


def confusion_matrix(decisions: Decisions, labels: Int64[Tensor, " n"], classes: int) -> Int64[Tensor, "true decided"]:
    """Return how many images of each class were predicted to be of each class."""
    return (labels * classes + decisions).bincount(minlength=classes * classes).view(classes, classes)


def per_class_accuracy(counts: Int64[Tensor, "true decided"]) -> list[float | None]:
    """Return the accuracy of each class; None for a class without images."""
    shares = counts.diagonal().double() / counts.sum(dim=1)
    return [None if share.isnan() else share.item() for share in shares]


def most_confused(counts: Int64[Tensor, "true decided"], pairs: int = 5) -> tuple[Confusion, ...]:
    """Return the most frequent errors, by number, then by class."""
    mistakes = counts.clone().fill_diagonal_(0).flatten()
    order = mistakes.argsort(descending=True, stable=True)[:pairs]
    totals = counts.sum(dim=1).tolist()
    found = []
    for place in order[mistakes[order] > 0].tolist():
        true, decided = divmod(place, len(counts))
        count = int(mistakes[place])
        share = count / totals[true]
        found.append(Confusion(true=true, decided=decided, count=count, of=totals[true], share=share))
    return tuple(found)


def agreement(decisions: Decisions, teacher: Decisions, labels: Int64[Tensor, " n"]) -> dict[str, float | None]:
    """Return how often a classifier agrees with its teacher, and what becomes of the teacher's errors.

    Returns:
        Shares of the images: ``overall`` is agreement; ``teacher_right`` and ``teacher_wrong`` the same among the
        images that the teacher classifies correctly, and wrongly (an inherited error); ``corrected`` the share of the
        teacher's errors that the classifier corrects. None where there is no such image.
    """
    agrees, teacher_right = decisions == teacher, teacher == labels
    return {
        "overall": share_of(agrees),
        "teacher_right": share_of(agrees[teacher_right]),
        "teacher_wrong": share_of(agrees[~teacher_right]),
        "corrected": share_of((decisions == labels)[~teacher_right]),
    }


def divergence(probabilities: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> float:
    """Return the mean Kullback-Leibler divergence in nats from a classifier's probabilities to its teacher's.

    KL(teacher || classifier), the term that soft distillation brings down, at temperature 1.
    """
    ratio = log_probabilities(teacher) - log_probabilities(probabilities)
    return (teacher.double() * ratio).sum(dim=-1).mean().item()


def log_probabilities(probabilities: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
    """Return logarithms in float64; a probability that float32 rounded to 0 counts as its smallest normal number."""
    return probabilities.double().clamp(min=torch.finfo(torch.float32).tiny).log()


def share_of(chosen: Bool[Tensor, " m"]) -> float | None:
    """Return the share of images that are chosen; None of no image."""
    return chosen.double().mean().item() if len(chosen) else None


def precision_and_f1(
    decisions: Sequence[Decisions], labels: Int64[Tensor, " n"], classes: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return scikit-learn's precision and F1 of each class, over all decisions; 0 for a class that is never decided."""
    from sklearn.metrics import precision_recall_fscore_support  # here, since it takes a second to import

    truth, answers = labels.repeat(len(decisions)).numpy(), torch.cat(list(decisions)).numpy()
    precision, _, f1, _ = precision_recall_fscore_support(truth, answers, labels=np.arange(classes), zero_division=0)
    return tuple(precision.tolist()), tuple(f1.tolist())
