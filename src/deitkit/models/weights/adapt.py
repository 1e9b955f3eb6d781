"""Adapting a vision transformer's weights to another resolution, patch, channel count, token layout or class count.

State dicts have the names of ``vit``; functions return new ones, and one line of text for each change.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.errors import CheckpointError
from deitkit.models.weights.formats import PARAMETERS, Architecture, State, describe, fold_layer_scale, stem_kernels

KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
Values = tuple[float, ...]  # one for each channel
Normalisation = tuple[Values, Values]  # mean and standard deviation of values in [0, 1]


def adapt(
    state: Mapping[str, Tensor],
    *,
    to: Architecture,
    source: str = "weights",
    image_px: tuple[int, int] | None = None,
) -> tuple[State, list[str]]:
    """Adapt a state dict to an architecture of the same width and depth.

    - *Patch size*: the kernel is resized by the pseudo-inverse of bicubic resizing, so that its output for a resized
      patch is unchanged (Beyer et al. 2023, FlexiViT, section 3.4), by timm's ``resample_patch_embed``.
    - *Resolution*: position embeddings of patches are resampled bicubically, which preserves their norm, unlike
      bilinear resampling (Touvron et al. 2021, section 4), by timm's ``resample_abs_pos_embed``; those of tokens are
      unchanged.
    - *Channels*: 3 to 1 sums the kernel over colours, 1 to 3 gives each colour a third of it: the output for a grey
      image is unchanged.
    - *Tokens*: a missing token starts as a copy of the other one, with its position and its head, so that both heads
      start equal and their targets separate them; without another token, at zero. A surplus token is dropped. This
      follows no source; the paper trains its distilled models from scratch.
    - *Classes*: a classifier for another number of classes starts at zero (Dosovitskiy et al. 2021, section 3.2).
    - *LayerScale*: if the student has none, its factors are folded into the preceding layers; if the file has none,
      they start at 1: the output is unchanged in both cases.

    Args:
        state: By the names of ``vit``; not changed.
        to: The target architecture.
        source: Name of the state in errors.
        image_px: Height and width of its images; by default those of a square grid of patches.

    Returns:
        The new state dict, and one line for each change.

    Raises:
        CheckpointError: The state is not a vision transformer, has another width, depth or stem, or has a stem of
            convolutions for another patch size.
    """
    given = describe(state, source=source, image_px=image_px)
    if (given.width, given.depth) != (to.width, to.depth):
        raise CheckpointError(
            f"checkpoint {source} is {given.width} wide and has {given.depth} blocks, the student {to.width} and "
            f"{to.depth}: set model.width={given.width} model.depth={given.depth}, or the model.name of that size"
        )
    _check_stem(given, to, source)
    changed = dict(state)
    lines = []
    changes = _change_channels, _change_patch, _change_resolution, _change_tokens, _change_classes, _change_layer_scale
    for change in changes:
        lines += change(changed, given, to)
    return changed, lines


def _check_stem(given: Architecture, to: Architecture, source: str) -> None:
    if given.stem != to.stem:
        raise CheckpointError(
            f"checkpoint {source} has model.stem={given.stem} and the student {to.stem}: set model.stem={given.stem}"
        )
    if given.stem == "conv" and given.patch_px != to.patch_px:
        raise CheckpointError(
            f"checkpoint {source} has a stem of convolutions for patches of {given.patch_px} px, which cannot be "
            f"resized: set model.patch_px={given.patch_px}"
        )


def _change_layer_scale(state: State, given: Architecture, to: Architecture) -> list[str]:
    if given.layer_scale == to.layer_scale:
        return []
    if given.layer_scale:
        folded = fold_layer_scale(state)
        state.clear()
        state |= folded
        return ["layer scale: its factors are folded into the preceding layers"]
    ones = state[POSITIONS].new_ones(to.width)
    state |= {f"blocks.{block}.{branch}.gamma": ones.clone() for block in range(to.depth) for branch in ("ls1", "ls2")}
    return ["layer scale: absent in the file, its factors start at 1"]


def _change_channels(state: State, given: Architecture, to: Architecture) -> list[str]:
    if given.channels == to.channels:
        return []
    _require_adaptable(given.channels, to.channels)
    state[given.first_kernel] = _with_channels(state[given.first_kernel], to.channels)
    how = "summed over colours" if to.channels == 1 else "shared among colours"
    return [f"channels: {given.channels} -> {to.channels}; the patch kernel is {how}"]


def _require_adaptable(given: int, to: int) -> None:
    if given != to and 1 not in (given, to):
        raise CheckpointError(f"weights for {given} channels cannot be adapted to {to}: one of them must be 1")


def _with_channels(kernel: Float[Tensor, "width old _ _"], channels: int) -> Float[Tensor, "width new _ _"]:
    return kernel.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels


def _change_patch(state: State, given: Architecture, to: Architecture) -> list[str]:
    if given.patch_px == to.patch_px:
        return []
    from timm.layers import resample_patch_embed  # here, since it takes a second to import

    state[KERNEL] = resample_patch_embed(state[KERNEL], [to.patch_px, to.patch_px])
    return [f"patch: {given.patch_px} -> {to.patch_px} px; the kernel is resized by the pseudo-inverse (FlexiViT)"]


def _change_resolution(state: State, given: Architecture, to: Architecture) -> list[str]:
    if given.image_px == to.image_px and given.grid == to.grid:
        return []
    line = f"resolution: {_sides(given.image_px)} -> {_sides(to.image_px)} px; "
    if given.grid == to.grid:
        return [f"{line}{_sides(given.grid)} patches as before"]
    from timm.layers import resample_abs_pos_embed  # here, since it takes a second to import

    prefix = len(given.tokens)
    before = state[POSITIONS]
    state[POSITIONS] = after = resample_abs_pos_embed(
        before, new_size=list(to.grid), old_size=list(given.grid), num_prefix_tokens=prefix
    )
    norms = " -> ".join(f"{rows[:, prefix:].norm(dim=-1).mean():.3g}" for rows in (before, after))
    grids = f"{_sides(given.grid)} -> {_sides(to.grid)}"
    return [f"{line}position embeddings {grids}, bicubic, mean norm {norms}"]


def _sides(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"


def _change_tokens(state: State, given: Architecture, to: Architecture) -> list[str]:
    if given.tokens == to.tokens:
        return []
    old, heads = dict(state), _heads(given.tokens)
    for name in [name for token in PARAMETERS.values() for name in (token[0], *_layer(token[1]))]:
        state.pop(name, None)
    rows = {token: old[POSITIONS][:, index : index + 1] for index, token in enumerate(given.tokens)}
    nothing = torch.zeros_like(old[POSITIONS][:, :1])
    prefix = []
    for token in to.tokens:
        donor = token if token in given.tokens else next(iter(given.tokens), None)
        prefix.append(rows[donor] if donor else nothing)
        state[PARAMETERS[token][0]] = (old[PARAMETERS[donor][0]] if donor else nothing).clone()
    state[POSITIONS] = torch.cat([*prefix, old[POSITIONS][:, len(given.tokens) :]], dim=1)
    if given.classes:
        for head in _heads(to.tokens):
            donor_head = head if head in heads else heads[0]
            for new, name in zip(_layer(head), _layer(donor_head), strict=True):
                state[new] = old[name].clone()
    return [_token_line(given.tokens, to.tokens)]


def _heads(tokens: tuple[str, ...]) -> list[str]:
    """Return the names of the classifiers of a token layout; averaged patches use the class head."""
    return [PARAMETERS[token][1] for token in tokens] or ["head"]


def _layer(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _token_line(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    line = f"tokens: {'+'.join(old) or 'none'} -> {'+'.join(new) or 'none'}"
    for token in new:
        if token not in old:
            line += (
                f"; {token} token and head start as copies of the {old[0]} token's"
                if old
                else (f"; the {token} token starts at zero")
            )
    dropped = [token for token in old if token not in new]
    return line + "".join(f"; the {token} token is dropped" for token in dropped)


def _change_classes(state: State, given: Architecture, to: Architecture) -> list[str]:
    if given.classes == to.classes:
        return []
    for head in _heads(to.tokens):
        weight, bias = _layer(head)
        state[weight] = state[POSITIONS].new_zeros(to.classes, to.width)
        state[bias] = state[POSITIONS].new_zeros(to.classes)
    return [f"classes: {given.classes or 'no classifier'} -> {to.classes}; the classifier starts at zero"]


def renormalise(state: Mapping[str, Tensor], old: Normalisation, new: Normalisation) -> tuple[State, list[str]]:
    """Change the normalisation of a state dict's images without changing its output.

    The patch embedding is linear, so it compensates the difference exactly, up to rounding. If one side has one channel
    and the other three, the value of the grey image is repeated. A stem of convolutions is unchanged, since the zero
    padding around an image would have to change too.

    Args:
        state: By the names of ``vit``; not changed.
        old: Normalisation that the weights were trained with.
        new: Normalisation that they will be used with.

    Returns:
        The new state dict, with the larger number of channels of both; and one line, unless both are equal up to
        rounding.

    Raises:
        CheckpointError: Both have several channels, and not as many.
    """
    stem = stem_kernels(state)
    kernel = (stem[0] if stem else state[KERNEL]).double()
    _require_adaptable(kernel.shape[1], len(new[0]))
    channels = max(kernel.shape[1], len(new[0]))
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64).expand(channels).view(-1, 1, 1) for values in (*old, *new)
    )
    if torch.allclose(old_mean, new_mean, atol=1e-6) and torch.allclose(old_std, new_std, atol=1e-6):  # cards round
        return dict(state), []
    change = " -> ".join(
        f"mean {', '.join(f'{value:.3g}' for value in mean)} std {', '.join(f'{value:.3g}' for value in std)}"
        for mean, std in (old, new)
    )
    if stem:
        return dict(state), [f"normalisation: {change}; a stem of convolutions is unchanged"]
    if kernel.shape[1] != channels:
        kernel = _with_channels(kernel, channels)
    # w (x - m) / s = (w s' / s) (x - m') / s' + w (m' - m) / s
    shift = (kernel * (new_mean - old_mean) / old_std).sum(dim=(1, 2, 3))
    scaled = {
        KERNEL: (kernel * new_std / old_std).to(state[KERNEL].dtype),
        "patch_embed.proj.bias": (state["patch_embed.proj.bias"].double() + shift).to(state[KERNEL].dtype),
    }
    return {**state, **scaled}, [f"normalisation: {change}; the patch embedding compensates the difference"]
