"""Frozen teachers, one or several, used as one."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deitkit.data.dataset import Split
from deitkit.evaluation.predict import predict_all
from deitkit.models.classifier import Classifier
from deitkit.system.device import Precision


class FrozenTeacher(nn.Module):
    """A classifier without gradients that stays in evaluation mode, so that ``train`` cannot change its BatchNorm."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.classifier.zero_grad(set_to_none=True)  # of its training

    def forward(self, view: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits for views in [0, 1], through the teacher's own normalisation and resolution."""
        with torch.inference_mode():
            logits = self.classifier(view).class_logits
            assert logits is not None
        return logits.clone()  # a tensor of inference mode cannot be the target of a loss

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a teacher stays in evaluation mode."""
        return self


def mean_teacher_logits(logits: Sequence[Float[Tensor, "batch classes"]]) -> Float[Tensor, "batch classes"]:
    """Return logits whose softmax is the mean of the teachers' softmax; those of a single teacher are unchanged.

    They suit every method: their maximum is the decision of the mean, and a temperature acts on the mean.

    Source: Hinton et al. 2015, section 3 (the arithmetic mean of an ensemble's distributions as soft targets). You et
    al. 2017 apply the temperature to each teacher, before the mean.
    """
    if len(logits) == 1:
        return logits[0]
    log_probabilities = torch.stack([each.float().log_softmax(dim=-1) for each in logits])
    return log_probabilities.logsumexp(dim=0) - math.log(len(logits))


class Teachers(nn.Module):
    """One or several frozen teachers, used as one.

    Args:
        teachers: At least one.
    """

    def __init__(self, teachers: Sequence[FrozenTeacher]) -> None:
        super().__init__()
        self.members = nn.ModuleList(teachers)

    @property
    def classifiers(self) -> list[Classifier]:
        """The classifier of each teacher."""
        return [teacher.classifier for teacher in self.members]  # type: ignore[misc]

    def forward(self, view: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of the mean of all teachers for views in [0, 1]."""
        return mean_teacher_logits([teacher(view) for teacher in self.members])

    def logits(self, split: Split, precision: Precision) -> list[Float[Tensor, "n classes"]]:
        """Return each teacher's logits for all images of a split, in float32 on the CPU."""
        logits = [output.class_logits for output in predict_all(self.classifiers, split, precision)]
        return [each for each in logits if each is not None]
