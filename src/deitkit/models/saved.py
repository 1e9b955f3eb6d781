"""Saving and loading trained classifiers with their cards: `model.safetensors`, `model.json`. Nothing is pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from deitkit import __version__
from deitkit.errors import CheckpointError, NotRegistered
from deitkit.models.built import BuiltClassifier
from deitkit.models.card import FORMAT, ModelCard, card_from, wrong_card
from deitkit.models.classifier import Classifier
from deitkit.models.onnx_file import is_onnx, read_onnx
from deitkit.models.vit import DeiT
from deitkit.models.weights.read import load_into, read_state
from deitkit.models.zoo import create_classifier
from deitkit.system.files import write_bytes, write_json

MOST_CHANNELS = 3  # of an untrusted card of a CNN, whose weights do not bound them


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors; one that has two names is written twice."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_bytes(path, save(copies))


def save_classifier(folder: Path, classifier: Classifier, card: dict[str, Any]) -> None:
    """Write ``model.safetensors`` and ``model.json``.

    Args:
        folder: Created if necessary.
        classifier: A student or a CNN.
        card: Further fields of the card: ``class_names``, ``channels``, and for a CNN its ``architecture`` by name.
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
    write_json(folder / "model.json", described | card)


def read_card(folder: Path) -> ModelCard:
    """Return ``model.json`` of a folder, or the card of an ONNX file; raise CheckpointError if it is not of deitkit."""
    if is_onnx(folder):
        return read_onnx(folder)[1]
    path = folder / "model.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} contains no model.json: give a model folder of deitkit, such as {model_below(folder)}"
        ) from None
    return card_from(content, path)


def model_below(folder: Path) -> str:
    """Return for a message where models are: one of this run folder if it is one, else examples."""
    places = [folder / name for name in ("winner", "teacher", "variants/base/winner", "folds/1/winner")]
    found = next((place for place in places if (place / "model.json").is_file()), None)
    return "RUN/winner or RUN/seed-0/none" if found is None else str(found)


def model_folder(path: Path) -> Path:
    """Return the folder of a saved model: the winner of a run folder, else the path itself."""
    return path / "winner" if (path / "winner" / "model.json").exists() else path


def build_model(card: ModelCard, state: dict[str, Tensor], folder: Path) -> BuiltClassifier:
    """Build the model of a card, with new weights.

    Args:
        card: Of the model.
        state: The weights in the same folder; the model may not need more memory than they take.
        folder: The folder of both, for the error message.

    Raises:
        CheckpointError: The card is incomplete or wrong.
    """
    try:
        _check_size(card, state)
        _check_agreement(card)
        if card.kind == "deit":
            student = _student(card.config or {})
            head = "head" if student.head is not None else "head_dist"
            return BuiltClassifier(student, head, f"deitkit {card.deitkit}", image_px=student.config["image_px"])
        return create_classifier(
            card.architecture or "", classes=len(card.class_names), channels=card.channels, image_px=card.image_px
        )
    except NotRegistered:
        raise
    except Exception as error:  # values of a wrong type or size raise many types
        raise wrong_card(folder / "model.json", error) from None


def _student(config: dict[str, Any]) -> DeiT:
    return DeiT(**{**config, "tokens": tuple(config["tokens"])})


def _check_size(card: ModelCard, state: dict[str, Tensor]) -> None:
    """Raise ValueError if the model of a card is larger than its weights, before memory is allocated for it."""
    if card.kind == "deit":
        config = card.config or {}
        fits = config["depth"] <= len(state)
        if fits:
            with torch.device("meta"):
                needed = sum(value.numel() for value in _student(config).state_dict().values())
            fits = needed <= sum(value.numel() for value in state.values())
    else:
        fits = card.channels <= MOST_CHANNELS and any(len(card.class_names) in value.shape for value in state.values())
    if not fits:
        raise ValueError("it describes a larger model than model.safetensors contains")


def _check_agreement(card: ModelCard) -> None:
    """Raise ValueError if fields of a card contradict each other."""
    if not len(card.mean) == len(card.std) == card.channels:
        raise ValueError(f"mean and std have {len(card.mean)} and {len(card.std)} values, channels is {card.channels}")
    if card.kind != "deit":
        return
    config = card.config or {}
    for field, value in (("classes", len(card.class_names)), ("channels", card.channels)):
        if config[field] != value:
            raise ValueError(f"{field} of config is {config[field]}, but it describes a model with {value}")
    px = config["image_px"]
    if card.image_px is None and card.input_px not in (None, (px, px)):
        raise ValueError(f"image_px of config is {px}, but input_px is {list(card.input_px)}")


def load_classifier(folder: Path, device: torch.device) -> tuple[Classifier, ModelCard]:
    """Return the classifier of a folder or an ONNX file, in evaluation mode, and its card."""
    if is_onnx(folder):
        classifier, card = read_onnx(folder)
        return classifier.to(device), card
    card, state = read_card(folder), read_state(folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):  # the initial weights are of no use
        built = build_model(card, state, folder)
    try:
        if card.kind == "deit" and card.image_px not in (None, built.image_px):
            raise ValueError(f"image_px is {card.image_px}, but its model takes {built.image_px}")
        classifier = Classifier(
            built.model, mean=card.mean, std=card.std, image_px=card.image_px, readout=card.only_readout
        )
    except Exception as error:
        raise wrong_card(folder / "model.json", error) from None
    if load_into(built.model, state, head=built.head, source=str(folder)):
        raise CheckpointError(f"{folder}: model.safetensors does not belong to model.json: copy both from one run")
    return classifier.to(device).eval(), card
