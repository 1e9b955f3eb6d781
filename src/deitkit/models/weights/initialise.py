"""Weights of vision transformers, from wherever they come, made to fit the student that is to start from them.

``formats`` knows what others call a parameter; ``weights`` reads files safely. Nothing here writes one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from deitkit.errors import CheckpointError
from deitkit.models.vit import NORM_EPS, DeiT
from deitkit.models.weights.adapt import Normalisation, Values, adapt, renormalise
from deitkit.models.weights.formats import Architecture, State, describe, from_any
from deitkit.models.weights.read import read_state

_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """A vision transformer from somewhere, by the names of ``vit``.

    Attributes:
        file: That holds the tensors.
        state: Tensors by name.
        architecture: As names, shapes and the card tell it.
        class_names: None where nothing beside the file tells them.
        mean: Per channel, of values in [0, 1], that the images were normalised by; None where nothing tells it.
        std: As ``mean``.
        card: All of the ``model.json`` beside it, if deitkit wrote it; else empty.
        remarks: What was changed in reading it, line by line.
    """

    file: Path
    state: State
    architecture: Architecture
    class_names: tuple[str, ...] | None
    mean: Values | None
    std: Values | None
    card: dict[str, Any]
    remarks: tuple[str, ...]

    @property
    def normalisation(self) -> Normalisation:
        """What the images were normalised by: as told, else ImageNet's, as of the released DeiTs; its mean for grey."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
        return (mean, std) if self.architecture.channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))


def read_weights(path: Path, heads: int | None = None) -> Weights:
    """Read a vision transformer from a file or a folder, safely.

    Args:
        path: A run folder (its winner), a folder with ``model.json`` (deitkit) or ``config.json`` (transformers, or
            timm's on the Hub), or a file: ``.safetensors``, or a ``.pth`` such as the released DeiT's. What lies
            beside a file is read too.
        heads: Attention heads of a block, where nothing beside the file tells them; by default one for each 64 of the
            width.

    Raises:
        CheckpointError: It cannot be read, or holds no vision transformer that deitkit has.
    """
    file = weights_file(path)
    folder = file.parent
    state, lines = from_any(read_state(file), str(path))
    card: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if file.name in _WEIGHTS_FILES:  # a card speaks for these, not for whatever else lies in its folder
        if (folder / "model.json").is_file():
            card = _read_json(folder / "model.json")
            told = _from_card(card, folder)
        elif (folder / "config.json").is_file():
            told = _from_config(folder)
    kinds = {value.dtype for value in state.values() if value.is_floating_point()} - {torch.float32}
    lines += [
        f"precision: {str(kind).removeprefix('torch.')} in the file, float32 from here on"
        for kind in sorted(kinds, key=str)
    ]
    architecture = describe(state, source=str(path), heads=told.get("heads") or heads, image_px=told.get("image_px"))
    names = tuple(told["class_names"]) if told.get("class_names") else None
    mean, std = (tuple(map(float, told[key])) if told.get(key) else None for key in ("mean", "std"))
    state = {name: value.float() for name, value in state.items()}
    return Weights(file, state, architecture, names, mean, std, card, (*lines, *told.get("lines", ())))


def weights_file(path: Path) -> Path:
    """Return the file that ``read_weights`` takes tensors from; CheckpointError where a folder has none."""
    if not path.is_dir():
        return path
    folder = path / "winner" if (path / "winner" / "model.json").is_file() else path
    found = next((folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path} holds no {' or '.join(_WEIGHTS_FILES)}: give a weights file, a model folder, or a run folder "
            "with a winner"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: copy it again from where the weights came from")
    return content


def _from_card(card: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = card.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder} holds a model of kind '{card.get('kind')}', not a vision transformer: give a student's folder"
        )
    side = config.get("image_px")
    told = {name: card.get(name) for name in ("class_names", "mean", "std")}
    return {"heads": config.get("heads"), "image_px": (side, side) if side else None, **told}


def _from_config(folder: Path) -> dict[str, Any]:
    """Gather what ``config.json`` of transformers or timm tells, and ``preprocessor_config.json`` beside it."""
    config = _read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    seen = _read_json(preprocessor) if preprocessor.is_file() else {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{folder / 'config.json'} has hidden_act='{config['hidden_act']}' and deitkit's students have 'gelu': "
            "give another model"
        )
    normalisation = config.get("pretrained_cfg") or {}
    if seen.get("do_normalize"):
        normalisation = {"mean": seen.get("image_mean"), "std": seen.get("image_std")}
    arguments = config.get("model_args") or {}  # timm's
    size = config.get("image_size", arguments.get("img_size"))
    names, epsilon = config.get("id2label"), config.get("layer_norm_eps", NORM_EPS)
    lines = [f"layer_norm_eps: {epsilon:g} in config.json, {NORM_EPS:g} here; logits differ by little"]
    return {
        "heads": config.get("num_attention_heads", arguments.get("num_heads")),
        "image_px": (size, size) if isinstance(size, int) else tuple(size) if size else None,
        "class_names": [names[key] for key in sorted(names, key=int)] if names else config.get("label_names"),
        "mean": normalisation.get("mean"),
        "std": normalisation.get("std"),
        "lines": lines if epsilon != NORM_EPS else [],
    }


def load_initial(
    student: DeiT,
    file: Path,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[str]:
    """Let a student start from weights, whatever resolution, patches, channels, classes and tokens they were made for.

    Args:
        student: Changed in place, only if the weights fit; its width, depth and heads must be theirs.
        file: A weights file, or a folder with one: see ``read_weights``.
        class_names: Of the student's data. Where the weights come with as many but other names, the classifier starts
            anew all the same.
        mean: Per channel, that the student's images are normalised by. The patch embedding takes up the difference to
            the normalisation of the weights, exactly: what lies beside them tells it, or it is taken to be ImageNet's.
        std: As ``mean``.

    Returns:
        What was changed, one line for each change; empty where the weights were taken as they are.

    Raises:
        CheckpointError: The file cannot be read, or is of another width, depth or number of heads.
    """
    target = Architecture.of(student)
    weights = read_weights(file, heads=target.heads)
    state, lines = weights.state, list(weights.remarks)
    if mean is not None and std is not None:
        state, changes = renormalise(state, weights.normalisation, (tuple(mean), tuple(std)))
        lines += changes
    if class_names is not None and weights.class_names not in (None, tuple(class_names)):
        state = {name: value for name, value in state.items() if not name.startswith("head")}
        lines.append("classes: the file knows others, its classifier is left out")
    state, changes = adapt(state, to=target, source=str(file), image_px=weights.architecture.image_px)
    if weights.architecture.heads != target.heads:
        raise CheckpointError(
            f"checkpoint {file} has {weights.architecture.heads} attention heads, the student {target.heads}: "
            f"set model.heads={weights.architecture.heads}"
        )
    student.load_state_dict(state, strict=True)
    return lines + changes
