"""Statistics of one row of the comparison's table, or of the teacher, accumulated seed by seed.

Only the decisions are kept of each image, so that memory does not grow with students, seeds and classes.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deitkit.analyze.agreement import (
    Decisions,
    agreement,
    confusion_matrix,
    divergence,
    most_confused,
    per_class_accuracy,
    precision_and_f1,
    share_of,
)
from deitkit.analyze.calibration import Reliability, brier_score, negative_log_likelihood, reliability
from deitkit.evaluation.statistics import mean_of_finished
from deitkit.run.analysis import ClassSummary, RowSummary

CONFUSED_PAIRS = 20  # written down; the page shows fewer


@dataclass
class RowStatistics:
    """What is kept of a row's predictions.

    Attributes:
        name: Of the row, such as ``token-hard/joint``; or ``teacher``.
        decisions: By seed, the predicted class of each image.
        figures: Of each seed, the shares and scores that are averaged over the seeds.
        pooled: The images of all seeds by confidence.
    """

    name: str
    decisions: dict[int, Decisions] = field(default_factory=dict)
    figures: list[dict[str, float | None]] = field(default_factory=list)
    pooled: Reliability | None = None

    def add(
        self,
        seed: int,
        probabilities: Float[Tensor, "n classes"],
        labels: Int64[Tensor, " n"],
        teacher: Float[Tensor, "n classes"] | None = None,
    ) -> None:
        """Add the probabilities under a seed, and compare them with the teacher's if there is one."""
        decisions = probabilities.argmax(dim=-1)
        found = reliability(probabilities, labels)
        figures: dict[str, float | None] = {
            "top1": share_of(decisions == labels),
            "ece": found.expected_error,
            "ece_by_chance": found.error_by_chance,
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

    def summary(self) -> RowSummary:
        """Return the means over the seeds, and the reliability curve of the images of all seeds."""
        assert self.pooled is not None
        means = {key: mean_of_finished(figures[key] for figures in self.figures) for key in self.figures[0]}
        return RowSummary(row=self.name, seeds=tuple(self.decisions), reliability=self.pooled.curve(), **means)

    def class_summary(self, labels: Int64[Tensor, " n"], classes: int) -> ClassSummary:
        """Return accuracy and confusions by class, over the images of all seeds."""
        matrices = [confusion_matrix(decisions, labels, classes) for decisions in self.decisions.values()]
        counts = torch.stack(matrices).sum(dim=0)
        accuracy = tuple(per_class_accuracy(counts))
        precision, f1 = precision_and_f1(list(self.decisions.values()), labels, classes)
        return ClassSummary(
            row=self.name,
            accuracy=accuracy,
            precision=precision,
            f1=tuple(None if recall is None else value for recall, value in zip(accuracy, f1, strict=True)),
            confusion=tuple((true, decided, int(counts[true, decided])) for true, decided in counts.nonzero().tolist()),
            most_confused=most_confused(counts, CONFUSED_PAIRS),
        )
