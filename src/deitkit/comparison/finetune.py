"""Fine-tuning: a comparison whose students start from a checkpoint, and the checkpoint itself as a row beside them.

What a recipe leaves open of the architecture is the checkpoint's. How weights are read and made to fit is the business
of ``models/exchange``, how students are trained that of ``compare``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.data.dataset import Dataset, load_test
from deitkit.distillation.methods import METHODS
from deitkit.errors import RecipeError
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import default_readout, readout_scores, top_k_accuracy, top_k_hits
from deitkit.evaluation.statistics import paired_difference, wilson_interval
from deitkit.models.classifier import Classifier
from deitkit.models.vit import SIZES
from deitkit.models.weights.initialise import Weights, read_weights
from deitkit.recipe.schema import DataRecipe, ModelRecipe, Recipe
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision

BEFORE = "before"  # stands where a row has its method
ADAPTABLE = ("patch_px", "layer_scale")  # of the architecture, what weights can be made to fit


def start_from(recipe: Recipe, checkpoint: Path) -> Recipe:
    """Return the recipe with students that start from a checkpoint, and have its architecture.

    What the recipe leaves open is the checkpoint's. It may name another patch, to which the patch embedding is resized,
    and have LayerScale or not; and say how many heads a file has that no card tells of, otherwise one for each 64 of
    its width.

    Args:
        recipe: What to train on, and how.
        checkpoint: A run folder (its winner), a model folder, or a weights file.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        RecipeError: The recipe names another size or checkpoint, or would test on images that the checkpoint learnt.
    """
    model = recipe.model
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
    wrong = [f"model.{name}={named[name]}" for name, value in found.items() if named.get(name, value) != value]
    if wrong:
        told = " ".join(f"model.{name}={value}" for name, value in found.items() if name not in ADAPTABLE)
        raise RecipeError(
            f"{' and '.join(wrong)} in the recipe, but {checkpoint} has {told}: set these, or leave them all out"
        )
    _check_division(recipe.data, weights)
    sizes = (model.name, *SIZES)
    size = next((size for size in sizes if asdict(SIZES[size]).items() <= found.items()), model.name)
    changed = model.model_copy(update={"name": size, "checkpoint": checkpoint, **found})
    return recipe.model_copy(update={"model": changed})


def _named(model: ModelRecipe) -> dict[str, Any]:
    """Return what a recipe says of the architecture: the size that it names, if any, and what it sets itself."""
    size = asdict(SIZES[model.name]) if "name" in model.model_fields_set else {}
    chosen = {name: getattr(model, name) for name in model.model_fields_set}
    return size | {name: value for name, value in chosen.items() if value is not None}


def _check_division(data: DataRecipe, weights: Weights) -> None:
    """Raise RecipeError if the data are divided otherwise than when the checkpoint was trained on them."""
    division = weights.card.get("split", {}) if weights.card.get("dataset") == data.name else {}
    if any(getattr(data, field) != value for field, value in division.items()):
        told = " ".join(f"data.{field}={value}" for field, value in division.items())
        raise RecipeError(
            f"{weights.file.parent} was trained on {data.name} as divided by {told}; under another division it would "
            "be tested on images that it learnt: set these"
        )


@dataclass(frozen=True)
class Before:
    """The model that the students start from, as it was before.

    Attributes:
        scores: On the test images, by the readout; None where it cannot be asked.
        readout: Which heads answer.
        parameters: How many it has.
        method: By which it was trained, if its card tells.
        note: What a reader of the table must know of it.
    """

    scores: Float[Tensor, "n classes"] | None
    readout: str
    parameters: int
    method: str | None
    note: str


def ask_checkpoint(recipe: Recipe, dataset: Dataset, precision: Precision, watcher: Watcher) -> Before | None:
    """Ask the checkpoint of a recipe about the test images, at its own resolution; None where there is no checkpoint.

    Nothing is chosen by the answer. It is asked only where it knows the classes of the data.
    """
    if recipe.model.checkpoint is None:
        return None
    weights = read_weights(recipe.model.checkpoint, heads=recipe.model.heads)
    found, card = weights.architecture, weights.card
    parameters = sum(value.numel() for value in weights.state.values())
    obstacle = _obstacle(weights, dataset)
    if obstacle is not None:
        note = f"{recipe.model.checkpoint}, from which the students started, has no row of its own: {obstacle}."
        return Before(None, "", parameters, card.get("method"), note)
    px = found.image_px[0]
    own = {"image_px": px, "channels": found.channels, "eval_crop": card.get("eval_crop", recipe.data.eval_crop)}
    test, _ = load_test(recipe.data.model_copy(update=own), watcher.reading)
    assert torch.equal(test.labels, dataset.test.labels.cpu()), "both are the same images in the same order"
    scores = readout_scores(predict(_build(weights).to(precision.device), test, precision))
    readout = card.get("readout") or default_readout(list(scores))
    note = f"{BEFORE}: {recipe.model.checkpoint} as it was before fine-tuning, at {px} px"
    if weights.class_names is None:
        note += "; nothing names its classes, which are taken to be those of the data"
    top1 = top_k_accuracy(scores[readout], dataset.test.labels.cpu())
    watcher.say(f"before fine-tuning: {100 * top1:.2f} % on the test images at {px} px ({readout})")
    return Before(scores[readout], readout, parameters, card.get("method"), f"{note}.")


def _obstacle(weights: Weights, dataset: Dataset) -> str | None:
    """Say why a model cannot be asked about a data set, if so."""
    found, names = weights.architecture, weights.class_names
    if found.classes == 0:
        return "it has no classifier"
    if found.classes != dataset.classes or names not in (None, dataset.class_names):
        shown = f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
        return f"it knows {found.classes} other classes{shown} than the {dataset.classes} of {dataset.name}"
    if found.image_px[0] != found.image_px[1]:
        return f"it takes images of {found.image_px[0]} x {found.image_px[1]} px, and these are square"
    return None


def _build(weights: Weights) -> Classifier:
    model = weights.architecture.build()
    model.load_state_dict(weights.state)
    mean, std = weights.normalisation
    return Classifier(model, mean=mean, std=std)


def beside_checkpoint(
    summary: dict[str, Any],
    before: Before,
    dataset: Dataset,
    predictions: dict[int, Any],
    answers: Float[Tensor, "n classes"] | None,
) -> dict[str, Any]:
    """Put the row of the checkpoint before those of the students, and what each has gained over it.

    Args:
        summary: What ``rows.summarise`` says.
        before: The checkpoint as it was.
        dataset: Its test labels.
        predictions: As for ``rows.summarise``.
        answers: The teacher's logits on the test images.
    """
    summary = summary | {"notes": [*summary["notes"], before.note]}
    if before.scores is None:
        return summary
    labels = dataset.test.labels.cpu()
    hits = top_k_hits(before.scores, labels)
    rows = [
        row | _gain(row, [student[row["method"]] for student in predictions.values()], hits, labels)
        for row in summary["rows"]
    ]
    return summary | {
        "rows": [_row(before, dataset, answers), *rows],
        "verdict": summary["verdict"] + _verdict(rows, summary["winner"]),
    }


def _gain(row: dict[str, Any], students: Sequence[Any], start: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compare a row with the checkpoint on the same images, over the seeds that ended."""
    finished = [student["scores"][row["weights"]]["test"] for student in students if student["status"] is None]
    if not finished:
        return _NO_GAIN
    hits = [top_k_hits(scores[row["readout"]], labels) for scores in finished]
    difference = paired_difference(hits, [start] * len(hits))
    return {
        "difference_vs_before": difference.mean,
        "difference_vs_before_ci95": difference.ci95,
        "p_vs_before": difference.p,
        "p_vs_before_test": difference.test,
    }


_NO_GAIN: dict[str, Any] = dict.fromkeys(
    ("difference_vs_before", "difference_vs_before_ci95", "p_vs_before", "p_vs_before_test")
)


def _row(before: Before, dataset: Dataset, answers: Float[Tensor, "n classes"] | None) -> dict[str, Any]:
    """Return the checkpoint's row: of one model, whatever the number of seeds."""
    assert before.scores is not None
    labels = dataset.test.labels.cpu()
    hits, n = int(top_k_hits(before.scores, labels).sum()), len(labels)
    method = METHODS.get(before.method or "")
    agreement = None if answers is None else top_k_accuracy(before.scores, answers.argmax(dim=-1))
    unknown = ("top1_std", "difference_vs_none", "difference_ci95", "p_vs_none", "p_test")
    return {
        "row": f"{BEFORE}/{before.readout}",
        "label": "before fine-tuning",
        "method": BEFORE,
        "readout": before.readout,
        "weights": "last",
        "labels": method.uses_labels if method else None,
        "teacher": method.teacher_signal if method else None,
        "tokens": method.token_layout if method else "-",
        "top1": [hits / n],
        "top5": [top_k_accuracy(before.scores, labels, 5)] if dataset.classes > 5 else None,
        "n": n,
        "top1_mean": hits / n,
        "top1_ci95": wilson_interval(hits, n),
        "validation_top1": [None],
        **dict.fromkeys(unknown),
        **_NO_GAIN,
        "teacher_agreement": agreement,
        "parameters": before.parameters,
        "images_per_second": None,
        "train_seconds": None,
        "status": "ok",
    }


def _verdict(rows: Sequence[dict[str, Any]], winner: str | None) -> str:
    row = next((row for row in rows if row["row"] == winner), None)
    if row is None:
        return ""
    luck = "" if row["p_vs_before"] < 0.05 else ": it may be luck"
    return (
        f" {winner} differs by {100 * row['difference_vs_before']:+.2f} points from the model before fine-tuning "
        f"(p = {row['p_vs_before']:.2g}, {row['p_vs_before_test']}{luck})."
    )
