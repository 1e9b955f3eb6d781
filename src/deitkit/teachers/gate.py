"""The gate: it measures a teacher before distillation, and refuses a bad one with the likely cause."""

import math
from enum import Enum

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from scipy import stats
from torch import Tensor

from deitkit.data.dataset import Dataset
from deitkit.data.split import Split
from deitkit.errors import TeacherError
from deitkit.evaluation.predict import predict_logits
from deitkit.evaluation.readouts import balanced_accuracy, top_k_hits
from deitkit.models.classifier import Classifier
from deitkit.models.zoo import pretrained_px
from deitkit.recipe.schema import TeacherRecipe
from deitkit.run.results import FIT_TO_TEACH, TeacherCard
from deitkit.system.device import Precision
from deitkit.system.seeding import fixed_shuffle
from deitkit.system.words import counted
from deitkit.teachers.alternatives import Alternative, better_alternative

ALPHA = 0.01  # level of the tests against chance
PERMUTATIONS = 999
WEAK = "weak, allowed by the recipe"  # begins the verdict on such a teacher
# Level of the test whether a teacher is useless: with those of its alternatives below 1 of 100.
ALPHA_USELESS = 0.003
# A useful teacher is right in at least this share of the images that the most frequent class leaves over.
USEFUL = 0.2
# A teacher that was not trained here is also tested on training images, up to this number in total.
EVIDENCE = 1000
# Fewer images per class cannot show that two classes are swapped, however good the teacher is.
FEWEST_PER_CLASS = 5
MOST_NEEDED = 20_000  # no suggestion asks for more validation images


class Finding(Enum):
    """What images tell of a teacher's accuracy."""

    ABOVE_CHANCE = "above chance"
    USELESS = "useless"
    UNDECIDED = "undecided"


def compare_with_chance(hits: int, n: int, chance: float) -> Finding:
    """Return whether ``hits`` of ``n`` images are significantly more than chance, else less than a useful teacher's.

    Both tests are one-sided and binomial: a useful teacher is called useless in at most 3 of 1,000 cases at any n. Few
    images decide neither.
    """
    if stats.binom.sf(hits - 1, n, min(chance, 1.0)) <= ALPHA:
        return Finding.ABOVE_CHANCE
    return Finding.USELESS if stats.binom.cdf(hits, n, _useful(chance)) <= ALPHA_USELESS else Finding.UNDECIDED


def tells_classes_apart(decisions: Int64[Tensor, " n"], labels: Int64[Tensor, " n"], classes: int) -> bool:
    """Return whether a teacher is useful for classes of unequal size, though no more accurate than the most frequent.

    One that was trained with ``class_weight`` or balanced sampling is. Its balanced accuracy must be that of a useful
    teacher of equal classes, and its hits more than in 99 of 100 permutations of its answers.
    """
    present = len(labels.unique())
    if balanced_accuracy(F.one_hot(decisions, classes).float(), labels) < _useful(1 / max(present, 2)):
        return False
    generator, hits = torch.Generator().manual_seed(0), int((decisions == labels).sum())
    drawn = (decisions[torch.randperm(len(labels), generator=generator)] for _ in range(PERMUTATIONS))
    as_many = sum(int((permuted == labels).sum()) >= hits for permuted in drawn)
    return (1 + as_many) / (1 + PERMUTATIONS) <= ALPHA


def _useful(chance: float) -> float:
    return chance + USEFUL * (1 - chance)


def doubt(dataset: Dataset) -> str | None:
    """Return a sentence if the validation images are too few to tell a barely useful teacher from chance, else None."""
    labels = dataset.validation.labels
    n, chance = len(labels), _chance(labels, dataset.classes)
    sizes = np.arange(1, MOST_NEEDED)
    least = stats.binom.isf(ALPHA, sizes, chance) + 1  # hits that are significantly above chance
    enough = sizes[least <= _useful(chance) * sizes]
    if len(enough) and n >= enough[0]:
        return None
    text = f"{counted(n, 'validation image')} cannot tell a teacher from chance ({100 * chance:.1f} %)"
    if n < MOST_NEEDED and least[n - 1] <= n:
        text += f" below {100 * least[n - 1] / n:.0f} %"
    share = enough[0] / (n + len(dataset.train)) if len(enough) else 1.0
    if share > 0.5:
        return f"{text}: add images, or judge the teacher by its test accuracy in the table"
    if dataset.has_own_validation:
        return f"{text}: add images to the validation split, if that matters"
    share = math.ceil(20 * share) / 20
    return f"{text}: set data.validation_fraction={share:g} for about {enough[0]} images, if that matters"


def gate(
    classifier: Classifier, card: TeacherCard, dataset: Dataset, recipe: TeacherRecipe, precision: Precision
) -> TeacherCard:
    """Measure the teacher on the validation images, with the normalisation and resolution of distillation.

    Refuse it if it was never trained, if its accuracy is useless and not above chance (``compare_with_chance``,
    ``tells_classes_apart``), if it is below ``teacher.min_top1``, or if it was not trained here and another resolution,
    normalisation, order of classes or order of channels is significantly better (see ``alternatives``). A teacher that
    was not trained here is tested on training images too, where validation images are few. Under
    ``teacher.allow_weak``, mark it as weak instead.

    Raises:
        TeacherError: The teacher is refused; the message has the likely cause and the next step.
    """
    validation = dataset.validation
    labels = validation.labels.cpu()
    logits = predict_logits(classifier, validation, precision)
    if logits.shape[-1] != dataset.classes:
        raise TeacherError(
            f"teacher {card.name} has {logits.shape[-1]} classes, but the data has {dataset.classes}: "
            f"set teacher.fit=head to train a new classifier for it"
        )
    hits, n, chance = int(top_k_hits(logits, labels).sum()), len(labels), _chance(labels, dataset.classes)
    alternative, decisions, evidence = None, logits.argmax(dim=-1), labels
    if card.fit == "none":
        decisions, evidence, sample = _evidence(classifier, logits, dataset, precision)
        usual_px = larger_usual_px(card, dataset)
        alternative = better_alternative(classifier, decisions, evidence, sample, dataset, precision, usual_px)
    judged = len(evidence)
    finding = compare_with_chance(int((decisions == evidence).sum()), judged, chance)
    if finding is not Finding.ABOVE_CHANCE and tells_classes_apart(decisions, evidence, dataset.classes):
        finding = Finding.ABOVE_CHANCE
    verdict = FIT_TO_TEACH
    if finding is Finding.UNDECIDED:
        verdict = _of_chance(judged, chance)
    elif card.fit == "none" and judged < FEWEST_PER_CLASS * dataset.classes:
        images = counted(judged, "image")
        verdict = f"{images} cannot tell whether its classes are in this order: compare it with the teacher's"
    measured = card.model_copy(update={"top1": hits / n, "n": n, "chance": chance, "verdict": verdict})
    reason = _reason(card, recipe, finding, alternative, measured)
    if reason is None:
        return measured
    cause, next_step = _cause(card, recipe, alternative)
    if recipe.allow_weak:
        for_bound_alone = reason == _below(recipe) and alternative is None
        return measured.model_copy(
            update={
                "verdict": f"{WEAK}: {reason}; {cause}",
                "weak": True,
                "verdict_without_bound": verdict if for_bound_alone else None,
            }
        )
    raise TeacherError(
        f"teacher {card.name} scores {100 * measured.top1:.2f} % on {counted(n, 'validation image')}, "
        f"which {reason}: {cause}; {next_step}, or set teacher.allow_weak=true to use it anyway"
    )


def recheck(card: TeacherCard, recipe: TeacherRecipe) -> TeacherCard:
    """Return the card of a teacher that passed the gate before, under bounds that a resumed run may change.

    Raises:
        TeacherError: It does not pass them.
    """
    least = recipe.min_top1
    if card.verdict_without_bound is not None:
        restored = {"weak": False, "verdict": card.verdict_without_bound, "verdict_without_bound": None}
        card = card.model_copy(update=restored)
    if least is not None and card.top1 < least and not card.weak:
        weak = {"weak": True, "verdict": f"{WEAK}: {_below(recipe)}", "verdict_without_bound": card.verdict}
        card = card.model_copy(update=weak)
    if card.weak and not recipe.allow_weak:
        lower = "lower teacher.min_top1, or " if least is not None and card.top1 < least else ""
        if not lower and card.fit == "none":
            lower = "delete its folder, so that it is checked again, or "
        raise TeacherError(
            f"teacher {card.name} scores {100 * card.top1:.2f} % on {counted(card.n, 'validation image')} and is "
            f"{card.verdict.replace(WEAK, 'weak')}: {lower}set teacher.allow_weak=true to use "
            "it anyway"
        )
    return card


def larger_usual_px(card: TeacherCard, dataset: Dataset) -> int | None:
    """Return the resolution of the library's weights for a teacher that takes views as they are, if it is larger."""
    if card.image_px is not None or card.name.partition("/")[0] not in ("timm", "torchvision"):
        return None
    usual_px = pretrained_px(card.name)
    return usual_px if usual_px is not None and usual_px > max(dataset.image_px) else None


def _below(recipe: TeacherRecipe) -> str:
    return "" if recipe.min_top1 is None else f"is below teacher.min_top1={recipe.min_top1:g}"


def _of_chance(images: int, chance: float) -> str:
    """Return the verdict on a teacher that too few images judge."""
    return f"{counted(images, 'image')} cannot tell it from chance ({100 * chance:.1f} %)"


def _chance(labels: Tensor, classes: int) -> float:
    """Return the share of the most frequent class."""
    return labels.bincount(minlength=classes).max().item() / len(labels)


def _evidence(
    classifier: Classifier, validation_logits: Tensor, dataset: Dataset, precision: Precision
) -> tuple[Tensor, Tensor, Split]:
    """Return what a teacher that was not trained here is tested on.

    Returns:
        Its decisions on validation images, and on training images where those are few, for this run did not fit it to
        either; their classes; and a sample of the images, to predict under another normalisation.
    """
    decisions, labels = [validation_logits.argmax(dim=-1)], [dataset.validation.labels.cpu()]
    samples = [_sample(dataset.validation, EVIDENCE)]
    if len(dataset.validation) < EVIDENCE:
        more = _sample(dataset.train, EVIDENCE - len(dataset.validation))
        decisions.append(predict_logits(classifier, more, precision).argmax(dim=-1))
        labels.append(more.labels.cpu())
        samples.append(more)
    images = torch.cat([some.pixels(torch.arange(len(some))) for some in samples])
    return torch.cat(decisions), torch.cat(labels), Split(images, torch.cat([some.labels for some in samples]))


def _sample(split: Split, count: int) -> Split:
    """Return some images of a split at random, always the same, in random order: splits are sorted by class."""
    shuffled = fixed_shuffle(len(split))[:count]
    return Split(split.pixels(shuffled), split.labels[shuffled.to(split.labels.device)])


def _reason(
    card: TeacherCard, recipe: TeacherRecipe, finding: Finding, alternative: Alternative | None, measured: TeacherCard
) -> str | None:
    """Return what is wrong with the accuracy of a refused teacher; None for one that passes."""
    if finding is Finding.USELESS or (card.verdict and finding is Finding.UNDECIDED):
        return f"is not significantly above chance ({100 * measured.chance:.1f} %)"
    if card.verdict:
        return "is accidental"
    if recipe.min_top1 is not None and measured.top1 < recipe.min_top1:
        return _below(recipe)
    return None if alternative is None else "is less than it could be"


def _cause(card: TeacherCard, recipe: TeacherRecipe, alternative: Alternative | None) -> tuple[str, str]:
    """Return the likely cause of a refusal, and the next step."""
    if card.verdict:
        return card.verdict, "set teacher.fit=head (or full) to train it"
    if alternative is not None:
        return alternative.cause, alternative.remedy
    longer = f"train it longer (teacher.train.epochs={2 * recipe.train.epochs})"
    if card.fit == "full":
        return "it was trained too briefly, or with an unsuitable learning rate", longer
    if card.fit == "head":
        return (
            "its classifier was trained too briefly, or its features do not suit",
            f"{longer} or set teacher.fit=full",
        )
    return (
        "its weights are not for this data",
        "set teacher.fit=head to train a new classifier on them, or teacher.fit=full to train it here",
    )
