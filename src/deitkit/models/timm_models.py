"""Classifiers of timm by name, and its pretrained weights. Importing it, and so timm, takes a second."""

from typing import Any

import huggingface_hub
import timm
from torch import nn

from deitkit.errors import TeacherError
from deitkit.models.built import BuiltClassifier, absent_weights, as_file
from deitkit.system.network import unreachable


def names() -> list[str]:
    """Return timm's names of models, without tags of weights."""
    return list(timm.list_models())


def pretrained_px(architecture: str) -> int | None:
    """Return the resolution of timm's weights of a model; None without any."""
    card = timm.get_pretrained_cfg(architecture)
    return card.input_size[-1] if card is not None and card.has_weights else None


def build(architecture: str, *, classes: int, channels: int, pretrained: bool, image_px: int | None) -> BuiltClassifier:
    """Build a model, see ``zoo.create_classifier``; raises TeacherError, and whatever timm raises."""
    card = timm.get_pretrained_cfg(architecture)
    if pretrained and (card is None or not card.has_weights):
        raise TeacherError(
            f"teacher.pretrained=true has no weights for 'timm/{architecture}': give a file as teacher.checkpoint"
        )
    tied = card is not None and card.fixed_input_size
    sized = tied and image_px is not None
    options: dict[str, Any] = {"img_size": image_px} if sized else {}
    if pretrained:
        options["pretrained_cfg_overlay"], problem = find_timm_file(card)
        if problem is not None:
            raise TeacherError(problem + as_file(card.input_size[-1]))
    model = timm.create_model(architecture, pretrained=pretrained, num_classes=classes, in_chans=channels, **options)
    card = model.pretrained_cfg
    head = card.get("classifier")
    if not isinstance(head, str) or not isinstance(model.get_submodule(head), nn.Linear | nn.Conv2d):
        raise TeacherError(
            f"teacher.name='timm/{architecture}' has no single classifier layer, as a teacher must: choose another"
        )
    native_px = card["input_size"][-1] if tied or pretrained else None
    return BuiltClassifier(
        model,
        head,
        f"timm {timm.__version__}" + (f", weights {card.get('tag') or 'default'}" if pretrained else ""),
        tuple(card["mean"]) if channels == 3 else None,
        tuple(card["std"]) if channels == 3 else None,
        image_px if sized else native_px,
        new_head=pretrained and card["num_classes"] != classes,
    )


def find_timm_file(card: Any) -> tuple[dict[str, Any], str | None]:
    """Find timm's weights in its cache where they cannot be downloaded.

    Returns:
        Their file as a change of their card, empty if they can be downloaded; and None, or the first part of a sentence
        on weights that are not in the cache while the Hub cannot be reached.
    """
    hub = huggingface_hub.constants.ENDPOINT
    reason = unreachable(hub) if card.hf_hub_id else None
    if reason is None:
        return {}, None
    cached = [
        huggingface_hub.try_to_load_from_cache(card.hf_hub_id, file)
        for file in (card.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
        if file
    ]
    found = next((file for file in cached if isinstance(file, str)), None)
    if found is None:
        url = f"{hub}/{card.hf_hub_id}/resolve/main/model.safetensors"
        return {}, absent_weights(f"timm/{card.architecture}", reason, url)
    return {"file": found}, None
