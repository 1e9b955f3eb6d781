"""Other ways to use a teacher: another order of its classes, resolution, normalisation or order of channels.

Each is compared with the way it is used on the same images, by paired tests. What follows from them is in ``gate``.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deitkit.data.dataset import Dataset
from deitkit.data.split import Split
from deitkit.evaluation.predict import predict_logits
from deitkit.evaluation.readouts import top_k_hits
from deitkit.evaluation.statistics import sign_test_p
from deitkit.models.built import reverse_channels
from deitkit.models.classifier import IMAGENET_NORMALISATION, Classifier
from deitkit.system.device import Precision
from deitkit.system.seeding import fixed_shuffle
from deitkit.system.words import first_of

# Level of each test. At most eight are made of a teacher, so together they accuse a right one in about 1 of 100 cases.
ALPHA = 0.001
# Another normalisation must gain at least this accuracy, since two that are almost equal may truly differ by less.
SMALLEST_GAIN = 0.01
# Another order must be right at least this many times as often as wrong where the two differ: two classes that a right
# teacher confuses are as good in either order.
CLEAR_ODDS = 2
# Images on which an alternative must be better before it is compared on all.
SCREENED = 200


@dataclass(frozen=True)
class Alternative:
    """A way to use the teacher that is significantly better.

    Attributes:
        cause: What is wrong, with the accuracy that the alternative has.
        remedy: Fields to set.
    """

    cause: str
    remedy: str


def better_alternative(
    classifier: Classifier,
    decisions: Int64[Tensor, " n"],
    labels: Int64[Tensor, " n"],
    sample: Split,
    dataset: Dataset,
    precision: Precision,
    usual_px: int | None = None,
) -> Alternative | None:
    """Return another order of classes, resolution, normalisation or order of channels that is significantly better.

    Args:
        classifier: As it is used.
        decisions: Its decisions, for the order of classes.
        labels: True classes of the same images.
        sample: Images to compare normalisations on.
        dataset: Class names, channels and normalisation.
        precision: Of predictions.
        usual_px: Resolution of the library's weights for the architecture, if views are to be tried at it.
    """
    order = better_order(decisions, labels, dataset.classes)
    if order is not None:
        return _reordered(order, decisions, labels, dataset)
    hits = _hits(classifier, sample, precision)
    screened = Split(sample.images[:SCREENED], sample.labels[:SCREENED])
    best, best_top1 = None, 0.0
    for cause, other, remedy in _candidates(classifier, dataset, usual_px):
        other.to(precision.device)
        if int(_hits(other, screened, precision).sum()) <= int(hits[:SCREENED].sum()):
            continue
        others = _hits(other, sample, precision)
        top1, now = others.double().mean().item(), hits.double().mean().item()
        if is_better(others, hits) and top1 > best_top1:
            scores = f"{100 * top1:.1f} % of {len(hits)} training and validation images instead of {100 * now:.1f}"
            best, best_top1 = Alternative(f"{cause} it would score {scores}", remedy), top1
    return best


def is_better(others: Bool[Tensor, " n"], hits: Bool[Tensor, " n"]) -> bool:
    """Return whether other predictions are significantly and notably more accurate on the same images."""
    better, worse = int((others & ~hits).sum()), int((hits & ~others).sum())
    return better - worse >= SMALLEST_GAIN * len(hits) and sign_test_p(better, worse) <= ALPHA


def better_order(
    decisions: Int64[Tensor, " n"], labels: Int64[Tensor, " n"], classes: int
) -> Int64[Tensor, " classes"] | None:
    """Return the class that each output means, if another order than the present one is significantly better.

    The best order of a half of the images (an assignment on its confusion matrix) is judged on the other half, both
    ways round, since the best order of the very images that judge it would nearly always be better.
    """
    better = worse = 0
    fold = _alternating(labels)
    for chosen, judged in ((fold == 0, fold == 1), (fold == 1, fold == 0)):
        order = _best_order(decisions[chosen], labels[chosen], classes)
        new, old = order[decisions[judged]] == labels[judged], decisions[judged] == labels[judged]
        better += int((new & ~old).sum())
        worse += int((old & ~new).sum())
    if better < CLEAR_ODDS * worse or sign_test_p(better, worse) > ALPHA:
        return None
    order = _best_order(decisions, labels, classes)
    return None if torch.equal(order, torch.arange(classes)) else order


def _best_order(decisions: Tensor, labels: Tensor, classes: int) -> Tensor:
    confusion = torch.zeros(classes, classes).index_put_(
        (decisions, labels), torch.ones(len(labels)), accumulate=True
    ) + 0.5 * torch.eye(classes)  # of equals the present order
    return torch.from_numpy(linear_sum_assignment(confusion.numpy(), maximize=True)[1])


def _alternating(labels: Tensor) -> Tensor:
    """Return 0 or 1 for each image, half of each class, at random."""
    shuffled = fixed_shuffle(len(labels))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    fold = torch.empty_like(labels)
    fold[by_class] = torch.arange(len(labels)) % 2
    return fold


def _reordered(order: Tensor, decisions: Tensor, labels: Tensor, dataset: Dataset) -> Alternative:
    moved = [output for output in range(len(order)) if int(order[output]) != output]
    names = dataset.class_names
    meanings = first_of([f"its '{names[output]}' means '{names[int(order[output])]}'" for output in moved])
    top1 = (order[decisions] == labels).double().mean().item()
    return Alternative(
        f"its classes are in another order: {meanings} (in that order it would score {100 * top1:.1f} %)",
        "set teacher.fit=head teacher.reset_head=true to train a new classifier, or name the classes so that they "
        "sort as the teacher's",
    )


def _hits(classifier: Classifier, sample: Split, precision: Precision) -> Tensor:
    return top_k_hits(predict_logits(classifier, sample, precision), sample.labels.cpu())


def _candidates(
    classifier: Classifier, dataset: Dataset, usual_px: int | None
) -> Iterator[tuple[str, Classifier, str]]:
    """Yield other ways to use the teacher: the cause if it is better, the classifier, and the fields to set."""
    if usual_px is not None:
        other = deepcopy(classifier)
        other.image_px = usual_px
        cause = f"its resolution is wrong: with views enlarged to {usual_px} px"
        yield cause, other, f"set teacher.image_px={usual_px}"
    for name, (mean, std) in _normalisations(dataset).items():
        other = Classifier(
            classifier.model, mean=mean, std=std, image_px=classifier.image_px, readout=classifier.readout
        ).eval()  # it shares the model, which the mode of a new module would put into training
        yield (
            f"its normalisation is wrong: with {name}",
            other,
            f"set teacher.mean={list(mean)} teacher.std={list(std)}",
        )
    if dataset.channels == 3:
        other = deepcopy(classifier)
        if reverse_channels(other.model):
            cause = "its order of channels is wrong: with blue, green, red"
            yield cause, other, "change teacher.channel_order (rgb, bgr)"


def _normalisations(dataset: Dataset) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Return the usual normalisations by name."""
    channels = dataset.channels
    usual = {
        "values in [0, 1]": ((0.0,) * channels, (1.0,) * channels),
        "values in [-1, 1]": ((0.5,) * channels, (0.5,) * channels),
        "values in [0, 255]": ((0.0,) * channels, (1 / 255,) * channels),
        "that of the data set": (
            tuple(round(value, 4) for value in dataset.mean),
            tuple(round(value, 4) for value in dataset.std),
        ),
    }
    if channels == 3:
        usual["that of ImageNet"] = IMAGENET_NORMALISATION
    return usual
