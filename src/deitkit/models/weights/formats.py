"""Parameter names of timm, the released DeiT, transformers and torchvision, and the architecture from shapes.

A state dict maps names to tensors; reading files is in ``read``, adapting weights in ``adapt``. timm and the released
checkpoints use the names of ``vit``; the others have other names, and transformers stores query, key and value
separately.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deitkit.errors import CheckpointError
from deitkit.models.vit import TOKENS, DeiT
from deitkit.models.weights.read import State, take_part, without_additions, without_wrapping

HEAD_WIDTH = 64  # of one attention head, in every size of DeiT and ViT (Touvron et al. 2021, table 1)
PARAMETERS = {"class": ("cls_token", "head"), "distillation": ("dist_token", "head_dist")}  # of each token

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
# Module names of transformers 5 in memory; its files keep the older names, which every version reads.
_RENAMED = {
    "attention.q_proj": _QKV[0],
    "attention.k_proj": _QKV[1],
    "attention.v_proj": _QKV[2],
    "attention.o_proj": _BLOCK["attn.proj"],
    "mlp.fc1": _BLOCK["mlp.fc1"],
    "mlp.fc2": _BLOCK["mlp.fc2"],
}
# data.fit: timm's crop_mode.
TIMM_CROP_MODES = {"crop": "center", "pad": "border", "squash": "squash"}
_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}  # the layer whose output each LayerScale multiplies
_CLASSIFIERS = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
_IN_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
# The kernel of the patches, which tells whose names they are, behind what a training tool has put before all names.
_KERNEL = re.compile(
    r"((?:.+?\.)??)(patch_embed\.proj|(?:(?:vit|deit)\.)?embeddings\.patch_embeddings\.projection|conv_proj)\.weight"
)
_TORCHVISIONS = {
    r"conv_proj": "patch_embed.proj",
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"encoder\.layers\.encoder_layer_(\d+)": r"blocks.\1",
    r"encoder\.ln": "norm",
    r"heads(?:\.head)?": "head",
}
_IN_TORCHVISIONS_BLOCK = {
    "ln_1": "norm1",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "mlp.linear_1": "mlp.fc1",  # of its older versions
    "mlp.linear_2": "mlp.fc2",
}


@dataclass(frozen=True)
class Architecture:
    """The architecture of a vision transformer; ``classes`` is 0 if it has no classifier."""

    image_px: tuple[int, int]  # height, width
    patch_px: int
    channels: int
    classes: int
    width: int
    depth: int
    heads: int
    tokens: tuple[str, ...]
    layer_scale: bool = False
    stem: str = "patch"

    @classmethod
    def of(cls, student: DeiT) -> "Architecture":
        """Return the architecture of a student."""
        config = student.config
        side = config["image_px"]
        shared = {name: config[name] for name in ("patch_px", "channels", "classes", "width", "depth", "heads")}
        more = {"layer_scale": config["layer_scale"] is not None, "stem": config["stem"]}
        return cls(image_px=(side, side), tokens=tuple(config["tokens"]), **shared, **more)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_px[0] // self.patch_px, self.image_px[1] // self.patch_px

    def build(self) -> DeiT:
        """Build a student of this architecture from torch's global random state; for square images only."""
        assert self.image_px[0] == self.image_px[1]
        own = {"image_px": self.image_px[0], "layer_scale": 1.0 if self.layer_scale else None}
        return DeiT(**asdict(self) | own)

    @property
    def first_kernel(self) -> str:
        """Name of the kernel that is applied to the image's channels."""
        return "patch_embed.layers.0.weight" if self.stem == "conv" else "patch_embed.proj.weight"


def from_any(state: Mapping[str, Tensor], source: str) -> tuple[State, list[str]]:
    """Return a vision transformer's tensors by the names of ``vit``, and one line for each change.

    Args:
        state: From deitkit, timm, a released DeiT, torchvision's ``VisionTransformer``, or transformers'
            ``DeiTForImageClassificationWithTeacher``, ``DeiTForImageClassification`` or ``ViTForImageClassification``
            (in its files or in memory); also with what training tools add.
        source: Name of the state in errors.

    Raises:
        CheckpointError: The state is none of these.
    """
    state = without_wrapping(state)
    kernels = [found for found in map(_KERNEL.fullmatch, state) if found]
    ours, lines = take_part(state, [found[1] for found in kernels])
    ours = without_additions(ours)
    if any("patch_embeddings." in found[2] for found in kernels):
        ours = _from_transformers(ours)
    elif any(found[2] == "conv_proj" for found in kernels):
        ours = _from_torchvision(ours)
    kernel, positions = ours.get("patch_embed.proj.weight"), ours.get("pos_embed")
    if kernel is None or positions is None or kernel.ndim != 4 or positions.ndim != 3:
        raise CheckpointError(
            f"checkpoint {source} is not a vision transformer (it lacks patch_embed or pos_embed): give a file of "
            "deitkit, of a released DeiT, of timm's vit_* or deit_*, or of transformers' or torchvision's ViT or DeiT"
        )
    pooler = [name for name in ours if name.startswith("pooler.")]
    if pooler:
        ours = {name: value for name, value in ours.items() if name not in pooler}
        lines.append("pooler: left out, since no classifier uses it")
    # The LayerScale of DeiT III as it was released; timm has our names.
    ours = {re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", name): value for name, value in ours.items()}
    return ours, lines


def with_distillation_head(state: State) -> tuple[State, list[str]]:
    """Copy the class head for a distillation token that has none; a copy is where training may start, not an answer.

    Args:
        state: By the names of ``vit``.
    """
    if "dist_token" not in state or "head.weight" not in state or "head_dist.weight" in state:
        return state, []
    copy = {f"head_dist.{part}": state[f"head.{part}"].clone() for part in ("weight", "bias")}
    line = "distillation head: absent in the file; the class head alone answers, and training would start from a copy"
    return state | copy, [line]


def with_token_positions(state: State, image_px: tuple[int, int] | None) -> tuple[State, list[str]]:
    """Add positions of zero for tokens that have none, as in DeiT III, where patches alone have positions.

    Args:
        state: By the names of ``vit``.
        image_px: Height and width of the images, if known; otherwise they are square.
    """
    tokens = [token for token in TOKENS if PARAMETERS[token][0] in state]
    positions, patch_px = state["pos_embed"], state["patch_embed.proj.weight"].shape[-1]
    count = positions.shape[1]
    of_patches_alone = _is_square(count) and not _is_square(count - len(tokens))
    if image_px is not None:
        of_patches_alone = count == (image_px[0] // patch_px) * (image_px[1] // patch_px)
    if not tokens or not of_patches_alone:
        return state, []
    zeros = positions.new_zeros(1, len(tokens), positions.shape[2])
    line = f"position embeddings: absent in the file for the {' and the '.join(tokens)} token, and zero"
    return state | {"pos_embed": torch.cat([zeros, positions], dim=1)}, [line]


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _from_transformers(state: Mapping[str, Tensor]) -> State:
    names = {theirs: ours for ours, theirs in _EMBEDDINGS.items()} | _CLASSIFIERS
    block_names = {theirs: ours for ours, theirs in _BLOCK.items()}
    ours: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, value in state.items():
        name = re.sub(r"^(deit|vit)\.", "", full)
        if inside := _IN_BLOCK.fullmatch(name):
            number, layer, kind = inside.groups()
            layer = _RENAMED.get(layer, layer)
            if layer in _QKV:
                parts.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[layer] = value
            else:
                ours[f"blocks.{number}.{block_names.get(layer, layer)}.{kind}"] = value
        elif name in names:
            ours[names[name]] = value
        else:
            layer, _, kind = name.rpartition(".")
            ours[f"{names.get(layer, layer)}.{kind}"] = value
    fused = {name: torch.cat([layers[part] for part in _QKV if part in layers]) for name, layers in parts.items()}
    return ours | fused


def _from_torchvision(state: Mapping[str, Tensor]) -> State:
    ours: State = {}
    for name, value in state.items():
        for theirs, mine in _TORCHVISIONS.items():
            name = re.sub(rf"^{theirs}(?=\.|$)", mine, name)
        for theirs, mine in _IN_TORCHVISIONS_BLOCK.items():
            name = re.sub(rf"^(blocks\.\d+\.){re.escape(theirs)}", rf"\1{mine}", name)
        ours[name] = value
    return ours


def stem_kernels(state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the kernels of a stem of convolutions, each of which halves the image; empty for a patch embedding."""
    return [value for name, value in state.items() if name.startswith("patch_embed.layers.") and value.ndim == 4]


def fold_layer_scale(state: Mapping[str, Tensor]) -> State:
    """Return an equivalent state dict without LayerScale, whose factors are folded into the preceding layers."""
    folded = {name: value for name, value in state.items() if not name.endswith(".gamma")}
    for name, gamma in state.items():
        block, _, branch = name.removesuffix(".gamma").rpartition(".")
        if branch in _SCALED:
            weight, bias = (f"{block}.{_SCALED[branch]}.{part}" for part in ("weight", "bias"))
            folded |= {weight: state[weight] * gamma[:, None], bias: state[bias] * gamma}
    return folded


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Return a student's tensors by timm's names, where the only token of a model is a class token.

    Raises:
        CheckpointError: The student has a stem of convolutions, unlike models of timm and transformers.
    """
    if stem_kernels(state):
        raise CheckpointError(
            "timm and transformers have no vision transformer with a stem of convolutions: use the folder with deitkit"
        )
    if "dist_token" in state and "cls_token" not in state:
        names = {"dist_token": "cls_token", "head_dist.weight": "head.weight", "head_dist.bias": "head.bias"}
        return {names.get(name, name): value for name, value in state.items()}
    return dict(state)


def to_transformers(state: Mapping[str, Tensor], *, class_head_only: bool = False) -> State:
    """Return a student's tensors by the names in transformers' files.

    A student with both tokens is a ``DeiTForImageClassificationWithTeacher``, or with ``class_head_only`` a
    ``DeiTForImageClassification``; one with a single token a ``ViTForImageClassification``.

    Raises:
        CheckpointError: transformers has no class for the student: it averages its patches or has a stem of
            convolutions.
    """
    state = fold_layer_scale(to_timm(state))
    if "cls_token" not in state:
        raise CheckpointError(
            "transformers has no vision transformer that averages its patches: convert to timm, "
            "or add a class token with --tokens class"
        )
    distilled = "dist_token" in state
    model, head = ("deit", "cls_classifier") if distilled else ("vit", "classifier")
    if class_head_only:
        head, state = "classifier", {name: value for name, value in state.items() if not name.startswith("head_dist.")}
    names = {ours: f"{model}.{theirs}" for ours, theirs in _EMBEDDINGS.items()}
    names |= {"head": head, "head_dist": "distillation_classifier"}
    theirs: State = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if name in names:
            theirs[names[name]] = value
        elif layer in names:
            theirs[f"{names[layer]}.{kind}"] = value
        else:
            _, number, layer = layer.split(".", 2)
            prefix = f"{model}.encoder.layer.{number}"
            split = zip(_QKV, value.chunk(3), strict=True) if layer == "attn.qkv" else [(_BLOCK[layer], value)]
            theirs |= {f"{prefix}.{part}.{kind}": tensor.contiguous() for part, tensor in split}
    return theirs


def describe(
    state: Mapping[str, Tensor],
    *,
    source: str,
    heads: int | None = None,
    image_px: tuple[int, int] | None = None,
) -> Architecture:
    """Infer the architecture of a student's state dict from its names and shapes.

    Args:
        state: By the names of ``vit``.
        source: Name of the state in errors.
        heads: Attention heads of a block, which cannot be inferred; by default the width divided by 64, or one if it is
            not divisible.
        image_px: Height and width of the images; by default those of a square grid of patches.

    Raises:
        CheckpointError: Layers are missing, unknown, or of a shape that deitkit's students do not have.
    """
    positions = state["pos_embed"]
    stem = stem_kernels(state)
    width, channels, patch_px = state["patch_embed.proj.weight"].shape[:3]
    if stem:
        channels, patch_px = stem[0].shape[1], 2 ** len(stem)
    tokens = tuple(token for token in TOKENS if PARAMETERS[token][0] in state)
    patches = positions.shape[1] - len(tokens)
    side = math.isqrt(max(patches, 0))
    rows, columns = (image_px[0] // patch_px, image_px[1] // patch_px) if image_px else (side, side)
    if rows * columns != patches:
        given = f"images of {image_px[0]} x {image_px[1]} px" if image_px else "a square image"
        raise CheckpointError(
            f"checkpoint {source} has position embeddings for {patches} patches of {patch_px} px, which do not make "
            f"up {given}: give the file with the card or config.json that was written with it"
        )
    blocks = [int(found[1]) for found in map(re.compile(r"blocks\.(\d{1,6})\..+").fullmatch, state) if found]
    classifiers = [state[f"{head}.weight"] for _, head in PARAMETERS.values() if f"{head}.weight" in state]
    found = Architecture(
        image_px=image_px or (side * patch_px, side * patch_px),
        patch_px=patch_px,
        channels=channels,
        classes=len(classifiers[0]) if classifiers else 0,
        width=width,
        depth=min(max(blocks, default=-1) + 1, len(state)),  # before memory is allocated for a name that claims more
        heads=heads or (1 if width % HEAD_WIDTH else width // HEAD_WIDTH),
        tokens=tokens,
        layer_scale="blocks.0.ls1.gamma" in state,
        stem="conv" if stem else "patch",
    )
    _check_layers(state, found, source)
    return found


def _check_layers(state: Mapping[str, Tensor], found: Architecture, source: str) -> None:
    """Compare names and shapes with those of a student; only positions and a missing classifier may differ."""
    if found.width % found.heads:
        raise CheckpointError(
            f"checkpoint {source} has width {found.width}, not divisible by {found.heads} attention heads: give the "
            "file with the card or config.json that was written with it"
        )
    with torch.device("meta"):
        square = replace(found, image_px=(found.patch_px, found.patch_px), classes=max(found.classes, 1)).build()
    own: dict[str, Any] = {name: tuple(value.shape) for name, value in square.state_dict().items()}
    theirs: dict[str, Any] = {name: tuple(value.shape) for name, value in state.items()}
    free = {"pos_embed"} if found.classes else {"pos_embed", *(name for name in own if name.startswith("head"))}
    wrong = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name) and name not in free]
    if wrong:
        sides = (("the file", theirs), ("a student of deitkit", own))
        both = ", ".join(f"{shapes.get(wrong[0], 'absent')} in {side}" for side, shapes in sides)
        raise CheckpointError(
            f"checkpoint {source} is a vision transformer that deitkit does not have: {len(wrong)} of its tensors do "
            f"not fit (first: {wrong[0]}, {both}); give one with the plain layers of DeiT or ViT"
        )
