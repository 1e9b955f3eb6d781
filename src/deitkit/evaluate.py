"""What a trained classifier is worth: its readouts, their accuracy, agreement, and the statistics of a comparison.

Nothing here trains, and nothing here chooses a model by its test accuracy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy import stats
from torch import Tensor

from deitkit.data.sources import Split
from deitkit.device import Precision
from deitkit.errors import Interrupted
from deitkit.models.classifier import Classifier
from deitkit.models.vit import Output
from deitkit.speed import uncompiled

READOUTS = ("class", "distillation", "joint", "joint-logits")


# Pixels of a batch that is only classified: a CPU's caches hold less, a GPU wants more to do at once.
EVALUATION_PIXELS = {"cpu": 2**19, "cuda": 2**22}


def predict(classifier: Classifier, split: Split, precision: Precision) -> Output:
    """Return the heads' logits for every image of a split, in float32 on the CPU; the mode is restored afterwards."""
    return predict_all([classifier], split, precision)[0]


@torch.inference_mode()
def predict_all(
    classifiers: Sequence[Classifier],
    split: Split,
    precision: Precision,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Output]:
    """Return what ``predict`` returns for each of some classifiers, with each image decoded and moved once.

    Raises:
        Interrupted: ``should_stop``, which is asked after every batch, said so.
    """
    modes = [classifier.training for classifier in classifiers]
    outputs: list[list[Output]] = [[] for _ in classifiers]
    height, width = split.images.shape[-2:]
    for classifier in classifiers:
        classifier.eval()
    with uncompiled(), precision.autocast():
        for images in split.batches(max(1, EVALUATION_PIXELS[precision.device.type] // (height * width))):
            view = images.to(precision.device, non_blocking=True).float() / 255
            for classifier, gathered in zip(classifiers, outputs, strict=True):
                gathered.append(classifier(view))
            if should_stop():
                raise Interrupted
    for classifier, training in zip(classifiers, modes, strict=True):
        classifier.train(training)
    return [Output(*(_gather(parts, head) for head in ("class_logits", "distillation_logits"))) for parts in outputs]


def _gather(outputs: list[Output], head: str) -> Tensor | None:
    logits = [getattr(output, head) for output in outputs]
    return None if logits[0] is None else torch.cat(logits).float().cpu()


def readout_scores(output: Output) -> dict[str, Float[Tensor, "n classes"]]:
    """Return the scores of every readout that the heads allow, highest wins.

    ``joint`` adds the softmax of both heads (Touvron et al. 2020, section 4); ``joint-logits`` averages their logits
    (the released code, timm and transformers).
    """
    classes, distillation = output.class_logits, output.distillation_logits
    if classes is None or distillation is None:
        return {"class": classes} if classes is not None else {"distillation": distillation}  # type: ignore[dict-item]
    joint = classes.softmax(dim=-1) + distillation.softmax(dim=-1)
    return {
        "class": classes,
        "distillation": distillation,
        "joint": joint,
        "joint-logits": (classes + distillation) / 2,
    }


def readout_probabilities(readout: str, scores: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
    """Turn a readout's scores into probabilities: those of ``joint`` are a sum of two softmax, all others logits."""
    return scores / 2 if readout == "joint" else scores.softmax(dim=-1)


def default_readout(names: Sequence[str]) -> str:
    """Return the readout that a student is judged by: the paper's joint one where there are two heads."""
    return "joint" if "joint" in names else names[0]


def top_k_hits(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, "n"], k: int = 1) -> Bool[Tensor, "n"]:
    """Return for each image whether its label is among the k highest scores."""
    if k == 1:
        return scores.argmax(dim=-1) == labels
    return (scores.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1)


def top_k_accuracy(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, "n"], k: int = 1) -> float:
    """Return the share of images whose label is among the k highest scores."""
    return top_k_hits(scores, labels, k).double().mean().item()


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson 1927)."""
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % Student t interval of a mean over at least two seeds."""
    assert len(values) >= 2
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def mcnemar_p(hits: Bool[Tensor, "n"], other: Bool[Tensor, "n"]) -> float:
    """Return the exact two-sided p value of McNemar's test: are two classifiers equally right on the same images?

    Source: McNemar 1947; the exact form is a binomial test on the images that only one of the two gets right.
    """
    only_first = int((hits & ~other).sum())
    only_second = int((other & ~hits).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


@dataclass(frozen=True)
class Difference:
    """How far one row lies above another, as a difference of shares."""

    mean: float
    ci95: tuple[float, float] | None
    p: float
    test: str


def paired_difference(hits: Sequence[Bool[Tensor, "n"]], other: Sequence[Bool[Tensor, "n"]]) -> Difference:
    """Compare two rows that were trained under the same seeds and tested on the same images.

    One seed: McNemar's exact test over the images, and the interval of the difference of two paired shares (Wald).
    Several seeds: the paired t test and interval over the seeds' differences, which asks whether the method would win
    again under a new seed.

    Args:
        hits: For each seed, which test images the row gets right.
        other: The same of the row that it is compared with.
    """
    differences = [(a.double() - b.double()).mean().item() for a, b in zip(hits, other, strict=True)]
    mean = float(np.mean(differences))
    if len(differences) == 1:
        per_image = hits[0].double() - other[0].double()
        half = 1.96 * per_image.std().item() / math.sqrt(len(per_image))
        return Difference(mean, (mean - half, mean + half), mcnemar_p(hits[0], other[0]), "McNemar")
    if np.std(differences) == 0:
        return Difference(mean, (mean, mean), 1.0 if mean == 0 else 0.0, "paired t")
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean, mean_interval(differences), p, "paired t")
