"""A teacher of a higher resolution than the students' views: what these cost it, and what it decides at its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from deitkit.data.dataset import Dataset, load_test, load_validation_at
from deitkit.evaluation.predict import predict_logits
from deitkit.evaluation.readouts import top_k_hits
from deitkit.evaluation.statistics import sign_test_p
from deitkit.models.classifier import Classifier
from deitkit.models.saved import read_card
from deitkit.recipe.schema import DataRecipe
from deitkit.run.results import TeacherCard
from deitkit.system.device import Precision
from deitkit.teachers.frozen import Teachers, mean_teacher_logits

IMAGES = 200
ALPHA = 0.01  # level of the test whether the resolution matters


def measure_at_own_resolution(
    classifier: Classifier, card: TeacherCard, data: DataRecipe, precision: Precision
) -> tuple[TeacherCard, str | None]:
    """Compare views, enlarged to the teacher's resolution, with images decoded at it.

    Returns:
        The card with both accuracies on up to 200 validation images, and a sentence if the views cost accuracy. The
        card is unchanged where views are not smaller than the teacher's images.
    """
    if data.image_px is None or card.image_px is None or card.image_px <= data.image_px:
        return card, None
    own, view = (
        top_k_hits(predict_logits(classifier, split, precision), split.labels)
        for split in load_validation_at(data, (card.image_px, data.image_px), IMAGES)
    )
    own_top1, view_top1 = own.double().mean().item(), view.double().mean().item()
    card = card.model_copy(update={"own_px_top1": own_top1, "view_px_top1": view_top1})
    p = sign_test_p(int((own & ~view).sum()), int((view & ~own).sum()))
    if p > ALPHA:
        return card, None
    return card, (
        f"teacher {card.name} scores {100 * own_top1:.1f} % on {len(own)} validation images of its own "
        f"{card.image_px} px, but {100 * view_top1:.1f} % on views of {data.image_px} px (p = {p:.1g}): "
        "with a larger data.image_px it can teach more"
    )


@dataclass(frozen=True)
class TeacherLogits:
    """What a teacher, or the mean of several, computes for the test images.

    Attributes:
        on_views: For the students' views of them, as when it teaches.
        as_used: For the images as it takes them when it is used. A CNN that came trained may take larger ones than the
            students; they are compared with the CNN at its own resolution, since that is what they would replace.
    """

    on_views: Float[Tensor, "n classes"]
    as_used: Float[Tensor, "n classes"]

    @classmethod
    def mean(cls, logits: Sequence["TeacherLogits"]) -> "TeacherLogits":
        """Return logits whose softmax is the mean of several teachers' softmax."""
        on_views, as_used = ([getattr(each, name) for each in logits] for name in ("on_views", "as_used"))
        return cls(mean_teacher_logits(on_views), mean_teacher_logits(as_used))


def predict_test(
    teachers: Teachers, homes: Sequence[Path], data: DataRecipe, dataset: Dataset, precision: Precision
) -> list[TeacherLogits]:
    """Return each teacher's logits for the test images, which are read again where a teacher takes larger ones.

    Args:
        teachers: Of the run.
        homes: Their folders in the run, whose cards tell what each takes.
        data: Of the run.
        dataset: Of the run.
        precision: Of the forward passes.
    """
    on_views = teachers.logits(dataset.test, precision)
    as_used = list(on_views)
    sides = [read_card(home).side for home in homes]
    for side in (side for side in dict.fromkeys(sides) if side != min(dataset.image_px)):
        test = load_test(data.model_copy(update={"image_px": side}))[0]
        assert test.labels.equal(dataset.test.labels.cpu()), "the same images in the same order"
        for place, classifier in enumerate(teachers.classifiers):
            if sides[place] == side:
                as_used[place] = predict_logits(classifier, test, precision)
    return [TeacherLogits(*pair) for pair in zip(on_views, as_used, strict=True)]
