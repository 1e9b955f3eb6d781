"""RandAugment on a whole batch, with the policies of torchvision and timm. The operations are in ``operations.py``."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from deitkit.data.augment.operations import OPERATIONS, AugmentPolicy
from deitkit.errors import RecipeError

BINS = 31
TIMM_LEVELS = 10

# Computes the argument of an operation from levels, signs (-1 or 1) and the side in pixels along which it translates.
Argument = Callable[[Tensor, Tensor, int], Tensor]


def no_argument(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    """Return zeros, for an operation without an argument."""
    return torch.zeros_like(level)


def torchvision_space(bins: int) -> dict[str, Argument]:
    """Return the operations of torchvision's policies, whose magnitudes are levels below ``bins``."""

    def between(first: float, last: float, level: Tensor) -> Tensor:
        return torch.linspace(first, last, bins)[level.long()].double()

    def shear(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
        return sign * between(0.0, 0.3, level)

    def translation(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
        return (sign * between(0.0, 150.0 / 331.0 * side_px, level)).trunc()

    def factor(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
        return 1 + sign * between(0.0, 0.9, level)

    return {
        "Identity": no_argument,
        "ShearX": shear,
        "ShearY": shear,
        "TranslateX": translation,
        "TranslateY": translation,
        "Rotate": lambda level, sign, side_px: sign * between(0.0, 30.0, level),
        "Brightness": factor,
        "Color": factor,
        "Contrast": factor,
        "Sharpness": factor,
        "Posterize": lambda level, sign, side_px: 8 - (level / ((bins - 1) / 4)).round(),
        "Solarize": lambda level, sign, side_px: between(255.0, 0.0, level),
        "AutoContrast": no_argument,
        "Equalize": no_argument,
    }


_TORCHVISION = torchvision_space(BINS)


def find_arguments(
    space: dict[str, Argument],
    choices: Int64[Tensor, "layers batch"],
    levels: Float64[Tensor, "layers batch"],
    signs: Float64[Tensor, "layers batch"],
    height: int,
    width: int,
) -> tuple[Int64[Tensor, "layers batch"], Float64[Tensor, "layers batch"]]:
    """Return the operations (indices into ``OPERATIONS``) of choices from a space, and their arguments."""
    named = torch.tensor([OPERATIONS.index(name) for name in space])
    sides_px = [width if name.endswith("X") else height for name in space]
    options = [argument(levels, signs, side_px) for argument, side_px in zip(space.values(), sides_px)]
    return named[choices], torch.stack(options).gather(0, choices[None])[0]


def _timm_shear(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return sign * level / TIMM_LEVELS * 0.3


def _timm_translation(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return sign * level / TIMM_LEVELS * 0.45 * side_px


def _timm_factor(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return level / TIMM_LEVELS * 1.8 + 0.1


def _timm_increasing_factor(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return (1 + sign * (level / TIMM_LEVELS * 0.9)).clamp(min=0.1)


_TIMM: dict[str, Argument] = {
    "AutoContrast": no_argument,
    "Equalize": no_argument,
    "Invert": no_argument,
    "Rotate": lambda level, sign, side_px: sign * (level / TIMM_LEVELS * 30),
    "Posterize": lambda level, sign, side_px: (level / TIMM_LEVELS * 4).trunc().clamp(max=8),
    "Solarize": lambda level, sign, side_px: (level / TIMM_LEVELS * 256).trunc().clamp(max=256),
    "SolarizeAdd": lambda level, sign, side_px: (level / TIMM_LEVELS * 110).trunc().clamp(max=128),
    "Color": _timm_factor,
    "Contrast": _timm_factor,
    "Brightness": _timm_factor,
    "Sharpness": _timm_factor,
    "ShearX": _timm_shear,
    "ShearY": _timm_shear,
    "TranslateX": _timm_translation,
    "TranslateY": _timm_translation,
}
_TIMM_INCREASING: dict[str, Argument] = _TIMM | {
    "Posterize": lambda level, sign, side_px: (4 - (level / TIMM_LEVELS * 4).trunc()).clamp(min=0),
    "Solarize": lambda level, sign, side_px: 256 - _TIMM["Solarize"](level, sign, side_px),
    "Color": _timm_increasing_factor,
    "Contrast": _timm_increasing_factor,
    "Brightness": _timm_increasing_factor,
    "Sharpness": _timm_increasing_factor,
}


@dataclass(frozen=True)
class Policy:
    """The operations that an image may draw, their number, and their strength."""

    space: dict[str, Argument]
    layers: int
    level: int
    level_max: int = BINS - 1
    level_std: float = 0.0
    probability: float = 1.0
    fill_mean: bool = False
    bilinear: bool = False


def parse_policy(text: str) -> Policy:
    """Parse ``N,M`` (torchvision's RandAugment) or a timm string such as ``rand-m9-n2-p0.5-mstd0.5-mmax10-inc1``.

    Raises:
        RecipeError: The text is neither.
    """
    pair = re.fullmatch(r"(\d+) *, *(\d+)", text)
    if pair and int(pair[1]) >= 1 and int(pair[2]) < BINS:
        return Policy(_TORCHVISION, layers=int(pair[1]), level=int(pair[2]))
    number = r"\d+(?:\.\d+)?"
    if re.fullmatch(rf"rand(-(mmax\d+|inc[01]|m\d+|n[1-9]\d*|mstd{number}|p{number}))*", text):
        parts = [re.fullmatch(rf"([a-z]+)({number})", part) for part in text.split("-")[1:]]
        values = {part[1]: float(part[2]) for part in parts if part}
        if len(values) == len(parts) and values.get("p", 0) <= 1:
            return Policy(
                _TIMM_INCREASING if values.get("inc") else _TIMM,
                layers=int(values.get("n", 2)),
                level=int(values.get("m", TIMM_LEVELS)),
                level_max=int(values.get("mmax", 0)) or TIMM_LEVELS,
                level_std=values.get("mstd", 0.0),
                probability=values.get("p", 0.5),
                fill_mean=True,
                bilinear=True,
            )
    raise RecipeError(
        f"randaugment='{text}' is neither 'N,M' with N >= 1 operations of magnitude M <= {BINS - 1}, such as '2,9', "
        "nor a timm string of m, n, p, mstd, mmax and inc, each at most once, such as 'rand-m9-mstd0.5-inc1'"
    )


class RandAugment(AugmentPolicy):
    """RandAugment (Cubuk et al., 2020) with separate draws for each image, for a whole batch.

    ``N,M`` has the operations, magnitudes and interpolation (nearest, black outside) of torchvision's ``RandAugment``
    with 31 magnitude bins. A timm string has timm's operations, severities, noise and fill (the mean colour), with one
    difference: geometric operations are always bilinear, whereas timm draws bilinear or bicubic for each.
    """

    def __init__(self, policy: str, mean: tuple[float, ...]) -> None:
        self.policy = parse_policy(policy)
        self.bilinear = self.policy.bilinear
        if self.policy.fill_mean:
            self.fill = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.uint8)

    def draw(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "layers batch"], Float64[Tensor, "layers batch"]]:
        """Draw operations (indices into ``OPERATIONS``) and their arguments for every image."""
        policy = self.policy
        shape = (policy.layers, batch)
        choices = torch.randint(len(policy.space), shape, generator=generator)
        signs = torch.randint(2, shape, generator=generator).double() * 2 - 1
        levels = torch.full(shape, float(policy.level), dtype=torch.float64)
        if policy.level_std > 100:  # timm's convention for a uniform level
            levels *= torch.rand(shape, generator=generator, dtype=torch.float64)
        elif policy.level_std > 0:
            levels += policy.level_std * torch.randn(shape, generator=generator, dtype=torch.float64)
        levels.clamp_(0, policy.level_max)
        applied = torch.rand(shape, generator=generator) < policy.probability
        operations, arguments = find_arguments(policy.space, choices, levels, signs, height, width)
        return torch.where(applied, operations, OPERATIONS.index("Identity")), arguments
