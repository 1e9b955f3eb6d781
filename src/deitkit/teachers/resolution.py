"""What views cost a teacher that has a higher resolution: its accuracy on images that were decoded at its own."""

from collections.abc import Sequence
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


def logits_as_used(
    classifiers: Sequence[Classifier],
    homes: Sequence[Path],
    views: Sequence[Float[Tensor, "n classes"]],
    data: DataRecipe,
    dataset: Dataset,
    precision: Precision,
) -> list[Float[Tensor, "n classes"]]:
    """Return each teacher's logits for the test images as it takes them when it is used, by the card of its folder.

    A CNN that came trained may take larger images than the students do. It teaches on their views, but who asks whether
    a student can replace it asks of the CNN as it is.

    Args:
        classifiers: The teachers.
        homes: Their folders in the run.
        views: Their logits for the students' views of the test images, which hold where these are what it takes.
        data: Of the run.
        dataset: Of the run.
        precision: Of the forward passes.
    """
    sides = [read_card(home).side for home in homes]
    own = [side for side in dict.fromkeys(sides) if side != min(dataset.image_px)]
    found = list(views)
    for side in own:
        test = load_test(data.model_copy(update={"image_px": side}))[0]
        assert test.labels.equal(dataset.test.labels.cpu()), "the same images in the same order"
        for place, classifier in enumerate(classifiers):
            if sides[place] == side:
                found[place] = predict_logits(classifier, test, precision)
    return found
