"""Trained classifiers on the disk, each with its card: `model.safetensors` and `model.json`. Nothing is pickled."""

import json
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from deitkit import __version__
from deitkit.errors import CheckpointError
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.models.weights.read import load_into, read_state
from deitkit.models.zoo import BuiltClassifier, create_classifier
from deitkit.system.files import write_bytes, write_text

FORMAT = 1
# Fields that every card has.
CARD: dict[str, type | UnionType] = {
    "kind": str, "config": dict | None, "mean": list, "std": list, "image_px": int | None, "class_names": list,
}  # fmt: skip
# What a card from a stranger may ask of a CNN, whose weights do not tell.
MOST_PX, MOST_CHANNELS = 2**13, 3


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by name as safetensors."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def save_classifier(folder: Path, classifier: Classifier, card: dict[str, Any]) -> None:
    """Write ``model.safetensors`` and ``model.json``.

    Args:
        folder: Made if need be.
        classifier: A student or a CNN.
        card: What else to tell of it: ``class_names``, ``channels``, and for a CNN its ``architecture`` by name.
    """
    save_tensors(folder / "model.safetensors", dict(classifier.model.state_dict()))
    model = classifier.model
    described = {
        "format": FORMAT,
        "deitkit": __version__,
        "kind": "deit" if isinstance(model, DeiT) else "cnn",
        "config": model.config if isinstance(model, DeiT) else None,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "image_px": classifier.image_px,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    write_text(folder / "model.json", json.dumps(described | card, indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> dict[str, Any]:
    """Return ``model.json`` of a folder; CheckpointError where there is none that deitkit wrote."""
    path = folder / "model.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} holds no model.json: give a folder that deitkit wrote, such as RUN/winner or RUN/seed-0/none"
        ) from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {_format_of(card)}; this deitkit reads format {FORMAT}")
    wrong = [name for name, kind in CARD.items() if name not in card or not isinstance(card[name], kind)]
    if wrong:
        raise _wrong_card(folder, f"see {', '.join(wrong)}")
    return card


def _format_of(card: Any) -> Any:
    return card.get("format") if isinstance(card, dict) else "unknown"


def model_folder(path: Path) -> Path:
    """Return the folder of a saved model: of a run its winner's, else the path itself."""
    return path / "winner" if (path / "winner" / "model.json").exists() else path


def build_model(card: dict[str, Any], state: dict[str, Tensor], folder: Path) -> BuiltClassifier:
    """Build what a card describes, with new weights.

    Args:
        card: A ``model.json``.
        state: The weights beside it: a card may not ask for more memory than they take.
        folder: Of both, for the error.

    Raises:
        CheckpointError: The card is incomplete or wrong.
    """
    try:
        _check_size(card, state)
        if card["kind"] == "deit":
            student = _student(card)
            head = "head" if student.head is not None else "head_dist"
            return BuiltClassifier(student, head, None, None, card["config"]["image_px"], f"deitkit {card['deitkit']}")
        return create_classifier(
            card["architecture"], classes=len(card["class_names"]), channels=card["channels"], image_px=card["image_px"]
        )
    except Exception as error:  # whatever values of a wrong type or size make a model stumble over
        raise _wrong_card(folder, error) from None


def _student(card: dict[str, Any]) -> DeiT:
    return DeiT(**{**card["config"], "tokens": tuple(card["config"]["tokens"])})


def _check_size(card: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raise ValueError for a card that asks for more than its weights hold, before any memory is taken for it."""
    if card["image_px"] is not None and card["image_px"] > MOST_PX:
        raise ValueError(f"image_px is {card['image_px']}, more than {MOST_PX}")
    if card["kind"] == "deit":
        fits = card["config"]["depth"] <= len(state)
        if fits:
            with torch.device("meta"):
                asked = sum(value.numel() for value in _student(card).state_dict().values())
            fits = asked <= sum(value.numel() for value in state.values())
    else:
        fits = card["channels"] <= MOST_CHANNELS and any(
            len(card["class_names"]) in value.shape for value in state.values()
        )
    if not fits:
        raise ValueError("it asks for more than model.safetensors holds")


def load_classifier(folder: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    """Rebuild a classifier from its folder, in evaluation mode; returns its card too."""
    card, state = read_card(folder), read_state(folder / "model.safetensors")
    built = build_model(card, state, folder)
    try:
        classifier = Classifier(
            built.model, mean=tuple(card["mean"]), std=tuple(card["std"]), image_px=card["image_px"]
        )
    except Exception as error:
        raise _wrong_card(folder, error) from None
    report = load_into(built.model, state, head=built.head, source=str(folder))
    if report.missing or report.mismatched:
        raise CheckpointError(f"{folder}: model.safetensors does not belong to model.json: copy both from one run")
    return classifier.to(device).eval(), card


def _wrong_card(folder: Path, reason: object) -> CheckpointError:
    told = str(reason).partition("\n")[0] or type(reason).__name__
    path = folder / "model.json"
    return CheckpointError(f"{path} is incomplete or wrong ({told}): copy the folder again from its run")
