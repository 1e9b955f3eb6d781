"""Pretrained vision transformers by name: downloaded by timm, kept in the cache as a folder that `initialise` reads."""

import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deitkit.data.cache import cache_folder
from deitkit.errors import CheckpointError, reason_of
from deitkit.models.saved import save_tensors
from deitkit.models.vit import SIZES
from deitkit.recipe.schema import ModelRecipe, Recipe
from deitkit.system.files import write_json
from deitkit.system.network import no_endless_wait

PREFIX = "timm/"


def initial_weights_path(model: ModelRecipe) -> Path | None:
    """Return the initial weights of a recipe's students, downloaded if they have a name; None for random ones."""
    return model.checkpoint if model.pretrained is None else fetch(model.pretrained)


def resolved(recipe: Recipe) -> Recipe:
    """Return a recipe whose students have the size of their pretrained weights; see ``with_pretrained_size``."""
    return recipe.model_copy(update={"model": with_pretrained_size(recipe.model)})


def with_pretrained_size(model: ModelRecipe) -> ModelRecipe:
    """Return the model with the width, depth and heads of its pretrained weights; unchanged without any.

    A patch size that the recipe does not set is that of the weights.

    Raises:
        CheckpointError: The name is unknown, not of a vision transformer that fits, or the recipe has another size.
    """
    if model.pretrained is None:
        return model
    built = _build(model.pretrained)
    sizes = {"width": built.embed_dim, "depth": len(built.blocks), "heads": built.blocks[0].attn.num_heads}
    named = asdict(SIZES[model.name]) if "name" in model.model_fields_set else {}
    named |= {key: getattr(model, key) for key in sizes if getattr(model, key) is not None}
    if any(sizes[key] != value for key, value in named.items()):
        given = [key for key in ("name", *sizes) if key in model.model_fields_set and getattr(model, key) is not None]
        wrong = [f"model.{key}={getattr(model, key)}" for key in given]
        shown = " ".join(f"model.{key}={value}" for key, value in sizes.items())
        raise CheckpointError(f"{' and '.join(wrong)}, but model.pretrained={model.pretrained} has {shown}: drop them")
    patch_px = model.patch_px if "patch_px" in model.model_fields_set else built.patch_embed.patch_size[0]
    name = next((name for name in (model.name, *SIZES) if asdict(SIZES[name]) == sizes), model.name)
    return model.model_copy(update={"name": name, **sizes, "patch_px": patch_px})


def fetch(name: str) -> Path:
    """Return the folder of a pretrained model in the cache, after downloading it if it is not there.

    Args:
        name: ``timm/NAME``, such as ``timm/deit_tiny_distilled_patch16_224``, with or without a tag of weights.

    Raises:
        CheckpointError: The name is unknown or does not fit, or the weights do not exist or cannot be downloaded.
    """
    import timm  # here, since it takes a second to import

    from deitkit.models.timm_models import find_timm_file

    _build(name)
    try:
        card: Any = timm.get_pretrained_cfg(name.removeprefix(PREFIX))
    except RuntimeError:  # an unknown tag
        tags = ", ".join(timm.list_pretrained(f"{name.removeprefix(PREFIX).partition('.')[0]}.*"))
        raise CheckpointError(
            f"model.pretrained={name} has no weights of this tag in timm: choose from {tags}"
        ) from None
    folder = cache_folder() / "pretrained" / name.removeprefix(PREFIX)
    if (folder / "config.json").is_file():
        return folder
    if card is None or not card.has_weights:
        raise CheckpointError(f"model.pretrained={name} has no weights in timm: name others, or give model.checkpoint")
    found, problem = find_timm_file(card)
    if problem is not None:
        raise CheckpointError(f"{problem} and set model.checkpoint to the file")
    try:
        with no_endless_wait():
            model = timm.create_model(name.removeprefix(PREFIX), pretrained=True, pretrained_cfg_overlay=found)
    except Exception as error:  # downloads raise many types
        reason = reason_of(error)
        raise CheckpointError(
            f"model.pretrained={name} cannot be loaded ({reason}): connect to the internet, or give its file as "
            "model.checkpoint"
        ) from None
    save_tensors(folder / "model.safetensors", dict(model.state_dict()))
    kept = ("mean", "std", "input_size", "license", "hf_hub_id", "url")
    config = {
        "architecture": card.architecture,
        "num_classes": model.num_classes,
        "pretrained_cfg": {key: model.pretrained_cfg.get(key) for key in kept},
    }
    write_json(folder / "config.json", config)  # last: it marks a whole folder
    return folder


def licence_of(folder: Path) -> str | None:
    """Return the licence of the weights in a folder of ``fetch``; None if nothing names one."""
    try:
        licence = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"].get("license")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return licence if isinstance(licence, str) else None


def _build(name: str) -> Any:
    """Return a model of timm without memory for its weights; raise CheckpointError if it cannot be a student."""
    import timm  # here, since it takes a second to import

    architecture = name.removeprefix(PREFIX).partition(".")[0]
    if not name.startswith(PREFIX) or not timm.is_model(architecture):
        models = timm.list_models("*deit*") + timm.list_models("vit_*")
        near = difflib.get_close_matches(architecture, models, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(PREFIX + one for one in near)}?" if near else "write timm/NAME"
        raise CheckpointError(f"model.pretrained={name} is not a model of timm: {hint}")
    with torch.device("meta"):
        model: Any = timm.create_model(architecture)
    usable = isinstance(model, timm.models.VisionTransformer) and model.cls_token is not None
    if not usable or model.global_pool != "token":
        raise CheckpointError(
            f"model.pretrained={name} is not a vision transformer with a class token by which it answers, as a student "
            "is: name a DeiT or a plain ViT"
        )
    return model
