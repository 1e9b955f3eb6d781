"""All teachers of a recipe: each is prepared and checked on its own, and the mean of their answers teaches.

Most recipes have one; its answer is then passed on as it is. What a single teacher is stands in ``teacher``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deitkit.data.sources import Dataset, Split
from deitkit.device import Precision
from deitkit.errors import TeacherError
from deitkit.evaluate import predict_all, top_k_accuracy
from deitkit.models.classifier import Classifier
from deitkit.recipe import Recipe
from deitkit.runs import Watcher
from deitkit.teacher import FrozenTeacher, TeacherCard, prepare_teacher


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


def prepare_teachers(
    recipe: Recipe, dataset: Dataset, *, folder: Path, precision: Precision, watcher: Watcher
) -> tuple[Teachers, list[TeacherCard]]:
    """Prepare every teacher of a recipe, in ``folder``, ``folder-2``, ...; those that are there already are read.

    Raises:
        TeacherError: The gate refused one.
    """
    teachers, cards = [], []
    homes = teacher_folders(recipe, folder)
    for number, (chosen, home) in enumerate(zip(recipe.teacher.everyone, homes, strict=True)):
        alone = recipe.model_copy(update={"teacher": chosen})
        try:
            teacher, card = prepare_teacher(alone, dataset, folder=home, precision=precision, watcher=watcher)
        except TeacherError as error:
            where = f"teacher.also.{number - 1}: " if number else ""
            raise TeacherError(f"{where}{error}") from error
        teachers.append(teacher)
        cards.append(card)
    return Teachers(teachers), cards


def teacher_folders(recipe: Recipe, folder: Path) -> list[Path]:
    """Return the folder of every teacher of a recipe: ``folder``, ``folder-2``, ..."""
    more = range(2, len(recipe.teacher.everyone) + 1)
    return [folder, *(folder.with_name(f"{folder.name}-{number}") for number in more)]


def common_card(
    teachers: Teachers, cards: Sequence[TeacherCard], dataset: Dataset, precision: Precision
) -> TeacherCard:
    """Return the card of the answer that teaches: the only teacher's own, or one of the mean of several."""
    if len(cards) == 1:
        return cards[0]
    top1 = top_k_accuracy(mean_answer(teachers.answers(dataset.validation, precision)), dataset.validation.labels.cpu())
    return replace(
        cards[0],
        name=" + ".join(card.name for card in cards),
        source="; ".join(card.source for card in cards),
        top1=top1,
        verdict="; ".join(dict.fromkeys(card.verdict for card in cards)),
        weak=any(card.weak for card in cards),
        parameters=sum(card.parameters for card in cards),
        image_px=None,  # each has a resolution, a normalisation and a readout of its own
        mean=(),
        std=(),
        readout=None,
        sha256=None,
    )
