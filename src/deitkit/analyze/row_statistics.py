"""A judge is whoever classifies the test images: a row of the comparison's table, or the teacher.

Of each image's probabilities only the decision is kept; everything else is summed up at once, seed by seed, so that
memory does not grow with the number of students and seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deitkit.analyze.agreement import (
    Decisions,
    agreement,
    confusion_matrix,
    divergence,
    mean,
    most_confused,
    per_class_accuracy,
    share_of,
)
from deitkit.analyze.calibration import Reliability, brier_score, negative_log_likelihood, reliability

CONFUSED_PAIRS = 20  # written down; the page shows fewer


@dataclass
class Judge:
    """What is kept of a judge's answers.

    Attributes:
        name: As a row is called, ``token-hard/joint``; or ``teacher``.
        decisions: By seed, the class that it gives each image.
        figures: Of each seed, the shares and scores that are averaged over the seeds.
        pooled: The images of all seeds by confidence.
    """

    name: str
    decisions: dict[int, Decisions] = field(default_factory=dict)
    figures: list[dict[str, float | None]] = field(default_factory=list)
    pooled: Reliability | None = None

    def hear(
        self,
        seed: int,
        probabilities: Float[Tensor, "n classes"],
        labels: Int64[Tensor, " n"],
        teacher: Float[Tensor, "n classes"] | None = None,
    ) -> None:
        """Take in what the judge says under a seed, beside its teacher's probabilities where it has one."""
        decisions = probabilities.argmax(dim=-1)
        found = reliability(probabilities, labels)
        figures: dict[str, float | None] = {
            "top1": share_of(decisions == labels),
            "ece": found.expected_error,
            "mce": found.maximum_error,
            "nll": negative_log_likelihood(probabilities, labels),
            "brier": brier_score(probabilities, labels),
        }
        if teacher is not None:
            followed = agreement(decisions, teacher.argmax(dim=-1), labels)
            figures |= {f"agreement_{name}": share for name, share in followed.items()}
            figures["divergence"] = divergence(probabilities, teacher)
        self.decisions[seed] = decisions
        self.figures.append(figures)
        self.pooled = found if self.pooled is None else self.pooled + found

    def describe(self) -> dict[str, Any]:
        """Return the means over the seeds, and the reliability curve of the images of all seeds."""
        assert self.pooled is not None
        described: dict[str, Any] = {"judge": self.name, "seeds": list(self.decisions)}
        for key in self.figures[0]:
            described[key] = mean([value for figures in self.figures if (value := figures[key]) is not None])
        return described | {"reliability": self.pooled.curve()}

    def describe_classes(self, labels: Int64[Tensor, " n"], classes: int) -> dict[str, Any]:
        """Return accuracy by class and confusions, over the images of all seeds.

        ``confusion`` holds [true class, class decided, images] for what occurs only: of n images at most n entries,
        where a matrix of a thousand classes would have a million.
        """
        counts = sum_of([confusion_matrix(decisions, labels, classes) for decisions in self.decisions.values()])
        places = counts.nonzero()
        return {
            "judge": self.name,
            "accuracy": per_class_accuracy(counts),
            "confusion": [[*place, int(counts[tuple(place)])] for place in places.tolist()],
            "most_confused": most_confused(counts, CONFUSED_PAIRS),
        }


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of some tensors, at least one."""
    return torch.stack(list(tensors)).sum(dim=0)
