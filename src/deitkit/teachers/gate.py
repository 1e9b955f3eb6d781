"""The gate: it measures a teacher before distillation, and refuses a bad one with the likely cause."""

import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deitkit.data.dataset import Dataset, Split
from deitkit.errors import TeacherError
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import top_k_hits
from deitkit.models.classifier import Classifier
from deitkit.recipe.schema import TeacherRecipe
from deitkit.run.results import TeacherCard
from deitkit.system.device import Precision

IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# A gain in accuracy by another normalisation or order of classes that indicates a wrong one.
SUSPICIOUS_GAIN = 0.05


def gate(
    classifier: Classifier, card: TeacherCard, dataset: Dataset, recipe: TeacherRecipe, precision: Precision
) -> TeacherCard:
    """Measure the teacher on the validation images, with the normalisation and resolution of distillation.

    Refuse it if its accuracy is not significantly above chance (one-sided binomial test against the most frequent class
    at p = 0.001), if it is below ``teacher.min_top1``, or if another normalisation or another order of its classes
    would make it much better. Under ``teacher.allow_weak``, mark it as weak instead.

    Raises:
        TeacherError: The teacher is refused; the message has the likely cause and the next step.
    """
    validation = dataset.validation
    labels = validation.labels.cpu()
    logits = predict(classifier, validation, precision).class_logits
    assert logits is not None
    if logits.shape[-1] != dataset.classes:
        raise TeacherError(
            f"teacher {card.name} has {logits.shape[-1]} classes, but the data has {dataset.classes}: "
            f"set teacher.fit=head to train a new classifier for it"
        )
    hits, n = int(top_k_hits(logits, labels).sum()), len(labels)
    top1 = hits / n
    chance = labels.bincount(minlength=dataset.classes).max().item() / n
    measured = card.model_copy(update={"top1": top1, "n": n, "chance": chance, "verdict": "fit to teach"})
    reason = "is accidental" if card.verdict else None
    if stats.binomtest(hits, n, min(chance, 1.0), alternative="greater").pvalue > 0.001:
        reason = f"is not significantly above chance ({100 * chance:.1f} %)"
    elif recipe.min_top1 is not None and top1 < recipe.min_top1:
        reason = f"is below teacher.min_top1={recipe.min_top1:g}"
    # A teacher that was fully trained here has the right normalisation and the classes of the data.
    cause = None if card.fit == "full" else _likely_cause(classifier, logits, dataset, precision)
    if reason is None and cause is not None:
        reason = "is less than it could be"
    if reason is None:
        return measured
    usual = "it was trained too briefly" if card.fit != "none" else "its weights are not for this data"
    cause = card.verdict or cause or usual
    if recipe.allow_weak:
        verdict = f"weak, allowed by the recipe: {reason}; {cause}"
        return measured.model_copy(update={"verdict": verdict, "weak": True})
    raise TeacherError(
        f"teacher {card.name} scores {100 * top1:.2f} % on {n} validation images, which {reason}: {cause}; "
        f"{_next_step(card, recipe)}, or set teacher.allow_weak=true to use it anyway"
    )


def _next_step(card: TeacherCard, recipe: TeacherRecipe) -> str:
    if card.verdict:
        return "set teacher.fit=head (or full) to train it"
    if card.fit != "none":
        return f"train it longer (teacher.train.epochs={2 * recipe.train.epochs})"
    return "correct that, or set teacher.fit=full to train it here"


def _likely_cause(classifier: Classifier, logits: Tensor, dataset: Dataset, precision: Precision) -> str | None:
    """Return another order of classes, or another normalisation, that would make the teacher much better."""
    labels = dataset.validation.labels.cpu()
    hits = top_k_hits(logits, labels)
    confusion = torch.zeros(dataset.classes, dataset.classes).index_put_(
        (logits.argmax(dim=-1), labels), torch.ones(len(labels)), accumulate=True
    )
    predicted, classes = linear_sum_assignment(confusion.numpy(), maximize=True)
    reordered = float(confusion[predicted, classes].sum()) / len(labels)
    # The best order of a random head also beats chance, so a reordering must give a good teacher, not a better one.
    if reordered > 0.5 and reordered - hits.double().mean().item() > max(SUSPICIOUS_GAIN, 0.5 * reordered):
        return f"its classes are in another order (in the best order it would score {100 * reordered:.1f} %)"
    sample = Split(dataset.validation.images[:1000], dataset.validation.labels[:1000])
    best_name, best = "", hits[: len(sample)].double().mean().item() + SUSPICIOUS_GAIN
    for name, (mean, std) in _normalisations(dataset).items():
        other = Classifier(
            classifier.model, mean=mean, std=std, image_px=classifier.image_px, readout=classifier.readout
        ).to(precision.device)
        scores = predict(other, sample, precision).class_logits
        assert scores is not None
        top1 = top_k_hits(scores, sample.labels.cpu()).double().mean().item()
        if top1 > best:
            best_name, best = f"{name} (teacher.mean={list(mean)} teacher.std={list(std)})", top1
    return f"its normalisation is wrong: with {best_name} it would score {100 * best:.1f} %" if best_name else None


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
