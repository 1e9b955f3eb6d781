"""Initialising a student from the weights of a vision transformer of any supported source.

Parameter names are in ``formats``; safe reading of files is in ``read``. Nothing here writes files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deitkit.errors import CheckpointError, reason_of
from deitkit.models.card import ModelCard, card_from
from deitkit.models.classifier import IMAGENET_NORMALISATION
from deitkit.models.saved import model_folder
from deitkit.models.vit import NORM_EPS, DeiT
from deitkit.models.weights.adapt import Normalisation, Values, adapt, renormalise
from deitkit.models.weights.formats import (
    HEAD_WIDTH,
    TIMM_CROP_MODES,
    Architecture,
    State,
    describe,
    from_any,
    with_distillation_head,
    with_token_positions,
)
from deitkit.models.weights.read import read_checkpoint
from deitkit.system.words import display_name

_FITS = {mode: fit for fit, mode in TIMM_CROP_MODES.items()}
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class SourceFacts:
    """What a card, a config or a file says of a model beside its tensors; None where it does not say.

    The attributes are those of ``Weights``, and ``heads`` (of a block) and ``image_px`` (height and width).
    """

    heads: int | None = None
    image_px: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    mean: Values | None = None
    std: Values | None = None
    eval_crop: float | None = None
    fit: str | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """The weights of a vision transformer, by the names of ``vit``.

    Attributes:
        file: The file of the tensors.
        state: Tensors by name.
        architecture: From names, shapes and the card.
        class_names: From the card or config in the folder of the file; None without them.
        mean: Normalisation of the images, per channel, of values in [0, 1]; None if unknown.
        std: As ``mean``.
        card: The ``model.json`` in the folder of the file; None if there is none.
        remarks: Changes while reading, one line each.
        assumes_heads: Whether nothing tells the number of attention heads.
        only_readout: ``class`` if only that head was trained, though there are both tokens; None if every head was.
        eval_crop: Share of the resized side that is kept of a test image, as ``data.eval_crop``; None if unknown.
        fit: How an image becomes square, as ``data.fit``; None if unknown.
    """

    file: Path
    state: State
    architecture: Architecture
    class_names: tuple[str, ...] | None
    mean: Values | None
    std: Values | None
    card: ModelCard | None
    remarks: tuple[str, ...]
    assumes_heads: bool = False
    only_readout: str | None = None
    eval_crop: float | None = None
    fit: str | None = None

    @property
    def normalisation(self) -> Normalisation:
        """Normalisation of the images, by default ImageNet's, as for the released DeiTs; its mean for grey."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        mean, std = IMAGENET_NORMALISATION
        return (mean, std) if self.architecture.channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))


def read_weights(path: Path, heads: int | None = None) -> Weights:
    """Read a vision transformer from a file or a folder, safely.

    Args:
        path: A run folder (its winner), a folder with ``model.json`` (deitkit) or ``config.json`` (transformers, or
            timm's on the Hub), or a file: ``.safetensors``, or a ``.pth`` such as the released DeiT's. A card or config
            in the folder of a model file is read too.
        heads: Attention heads of a block, if there is no card or config; by default the width divided by 64.

    Raises:
        CheckpointError: It cannot be read, or is not a vision transformer that deitkit supports.
    """
    file = weights_file(path)
    folder = file.parent
    checkpoint = read_checkpoint(file)
    state, lines = from_any(checkpoint.state, str(path))
    lines = [*checkpoint.remarks, *lines]
    card = card_of(file)
    found = _from_facts(checkpoint.facts, str(path))
    if card is not None:
        found = _from_card(card, folder)
    elif file.name in _WEIGHTS_FILES and (folder / "config.json").is_file():
        found = _from_config(folder)
    state, more = with_token_positions(state, found.image_px)
    state, copied = with_distillation_head(state)
    lines += more + copied
    kinds = {value.dtype for value in state.values() if value.is_floating_point()} - {torch.float32}
    lines += [
        f"precision: {str(kind).removeprefix('torch.')} in the file, converted to float32"
        for kind in sorted(kinds, key=str)
    ]
    architecture = describe(state, source=str(path), heads=found.heads or heads, image_px=found.image_px)
    mean, std = (_per_channel(values, architecture.channels, str(path)) for values in (found.mean, found.std))
    assumes_heads = heads is None and not found.heads
    if assumes_heads:
        count = architecture.heads
        lines.append(
            f"attention heads: absent in the file, {count} assumed, one per {HEAD_WIDTH} of the width (set --heads or "
            "model.heads)"
        )
    return Weights(
        file,
        {name: value.float() for name, value in state.items()},
        architecture,
        class_names=found.class_names,
        mean=mean,
        std=std,
        card=card,
        remarks=(*lines, *found.remarks),
        assumes_heads=assumes_heads,
        only_readout="class" if copied else None if card is None else card.only_readout,
        eval_crop=found.eval_crop,
        fit=found.fit,
    )


def weights_file(path: Path) -> Path:
    """Return the file from which ``read_weights`` reads tensors; raise CheckpointError if a folder has none."""
    if not path.is_dir():
        return path
    folder = model_folder(path)
    found = next((folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path} contains no {' or '.join(_WEIGHTS_FILES)}: give a weights file, a model folder, or a run folder "
            "with a winner"
        )
    return found


def card_of(file: Path) -> ModelCard | None:
    """Return the card of a file of weights; None without one, for that of another program, or beside another file.

    Raises:
        CheckpointError: It is damaged.
    """
    path = file.parent / "model.json"
    if file.name not in _WEIGHTS_FILES or not path.is_file():
        return None
    content = _read_json(path)
    return card_from(content, path) if isinstance(content.get("format"), int) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: copy it again from the source of the weights")
    return content


def _names(found: Any) -> tuple[str, ...] | None:
    return tuple(display_name(str(name)) for name in found) if found else None


def _values(found: Any) -> Values | None:
    if found in (None, [], ()):
        return None
    return tuple(float(value) for value in (found if isinstance(found, list | tuple) else [found]))


def _per_channel(values: Values | None, channels: int, source: str) -> Values | None:
    """Return one value for each channel; equal ones may be more or fewer, as in a config for grey images."""
    if values is None or len(values) == channels:
        return values
    if len(set(values)) != 1:
        raise CheckpointError(
            f"{source} has a normalisation of {len(values)} channels, but weights for {channels}: correct its card or "
            "config"
        )
    return values[:1] * channels


def _from_facts(facts: dict[str, Any], source: str) -> SourceFacts:
    """Return what our own export of a single file says of itself; raise CheckpointError if it is damaged."""
    if not facts:
        return SourceFacts()
    try:
        height, width = (int(side) for side in facts["image_px"])
        share, fit = float(facts["eval_crop"]), facts["fit"]
        if not 0 < share <= 1 or fit not in _FITS.values():
            raise ValueError("no way to prepare an image")
        return SourceFacts(
            heads=int(facts["heads"]),
            image_px=(height, width),
            class_names=_names(facts["class_names"]),
            mean=_values(facts["mean"]),
            std=_values(facts["std"]),
            eval_crop=share,
            fit=fit,
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{source} is damaged: copy it again from the source of the weights") from None


def _from_card(card: ModelCard, folder: Path) -> SourceFacts:
    if card.config is None:
        raise CheckpointError(
            f"{folder} contains a model of kind '{card.kind}', not a vision transformer: give a student's folder"
        )
    side = card.config.get("image_px")
    return SourceFacts(
        heads=card.config.get("heads"),
        image_px=(side, side) if side else None,
        class_names=_names(card.class_names),
        mean=_values(card.mean),
        std=_values(card.std),
        eval_crop=card.eval_crop,
        fit=card.fit,
    )


def _from_config(folder: Path) -> SourceFacts:
    """Read ``config.json`` of transformers or timm, and ``preprocessor_config.json`` in the same folder."""
    config = _read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    processing = _read_json(preprocessor) if preprocessor.is_file() else {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{folder / 'config.json'} has hidden_act='{config['hidden_act']}', but deitkit's students have 'gelu': "
            "give another model"
        )
    timms = _timm_facts(config, folder)
    normalisation = config.get("pretrained_cfg") or {}
    if processing.get("do_normalize"):
        normalisation = {"mean": processing.get("image_mean"), "std": processing.get("image_std")}
    elif processing.get("do_normalize") is False:
        normalisation = {"mean": 0.0, "std": 1.0}
    arguments = config.get("model_args") or {}  # timm's
    size = config.get("image_size", arguments.get("img_size"))
    names, epsilon = config.get("id2label"), config.get("layer_norm_eps", timms.get("eps", NORM_EPS))
    remark = f"layer_norm_eps: {epsilon:g} in config.json, {NORM_EPS:g} here; logits differ slightly"
    eval_crop, fit = _transformers_view(processing) or _timms_view(config.get("pretrained_cfg") or {}) or (None, None)
    return SourceFacts(
        heads=config.get("num_attention_heads", arguments.get("num_heads", timms.get("heads"))),
        image_px=(size, size) if isinstance(size, int) else tuple(size) if size else None,
        class_names=_names([names[key] for key in sorted(names, key=int)] if names else config.get("label_names")),
        mean=_values(normalisation.get("mean")),
        std=_values(normalisation.get("std")),
        eval_crop=eval_crop,
        fit=fit,
        remarks=() if epsilon == NORM_EPS else (remark,),
    )


def _timms_view(config: dict[str, Any]) -> tuple[float, str] | None:
    """Return how timm's ``pretrained_cfg`` prepares an image, as ``eval_crop`` and ``fit``; None if it does not say."""
    share, fit = config.get("crop_pct"), _FITS.get(str(config.get("crop_mode", "center")))
    if not isinstance(share, int | float) or not 0 < share <= 1 or fit is None:
        return None
    return float(share), fit


def _transformers_view(processing: dict[str, Any]) -> tuple[float, str] | None:
    """Return how ``preprocessor_config.json`` prepares an image, likewise."""
    size, kept = processing.get("size"), processing.get("crop_size")
    if isinstance(size, int):  # of the feature extractors of older versions, which squash
        size = {"height": size, "width": size}
    if not isinstance(size, dict):
        return None
    resized, fit = size.get("shortest_edge", size.get("height")), "crop" if "shortest_edge" in size else "squash"
    kept = kept.get("height") if isinstance(kept, dict) else kept
    share = 1.0
    if processing.get("do_center_crop") and isinstance(kept, int) and isinstance(resized, int) and 0 < kept <= resized:
        share = kept / resized
    return share, fit


def _timm_facts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the heads and epsilon of the model of timm's that a ``config.json`` names; empty without a name.

    timm builds it without memory for its weights, since a name stands for much that no tensor shows.

    Raises:
        CheckpointError: Its readout or activation is not that of deitkit's students.
    """
    name, arguments = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(name, str):
        return {}
    import timm  # here, since it takes a second to import

    if not timm.is_model(name):
        return {}
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=config.get("num_classes") or 0, **arguments)
    except Exception as error:  # timm raises many types for arguments that it does not know
        reason = reason_of(error)
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a model of timm's ({reason}): get the folder again"
        ) from None
    if not isinstance(model, timm.models.VisionTransformer):
        return {}  # its tensors will not fit, which has a message of its own
    pooling, has_token = model.global_pool, model.cls_token is not None
    if has_token and pooling != "token":
        raise CheckpointError(
            f"{folder} has a class token, but answers by the '{pooling}' pooling of its patches (global_pool), which "
            "deitkit's students do not: give another model"
        )
    activation = type(model.blocks[0].mlp.act).__name__
    if activation != "GELU":
        raise CheckpointError(
            f"{folder} has the activation {activation}, but deitkit's students have GELU: give another model"
        )
    return {"heads": model.blocks[0].attn.num_heads, "eps": getattr(model.norm, "eps", NORM_EPS)}


def load_initial_weights(
    student: DeiT,
    file: Path,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[str]:
    """Initialise a student from weights of any resolution, patch size, channels, classes and tokens.

    Args:
        student: Changed in place, only if the weights fit; width, depth and heads must be equal.
        file: A weights file, or a folder with one: see ``read_weights``.
        class_names: Of the student's data. If the weights have other class names, even as many, the classifier is new.
        mean: Normalisation of the student's images, per channel. The patch embedding compensates the difference to the
            normalisation of the weights exactly, which comes from their card or config, by default ImageNet's.
        std: As ``mean``.

    Returns:
        One line for each change; empty if the weights are loaded unchanged.

    Raises:
        CheckpointError: The file cannot be read, or has another width, depth or number of heads.
    """
    target = Architecture.of(student)
    weights = read_weights(file, heads=target.heads)
    state, lines = weights.state, list(weights.remarks)
    if mean is not None and std is not None:
        state, changes = renormalise(state, weights.normalisation, (tuple(mean), tuple(std)))
        lines += changes
        if changes and (weights.mean is None or weights.std is None):
            lines.append(
                "normalisation: absent in the file, ImageNet's assumed (else convert it with --mean and --std)"
            )
    if class_names is not None and weights.class_names not in (None, tuple(class_names)):
        state = {name: value for name, value in state.items() if not name.startswith("head")}
        lines.append("classes: other names in the file, its classifier is left out")
    state, changes = adapt(state, to=target, source=str(file), image_px=weights.architecture.image_px)
    if weights.architecture.heads != target.heads:
        raise CheckpointError(
            f"checkpoint {file} has {weights.architecture.heads} attention heads, the student {target.heads}: "
            f"set model.heads={weights.architecture.heads}"
        )
    student.load_state_dict(state, strict=True)
    return lines + changes
