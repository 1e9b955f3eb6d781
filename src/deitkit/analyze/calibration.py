"""Calibration errors, proper scoring rules and the reliability curve."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deitkit.analyze.agreement import log_probabilities
from deitkit.run.analysis import ReliabilityBin

BINS = 15  # Guo et al. 2017, section 5


@dataclass(frozen=True)
class Reliability:
    """Images by the confidence (highest probability) of their decision, in bins of equal width over (0, 1].

    Source: Guo et al. 2017 (arXiv 1706.04599), section 2. A bin holds its upper edge, not its lower.

    Attributes:
        counts: Images in each bin.
        confidence: Their confidences, summed.
        hits: How many of them are classified correctly.
        variance: Of the number of hits, if the confidences were the chances of them.
    """

    counts: Int64[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    hits: Float[Tensor, " bins"]
    variance: Float[Tensor, " bins"]

    def __add__(self, other: "Reliability") -> "Reliability":
        """Pool the images of two seeds."""
        own, others = vars(self), vars(other)
        return Reliability(**{name: own[name] + others[name] for name in own})

    @property
    def gaps(self) -> Float[Tensor, " bins"]:
        """Absolute difference of mean confidence and accuracy in each bin; 0 in an empty bin."""
        return (self.confidence - self.hits).abs() / self.counts.clamp(min=1)

    @property
    def expected_error(self) -> float:
        """ECE: the mean gap over images, in [0, 1]."""
        return ((self.gaps * self.counts).sum() / self.counts.sum()).item()

    @property
    def error_by_chance(self) -> float:
        """The ECE that a perfectly calibrated model with these confidences has on average, since images are few.

        The hits of a bin are a sum of independent draws, nearly normal, whose mean absolute deviation is
        sqrt(2 / pi) of its standard deviation.
        """
        return ((2 / math.pi * self.variance).sqrt().sum() / self.counts.sum()).item()

    @property
    def maximum_error(self) -> float:
        """MCE: the gap of the worst bin, in [0, 1], however few images are in it."""
        return self.gaps.max().item()

    def curve(self) -> tuple[ReliabilityBin, ...]:
        """Return every bin with at least one image."""
        width = 1 / len(self.counts)
        return tuple(
            ReliabilityBin(
                low=index * width,
                high=(index + 1) * width,
                count=int(count),
                confidence=(self.confidence[index] / count).item(),
                accuracy=(self.hits[index] / count).item(),
            )
            for index, count in enumerate(self.counts)
            if count
        )


def reliability(
    probabilities: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], bins: int = BINS
) -> Reliability:
    """Gather images by the confidence of their decision."""
    confidence, decisions = probabilities.double().max(dim=-1)
    inner_edges = torch.arange(1, bins, dtype=torch.float64) / bins
    places = torch.bucketize(confidence, inner_edges)
    return Reliability(
        counts=places.bincount(minlength=bins),
        confidence=places.bincount(confidence, minlength=bins),
        variance=places.bincount(confidence * (1 - confidence), minlength=bins),
        hits=places.bincount((decisions == labels).double(), minlength=bins),
    )


def negative_log_likelihood(probabilities: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    """Return the mean of -log of the true class's probability, in nats."""
    return -log_probabilities(probabilities).gather(1, labels[:, None]).mean().item()


def brier_score(probabilities: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    """Return the mean squared distance to the true class's one-hot vector, in [0, 2] (Brier 1950)."""
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities.double() - truth).square().sum(dim=-1).mean().item()
