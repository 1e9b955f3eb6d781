"""Teachers that teach: frozen, one or several, asked as one."""

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
    """A classifier that answers and never learns: no gradients, and no call of ``train`` wakes its BatchNorm."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()

    def forward(self, view: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits for views in [0, 1], through the teacher's own normalisation and resolution."""
        with torch.inference_mode():
            logits = self.classifier(view).class_logits
            assert logits is not None
        return logits.clone()  # a tensor of inference mode could not be the target of a loss

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a teacher stays in evaluation mode."""
        return self


def mean_answer(answers: Sequence[Float[Tensor, "batch classes"]]) -> Float[Tensor, "batch classes"]:
    """Return logits whose softmax is the mean of the answers' softmax; a single answer is returned as it is.

    They serve every method: their largest is the decision of the mean, and a temperature acts on the mean.

    Source: Hinton et al. 2015, section 3 (the arithmetic mean of an ensemble's distributions as soft targets). You et
    al. 2017 apply the temperature to each teacher, before the mean.
    """
    if len(answers) == 1:
        return answers[0]
    log_probabilities = torch.stack([answer.float().log_softmax(dim=-1) for answer in answers])
    return log_probabilities.logsumexp(dim=0) - math.log(len(answers))


class Teachers(nn.Module):
    """One or several frozen teachers, asked as one.

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
        """Return the mean answer to views in [0, 1], as logits."""
        return mean_answer([teacher(view) for teacher in self.members])

    def answers(self, split: Split, precision: Precision) -> list[Float[Tensor, "n classes"]]:
        """Return each teacher's logits for all images of a split, in float32 on the CPU."""
        logits = [output.class_logits for output in predict_all(self.classifiers, split, precision)]
        return [answer for answer in logits if answer is not None]
