"""Readouts: scores from one or both heads of a student, and their accuracy."""

from collections.abc import Collection

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from deitkit.errors import RecipeError
from deitkit.models.card import ModelCard
from deitkit.models.classifier import READOUT_LOGITS
from deitkit.models.vit import Output
from deitkit.run.reported import default_readout


def readout_scores(output: Output) -> dict[str, Float[Tensor, "n classes"]]:
    """Return the logits of every readout that the heads allow; their softmax is the readout's probabilities."""
    classes, distillation = output.class_logits, output.distillation_logits
    if classes is None or distillation is None:
        return {"class": classes} if classes is not None else {"distillation": distillation}  # type: ignore[dict-item]
    return {name: logits(classes, distillation) for name, logits in READOUT_LOGITS.items()}


def named_scores(output: Output, card: ModelCard) -> dict[str, Float[Tensor, "n classes"]]:
    """Return the logits of every readout of a saved model; an ONNX file has only the one that it was exported with."""
    scores, exported = readout_scores(output), card.exported_readout
    return scores if exported is None else {exported: scores["class"]}


def choose_readout(asked: str | None, card: ModelCard, available: Collection[str]) -> str:
    """Return the readout to use: the one that was asked for, else that of the card, else the default one.

    Raises:
        RecipeError: The model does not have it.
    """
    chosen = asked or card.readout or default_readout(list(available))
    if chosen not in available:
        raise RecipeError(f"readout {chosen}: this model has {', '.join(available)}")
    return chosen


def top_k_hits(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int = 1) -> Bool[Tensor, " n"]:
    """Return for each image whether its label is among the k highest scores."""
    if k == 1:
        return scores.argmax(dim=-1) == labels
    return (scores.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1)


def top_k_accuracy(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int = 1) -> float:
    """Return the share of images whose label is among the k highest scores."""
    return top_k_hits(scores, labels, k).double().mean().item()


def balanced_accuracy(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    """Return the mean share of right images over the classes that have images."""
    from sklearn.metrics import recall_score  # here, since it takes a second to import

    present = labels.unique().numpy()
    return float(recall_score(labels.numpy(), scores.argmax(dim=-1).numpy(), labels=present, average="macro"))


def macro_f1(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    """Return the mean F1 over the classes that have images; 0 for one that is never the answer."""
    from sklearn.metrics import f1_score  # here, since it takes a second to import

    present = labels.unique().numpy()
    answers = scores.argmax(dim=-1).numpy()
    return float(f1_score(labels.numpy(), answers, labels=present, average="macro", zero_division=0))
