"""The teacher: how it comes about, how it is checked before it may teach, and how it is kept from changing.

A teacher is built from a name, gets weights from a file, a library or training here, passes the gate, and is frozen.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from deitkit.checkpoint import drop_state, load_classifier, save_classifier
from deitkit.cohort import Cohort
from deitkit.data.sources import Dataset, Split, load_dataset
from deitkit.device import Precision
from deitkit.errors import TeacherError
from deitkit.evaluate import predict, top_k_hits
from deitkit.files import write_text
from deitkit.methods import METHODS
from deitkit.models.classifier import Classifier
from deitkit.models.weights import LoadReport, file_sha256, load_into, read_state
from deitkit.models.zoo import Built, create_classifier, reset_head
from deitkit.recipe import DistillationRecipe, Recipe, TeacherRecipe
from deitkit.runs import Watcher, train_to_end
from deitkit.saved_teacher import build_saved
from deitkit.seeding import seeded
from deitkit.speed import accelerate
from deitkit.student import Student

IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# A teacher that gains this much from another normalisation or order of classes was given the wrong one.
SUSPICIOUS_GAIN = 0.05


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


@dataclass(frozen=True)
class TeacherCard:
    """What a reader of a comparison must know of its teacher; ``top1`` is on the ``n`` validation images."""

    name: str
    source: str
    fit: str  # none | head | full
    top1: float
    n: int
    chance: float
    verdict: str
    weak: bool
    parameters: int
    image_px: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    readout: str | None = None  # of a student that teaches; a CNN has one answer
    sha256: str | None = None  # of the weights that taught, as they lie in the run folder


def prepare_teacher(
    recipe: Recipe, dataset: Dataset, *, folder: Path, precision: Precision, watcher: Watcher
) -> tuple[FrozenTeacher, TeacherCard]:
    """Build, train where the recipe says so, check and freeze the teacher; writes its folder, or reads it on resume.

    Raises:
        TeacherError: The gate refused it; the sentence names the likely cause.
    """
    card_path = folder / "card.json"
    if card_path.exists():
        classifier = accelerate(load_classifier(folder, precision.device)[0], recipe.speed, precision.device)
        stored = json.loads(card_path.read_text(encoding="utf-8"))
        classifier.readout = stored.get("readout")
        stored |= {name: tuple(stored[name]) for name in ("mean", "std")}
        return FrozenTeacher(classifier), TeacherCard(**stored)
    with seeded(recipe.seeds[0], folder.name):
        classifier, card = draft_teacher(recipe.teacher, dataset)
    accelerate(classifier, recipe.speed, precision.device)
    if card.fit != "none":
        lessons = dataset
        if recipe.teacher.all_images:
            lessons = load_dataset(recipe.data.model_copy(update={"train_images": None}), watcher.reading)
        _train(classifier, card, recipe, lessons, folder=folder, precision=precision, watcher=watcher)
        card = replace(card, source=f"{card.source}, trained here on {len(lessons.train)} images")
    card = gate(classifier, card, dataset, recipe.teacher, precision)
    save_classifier(folder, classifier, _model_card(card, dataset, recipe))
    card = replace(card, sha256=file_sha256(folder / "model.safetensors"))
    write_text(card_path, json.dumps(asdict(card), indent=2) + "\n")
    drop_state(folder / "checkpoint.safetensors")
    watcher.say(f"teacher {card.name}: {100 * card.top1:.2f} % on {card.n} validation images, {card.verdict}")
    return FrozenTeacher(classifier), card


def _model_card(card: TeacherCard, dataset: Dataset, recipe: Recipe) -> dict[str, Any]:
    return {
        "architecture": card.name,
        "channels": dataset.channels,
        "class_names": list(dataset.class_names),
        "input_px": list(dataset.image_px),
        "eval_crop": recipe.data.eval_crop,
        "readout": card.readout,
        "source": card.source,
        "validation_top1": card.top1,
    }


def draft_teacher(recipe: TeacherRecipe, dataset: Dataset) -> tuple[Classifier, TeacherCard]:
    """Build a teacher with the weights that its recipe names; the card's accuracy is not known yet."""
    recipe, built, readout = _build(recipe, dataset)
    source, new_head, new_body = built.source, built.new_head, not recipe.pretrained
    if recipe.checkpoint is not None:
        report = _load(built, recipe)
        source = f"{recipe.checkpoint.name} (sha256 {file_sha256(recipe.checkpoint)[:8]})"
        new_head, new_body = bool(report.mismatched or report.missing), False
    if recipe.reset_head:
        reset_head(built, dataset.classes)
        source, new_head = f"{source}, classifier replaced by a fresh one", True
    fit = recipe.fit
    if fit == "auto":
        fit = "full" if new_body else "head" if new_head else "none"
    mean, std = _normalisation(recipe, built, dataset)
    trainable = built.head if fit == "head" else None
    image_px = recipe.image_px or built.image_px
    classifier = Classifier(built.model, mean=mean, std=std, image_px=image_px, trainable=trainable, readout=readout)
    card = TeacherCard(
        name=recipe.name,
        source=source,
        fit=fit,
        top1=0.0,
        n=0,
        chance=0.0,
        verdict=_untrained(new_head, new_body and recipe.checkpoint is None) if fit == "none" else "",
        weak=False,
        parameters=sum(parameter.numel() for parameter in built.model.parameters()),
        image_px=image_px,
        mean=mean,
        std=std,
        readout=readout,
    )
    return classifier, card


def _build(recipe: TeacherRecipe, dataset: Dataset) -> tuple[TeacherRecipe, Built, str | None]:
    """Build the architecture; of one named by a path, return also what the card there says of its use."""
    if Path(recipe.name).exists():
        return build_saved(recipe, dataset)
    built = create_classifier(
        recipe.name,
        classes=dataset.classes,
        channels=dataset.channels,
        pretrained=recipe.pretrained and recipe.checkpoint is None,
        image_px=recipe.image_px,
    )
    return recipe, built, None


def _untrained(new_head: bool, new_body: bool) -> str:
    """Say what of a teacher that is not trained here was never trained at all."""
    if new_body:
        return "no weights were loaded (teacher.checkpoint is not set) and none are trained here"
    return "its classifier is new and was not trained" if new_head else ""


def _load(built: Built, recipe: TeacherRecipe) -> LoadReport:
    assert recipe.checkpoint is not None
    return load_into(built.model, read_state(recipe.checkpoint), head=built.head, source=str(recipe.checkpoint))


def _normalisation(
    recipe: TeacherRecipe, built: Built, dataset: Dataset
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the recipe's normalisation, else the library's, else the data set's."""
    for mean, std in ((recipe.mean, recipe.std), (built.mean, built.std)):
        if mean is not None and std is not None:
            if len(mean) != dataset.channels or len(std) != dataset.channels:
                raise TeacherError(
                    f"teacher.mean={list(mean)} has {len(mean)} channels, the images have {dataset.channels}: "
                    f"give {dataset.channels} values, or set data.channels={len(mean)}"
                )
            return mean, std
    return dataset.mean, dataset.std


def _train(
    classifier: Classifier,
    card: TeacherCard,
    recipe: Recipe,
    dataset: Dataset,
    *,
    folder: Path,
    precision: Precision,
    watcher: Watcher,
) -> None:
    """Train the teacher on labels alone: a cohort of one."""
    part = "classifier layer" if card.fit == "head" else "every layer"
    watcher.say(f"teacher {card.name}: training {part} for {recipe.teacher.train.epochs} epochs")
    student = Student(folder.name, METHODS["none"], classifier, recipe.teacher.train)
    cohort = Cohort(
        [student],
        teacher=None,
        dataset=dataset,
        augment=recipe.teacher.augment,
        train=recipe.teacher.train,
        distillation=DistillationRecipe(),
        speed=recipe.speed,
        precision=precision,
        seed=recipe.seeds[0],
    )
    train_to_end(
        cohort,
        title=folder.name,
        checkpoint=folder / "checkpoint.safetensors",
        metrics=folder / "metrics.jsonl",
        watcher=watcher,
        log_folder=folder.parent / "tensorboard",
        save_seconds=recipe.speed.save_seconds,
    )
    if student.stopped:
        raise TeacherError(f"teacher {card.name} {student.stopped}: lower teacher.train.learning_rate")


def gate(
    classifier: Classifier, card: TeacherCard, dataset: Dataset, recipe: TeacherRecipe, precision: Precision
) -> TeacherCard:
    """Measure the teacher on the validation images, through exactly what it will teach with, and judge it.

    It is refused if its accuracy cannot be told from chance (one-sided binomial test against the commonest class at
    p = 0.001), if it lies below ``teacher.min_top1``, or if another normalisation or another order of its classes
    would make it much better. ``teacher.allow_weak`` lets it teach all the same, marked as weak.

    Raises:
        TeacherError: Refused; names the likely cause and the next step.
    """
    validation = dataset.validation
    labels = validation.labels.cpu()
    logits = predict(classifier, validation, precision).class_logits
    assert logits is not None
    if logits.shape[-1] != dataset.classes:
        raise TeacherError(
            f"teacher {card.name} answers with {logits.shape[-1]} classes, the data has {dataset.classes}: "
            f"set teacher.fit=head to train a new classifier for it"
        )
    hits, n = int(top_k_hits(logits, labels).sum()), len(labels)
    top1 = hits / n
    chance = labels.bincount(minlength=dataset.classes).max().item() / n
    measured = replace(card, top1=top1, n=n, chance=chance, verdict="fit to teach")
    reason = "is by luck" if card.verdict else None
    if stats.binomtest(hits, n, min(chance, 1.0), alternative="greater").pvalue > 0.001:
        reason = f"cannot be told from chance ({100 * chance:.1f} %)"
    elif recipe.min_top1 is not None and top1 < recipe.min_top1:
        reason = f"is below teacher.min_top1={recipe.min_top1:g}"
    # What was trained here, under its own normalisation and the data's own classes, cannot have got them wrong.
    cause = None if card.fit == "full" else _likely_cause(classifier, logits, dataset, precision)
    if reason is None and cause is not None:
        reason = "is less than it could be"
    if reason is None:
        return measured
    usual = "it was trained too briefly" if card.fit != "none" else "its weights are not for this data"
    cause = card.verdict or cause or usual
    if recipe.allow_weak:
        return replace(measured, verdict=f"weak, allowed by the recipe: {reason}; {cause}", weak=True)
    raise TeacherError(
        f"teacher {card.name} scores {100 * top1:.2f} % on {n} validation images, which {reason}: {cause}; "
        f"{_next_step(card, recipe)}, or set teacher.allow_weak=true to let it teach all the same"
    )


def _next_step(card: TeacherCard, recipe: TeacherRecipe) -> str:
    if card.verdict:
        return "set teacher.fit=head (or full) to train it"
    if card.fit != "none":
        return f"train it longer (teacher.train.epochs={2 * recipe.train.epochs})"
    return "put that right, or set teacher.fit=full to train it here"


def _likely_cause(classifier: Classifier, logits: Tensor, dataset: Dataset, precision: Precision) -> str | None:
    """Look for another order of classes, or another normalisation, with which the teacher would be much better."""
    labels = dataset.validation.labels.cpu()
    hits = top_k_hits(logits, labels)
    confusion = torch.zeros(dataset.classes, dataset.classes).index_put_(
        (logits.argmax(dim=-1), labels), torch.ones(len(labels)), accumulate=True
    )
    answers, classes = linear_sum_assignment(confusion.numpy(), maximize=True)
    reordered = float(confusion[answers, classes].sum()) / len(labels)
    # The best order of a random head beats chance too, so a reordering must make a good teacher, not a better one.
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
