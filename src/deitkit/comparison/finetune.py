"""Fine-tuning: a comparison whose students start from a checkpoint, which has a row of its own in the table.

The architecture is the checkpoint's, unless the recipe sets it. ``models/weights`` reads and adapts weights.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.comparison.rows import Predictions, RowKey, Summary, corrected, paired_over_seeds
from deitkit.comparison.verdict import p_in_words
from deitkit.data.dataset import Dataset, load_test
from deitkit.data.duplicates import MOST_SEEN
from deitkit.distillation.methods import METHODS
from deitkit.errors import RecipeError
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import readout_scores, top_k_accuracy, top_k_hits
from deitkit.evaluation.seen_images import say_seen, share_seen
from deitkit.evaluation.statistics import wilson_interval
from deitkit.models.classifier import Classifier
from deitkit.models.vit import SIZES
from deitkit.models.weights.initialise import Weights, read_weights
from deitkit.models.weights.pretrained import initial_weights_path
from deitkit.recipe.schema import DataRecipe, ModelRecipe, Recipe
from deitkit.run.difference import Difference
from deitkit.run.observer import Watcher
from deitkit.run.reported import default_readout
from deitkit.run.results import Row, with_difference
from deitkit.system.device import Precision
from deitkit.system.words import first_of

BEFORE = "before"  # the method of the checkpoint's row
ADAPTABLE = ("patch_px", "layer_scale")  # of the architecture, what weights can be made to fit


def start_from(recipe: Recipe, checkpoint: Path) -> Recipe:
    """Return the recipe with students that start from a checkpoint and have its architecture.

    The recipe may set another patch size, to which the patch embedding is resized, and LayerScale; and the number of
    heads of a file without a card, by default one per 64 of its width.

    Args:
        recipe: What to train on, and how.
        checkpoint: A run folder (its winner), a model folder, or a weights file.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        RecipeError: The recipe has another size or checkpoint, or would test on the checkpoint's training images.
    """
    model = recipe.model
    if model.pretrained is not None:
        raise RecipeError(
            f"model.pretrained={model.pretrained} in the recipe, but {checkpoint} on the command line: drop one of them"
        )
    if model.checkpoint not in (None, checkpoint):
        raise RecipeError(
            f"model.checkpoint={model.checkpoint} in the recipe, but {checkpoint} on the command line: drop one of them"
        )
    weights = read_weights(checkpoint, heads=model.heads)
    given = weights.architecture
    found = {name: getattr(given, name) for name in ("width", "depth", "heads", "stem", "patch_px")}
    found["layer_scale"] = 1.0 if given.layer_scale else None  # where its factors start; they are the checkpoint's
    found |= {name: getattr(model, name) for name in ADAPTABLE if name in model.model_fields_set}
    named = _named(model)
    size = next((size for size in (model.name, *SIZES) if asdict(SIZES[size]).items() <= found.items()), None)
    wrong = [f"model.{name}={named[name]}" for name, value in found.items() if named.get(name, value) != value]
    if wrong:
        fields = {name: value for name, value in found.items() if name not in ADAPTABLE}
        if size is not None:  # which replaces the dimensions of a shipped recipe
            fields = {"name": size} | {name: fields[name] for name in fields if name not in asdict(SIZES[size])}
        shown = " ".join(f"model.{name}={value}" for name, value in fields.items())
        raise RecipeError(f"{' and '.join(wrong)} in the recipe, but {checkpoint} has {shown}: set these")
    _check_division(recipe.data, weights)
    changed = model.model_copy(update={"name": size or model.name, "checkpoint": checkpoint, **found})
    return recipe.model_copy(update={"model": changed})


def _named(model: ModelRecipe) -> dict[str, Any]:
    """Return the architecture that a recipe sets: the named size, if any, and the fields set explicitly."""
    size = asdict(SIZES[model.name]) if "name" in model.model_fields_set else {}
    chosen = {name: getattr(model, name) for name in model.model_fields_set}
    return size | {name: value for name, value in chosen.items() if value is not None}


def _check_division(data: DataRecipe, weights: Weights) -> None:
    """Raise RecipeError if a card without a sketch of its images names this data set with another split."""
    card = weights.card
    known = card is not None and card.seen is None and card.dataset == data.name
    division = card.split if card is not None and known else {}
    if any(getattr(data, field) != value for field, value in division.items()):
        shown = " ".join(f"data.{field}={value}" for field, value in division.items())
        raise RecipeError(
            f"{weights.file.parent} was trained on {data.name} with the split {shown}; with another it would be "
            "tested on its training images: set these"
        )


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that the students start from.

    Attributes:
        scores: On the test images; None where it cannot be measured.
        readout: Of the scores.
        parameters: Of the model.
        method: By which it was trained, if its card records it.
        note: A remark for the readers of the table, as a sentence.
    """

    scores: Float[Tensor, "n classes"] | None
    readout: str
    parameters: int
    method: str | None
    note: str


def measure_checkpoint(
    recipe: Recipe, dataset: Dataset, precision: Precision, watcher: Watcher
) -> StartingPoint | None:
    """Predict the test images with the checkpoint of a recipe, at its own resolution; None without a checkpoint.

    Nothing is chosen by the result. A checkpoint with other classes than the data is not measured.
    """
    start = initial_weights_path(recipe.model)
    if start is None:
        return None
    # The heads of the students, which no tensor shows.
    weights = read_weights(start, heads=recipe.model.heads or SIZES[recipe.model.name].heads)
    name = recipe.model.pretrained or start
    found, card = weights.architecture, weights.card
    parameters = sum(value.numel() for value in weights.state.values())
    seen = 0.0 if card is None else share_seen(card, recipe.data, dataset, watcher.reading)
    if card is not None and seen > MOST_SEEN:
        raise RecipeError(say_seen(seen, str(name), card, dataset))
    obstacle = _obstacle(weights, dataset)
    if obstacle is not None:
        note = f"{name}, from which the students started, has no row of its own: {obstacle}."
        return StartingPoint(None, "", parameters, None if card is None else card.method, note)
    px = found.image_px[0]
    own: dict[str, Any] = {"image_px": px, "channels": found.channels}
    view = {"eval_crop": weights.eval_crop, "fit": weights.fit}
    own |= {field: value for field, value in view.items() if value is not None}
    test = load_test(recipe.data.model_copy(update=own), watcher.reading)[0]
    assert torch.equal(test.labels, dataset.test.labels.cpu()), "both are the same images in the same order"
    scores = readout_scores(predict(_build(weights).to(precision.device), test, precision))
    readout = (None if card is None else card.readout) or default_readout(list(scores))
    note = f"{BEFORE}: {name} as it was before fine-tuning, at {px} px"
    if seen > 0:
        note += f"; about {100 * seen:.1f} % of the test images are its training images"
    if weights.class_names is None:
        note += "; nothing names its classes, which are taken to be those of the data"
    top1 = top_k_accuracy(scores[readout], dataset.test.labels.cpu())
    watcher.say(f"before fine-tuning: {100 * top1:.2f} % on the test images at {px} px ({readout})")
    return StartingPoint(scores[readout], readout, parameters, None if card is None else card.method, f"{note}.")


def _obstacle(weights: Weights, dataset: Dataset) -> str | None:
    """Return why a model cannot be measured on a data set, or None."""
    found, names = weights.architecture, weights.class_names
    if found.classes == 0:
        return "it has no classifier"
    if found.classes != dataset.classes or names not in (None, dataset.class_names):
        shown = f" ({first_of(names)})" if names else ""
        return f"its {found.classes} classes{shown} are not the {dataset.classes} of {dataset.name}"
    if found.image_px[0] != found.image_px[1]:
        return f"it takes images of {found.image_px[0]} x {found.image_px[1]} px, and these are square"
    return None


def _build(weights: Weights) -> Classifier:
    model = weights.architecture.build()
    model.load_state_dict(weights.state)
    mean, std = weights.normalisation
    return Classifier(model, mean=mean, std=std, readout=weights.only_readout)


def add_checkpoint_row(
    summary: Summary,
    start: StartingPoint,
    dataset: Dataset,
    predictions: Predictions,
    teacher_logits: Float[Tensor, "n classes"] | None,
) -> Summary:
    """Put the row of the checkpoint before those of the students, and add each student's gain over it.

    Args:
        summary: Of the students.
        start: The checkpoint.
        dataset: Its test labels.
        predictions: As for ``rows.summarise``.
        teacher_logits: The teachers' logits on the test images.
    """
    summary = replace(summary, notes=(*summary.notes, start.note))
    if start.scores is None:
        return summary
    labels = dataset.test.labels.cpu()
    hits = top_k_hits(start.scores, labels)
    rows = corrected(
        [with_difference(row, "before", _gain(row, predictions, hits, labels)) for row in summary.rows],
        "before",
    )
    winner = next((row for row in rows if summary.winner is not None and row.row == summary.winner.row), None)
    return replace(
        summary,
        rows=(_checkpoint_row(start, dataset, teacher_logits), *rows),
        winner=winner,
        verdict=summary.verdict + _verdict(winner),
    )


def _gain(row: Row, predictions: Predictions, start: Tensor, labels: Tensor) -> Difference | None:
    """Compare a row with the checkpoint on the same images, over the finished seeds."""
    hits = RowKey.of(row).hits(predictions, labels)
    return paired_over_seeds(hits, dict.fromkeys(hits, start))


def _checkpoint_row(start: StartingPoint, dataset: Dataset, teacher_logits: Float[Tensor, "n classes"] | None) -> Row:
    """Return the checkpoint's row: of one model, for any number of seeds."""
    assert start.scores is not None
    labels = dataset.test.labels.cpu()
    hits, n = int(top_k_hits(start.scores, labels).sum()), len(labels)
    method = METHODS.get(start.method or "")
    return Row(
        row=f"{BEFORE}/{start.readout}",
        label="before fine-tuning",
        method=BEFORE,
        readout=start.readout,
        weights="last",
        kind="checkpoint",
        reference=False,
        labels=method.uses_labels if method else None,
        teacher=method.teacher_signal if method else None,
        tokens=method.token_layout if method else "-",
        top1=(hits / n,),
        top5=(top_k_accuracy(start.scores, labels, 5),) if dataset.classes > 5 else None,
        n=n,
        top1_mean=hits / n,
        top1_ci95=wilson_interval(hits, n),
        validation_top1=(None,),
        teacher_agreement=None
        if teacher_logits is None
        else top_k_accuracy(start.scores, teacher_logits.argmax(dim=-1)),
        parameters=start.parameters,
        status="ok",
    )


def _verdict(winner: Row | None) -> str:
    gain = None if winner is None else winner.differences.get("before")
    if winner is None or gain is None:
        return ""
    return (
        f" {winner.row} differs by {100 * gain.mean:+.2f} points from the model before fine-tuning "
        f"({p_in_words(gain)})."
    )
