"""RandAugment on a whole batch: the operations, and the policies of torchvision and timm.

Every image draws its own operations on the CPU; the batch is then sorted by operation, so that each operation is a few
tensor operations on a slice. Flips, crops and erasing are in ``augment.py``.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from deitkit.errors import RecipeError

BINS = 31
TIMM_LEVELS = 10


def _blend(degenerate: Tensor | float, image: Tensor, factor: Tensor) -> Tensor:
    """Interpolate, or extrapolate beyond factor 1, then truncate as Pillow's ``Image.blend`` does."""
    return (degenerate + factor.float() * (image - degenerate)).clamp(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma in Pillow's 16-bit fixed point: float32, one channel."""
    if pixels.shape[1] == 1:
        return pixels.float()
    red, green, blue = pixels.int().split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).float()


def _smooth(pixels: Tensor) -> Tensor:
    """Pillow's SMOOTH: a 3x3 mean with the centre counted five times; the outermost pixels stay as they are."""
    smooth = pixels.float()
    rows = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = smooth[..., 1:-1, 1:-1]
    inner.copy_(((box + 4 * inner) / 13 + 0.5).floor())
    return smooth


# Operations that map each grey level on its own. A table has shape (batch, 1 or channels, 256); `ramp` holds the grey
# levels 0 to 255, and arguments have shape (batch, 1, 1).


def _brightness(ramp: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(0.0, ramp, factor)


def _contrast(ramp: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(pixels).flatten(1).long()
    count = grey.shape[1]
    mean = (2 * grey.sum(dim=1) + count) // (2 * count)  # rounded half up, in integers
    return _blend(mean.float()[:, None, None], ramp, factor)


def _posterize(ramp: Tensor, pixels: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return (ramp / step).floor() * step


def _solarize(ramp: Tensor, pixels: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(ramp < threshold, ramp, 255 - ramp)


def _solarize_add(ramp: Tensor, pixels: Tensor, addend: Tensor) -> Tensor:
    return torch.where(ramp < 128, (ramp + addend).clamp(max=255), ramp)


def _invert(ramp: Tensor, pixels: Tensor, unused: Tensor) -> Tensor:
    return (255 - ramp).expand(len(pixels), 1, -1)


def _autocontrast(ramp: Tensor, pixels: Tensor, unused: Tensor) -> Tensor:
    low, high = pixels.flatten(2).aminmax(dim=-1, keepdim=True)
    low, high = low.double(), high.double()
    # Pillow's float64 arithmetic to the last bit, as truncation follows; `255 / x` would be `255 * (1 / x)`.
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)
    stretched = (ramp * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, ramp)


def _equalize(ramp: Tensor, pixels: Tensor, unused: Tensor) -> Tensor:
    levels = pixels.flatten(2).long()
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    below = counts.cumsum(dim=2) - counts
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equalized, ramp.long())


_TABLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Contrast": _contrast,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Invert": _invert,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
_DEGENERATES: dict[str, Callable[[Tensor], Tensor]] = {"Color": _grey, "Sharpness": _smooth}
_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")

# Sorted by kind, so that the images of one kind form one slice of the sorted batch.
OPERATIONS = ("Identity", *_GEOMETRIC, *_TABLES, *_DEGENERATES)


def _matrices(name: str, arguments: Tensor, height: int, width: int) -> Tensor:
    """Map pixel edges of the output to the input: (batch, 6) rows ``a b c d e f`` of ``ax + by + c, dx + ey + f``."""
    matrices = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(arguments), 1)
    if name == "ShearX":
        matrices[:, 1] = arguments
    elif name == "ShearY":
        matrices[:, 3] = arguments
    elif name == "TranslateX":
        matrices[:, 2] = -arguments
    elif name == "TranslateY":
        matrices[:, 5] = -arguments
    else:
        radians = arguments * (math.pi / 180)
        cosine, sine = radians.cos(), radians.sin()
        x, y = width / 2, height / 2
        shift_x, shift_y = x - cosine * x + sine * y, y - sine * x - cosine * y
        matrices = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1)
    return matrices


def _warp_nearest(pixels: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Affine map with nearest interpolation, in Pillow's 16.16 fixed point and so exactly the pixels it picks."""
    batch, channels, height, width = pixels.shape
    a, b, c, d, e, f = matrices.unbind(1)
    centred = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    fixed = (centred * 65536 + 0.5).floor().int().to(pixels.device, non_blocking=True)[..., None, None]
    columns = torch.arange(width, device=pixels.device, dtype=torch.int32)
    rows = torch.arange(height, device=pixels.device, dtype=torch.int32)[:, None]
    x = (fixed[0] * columns + (fixed[1] * rows + fixed[2])) >> 16
    y = (fixed[3] * columns + (fixed[4] * rows + fixed[5])) >> 16
    # A frame of one pixel in the fill colour stands for all that lies outside.
    framed = fill.expand(batch, -1, height + 2, width + 2).clone()
    framed[..., 1:-1, 1:-1] = pixels
    index = (y.clamp_(-1, height) + 1) * (width + 2) + (x.clamp_(-1, width) + 1)
    return framed.flatten(2).gather(2, index.long().view(batch, 1, -1).expand(-1, channels, -1)).view_as(pixels)


def _warp_bilinear(pixels: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Affine map with bilinear interpolation: Pillow's, to within one grey level."""
    height, width = pixels.shape[-2:]
    a, b, c, d, e, f = matrices.float().to(pixels.device, non_blocking=True)[..., None, None].unbind(1)
    columns = torch.arange(width, device=pixels.device) + 0.5
    rows = (torch.arange(height, device=pixels.device) + 0.5)[:, None]
    x, y = a * columns + (b * rows + c), d * columns + (e * rows + f)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)
    moved = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow truncates; the small addend keeps whole values whole despite float32.
    return torch.where(inside[:, None], (moved + 1e-3).to(torch.uint8), fill)


def apply_operations(
    images: UInt8[Tensor, "batch channels height width"],
    operations: Int64[Tensor, "batch"],
    arguments: Float64[Tensor, "batch"],
    fill: UInt8[Tensor, "channels"],
    bilinear: bool = False,
) -> UInt8[Tensor, "batch channels height width"]:
    """Apply to each image its own operation, as torchvision applies it to a PIL image.

    Bit for bit with nearest interpolation; bilinear geometry is within one grey level of Pillow's.

    Args:
        images: Grey or RGB images, on any device; left unchanged.
        operations: Indices into ``OPERATIONS``, on the CPU.
        arguments: On the CPU. Shear: pixels per pixel; translation: pixels, to the right or down; rotation: degrees
            counter-clockwise; brightness, colour, contrast, sharpness: the enhancement factor (1 changes nothing);
            posterize: bits kept, 0 to 8; solarize: the first grey level inverted; solarize-add: the addend.
        fill: Colour of what comes from outside the image, on the CPU.
        bilinear: Interpolate geometric operations bilinearly.
    """
    height, width = images.shape[-2:]
    order = operations.argsort(stable=True)
    edges = [0, *operations.bincount(minlength=len(OPERATIONS)).cumsum(0).tolist()]
    groups = {name: slice(edges[i], edges[i + 1]) for i, name in enumerate(OPERATIONS) if edges[i] < edges[i + 1]}
    arguments = arguments[order]
    factors = arguments.to(images.device, non_blocking=True)[:, None, None]
    pixels = images.index_select(0, order.to(images.device, non_blocking=True))

    geometric = [name for name in _GEOMETRIC if name in groups]
    if geometric:
        matrices = torch.cat([_matrices(name, arguments[groups[name]], height, width) for name in geometric])
        part = pixels[groups[geometric[0]].start : groups[geometric[-1]].stop]
        warp = _warp_bilinear if bilinear else _warp_nearest
        part.copy_(warp(part, matrices, fill.to(images.device, non_blocking=True)[:, None, None]))

    mapped = [name for name in _TABLES if name in groups]
    if mapped:
        ramp = torch.arange(256, device=images.device, dtype=torch.float32)
        tables = [_TABLES[name](ramp, pixels[groups[name]], factors[groups[name]]) for name in mapped]
        table = torch.cat([table.to(torch.uint8).expand(-1, images.shape[1], -1) for table in tables])
        part = pixels[groups[mapped[0]].start : groups[mapped[-1]].stop]
        part.copy_(table.gather(2, part.flatten(2).long()).view_as(part))

    for name in (name for name in _DEGENERATES if name in groups):
        part = pixels[groups[name]]
        part.copy_(_blend(_DEGENERATES[name](part), part.float(), factors[groups[name], ..., None]))
    return pixels.index_select(0, order.argsort().to(images.device, non_blocking=True))


# An argument of an operation, from levels, signs (-1 or 1) and the side in pixels along which it translates.
_Argument = Callable[[Tensor, Tensor, int], Tensor]


def _no_argument(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return torch.zeros_like(level)


def _bins(first: float, last: float, level: Tensor) -> Tensor:
    return torch.linspace(first, last, BINS)[level.long()].double()


def _torchvision_shear(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return sign * _bins(0.0, 0.3, level)


def _torchvision_translation(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return (sign * _bins(0.0, 150.0 / 331.0 * side_px, level)).trunc()


def _torchvision_factor(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return 1 + sign * _bins(0.0, 0.9, level)


_TORCHVISION: dict[str, _Argument] = {
    "Identity": _no_argument,
    "ShearX": _torchvision_shear,
    "ShearY": _torchvision_shear,
    "TranslateX": _torchvision_translation,
    "TranslateY": _torchvision_translation,
    "Rotate": lambda level, sign, side_px: sign * _bins(0.0, 30.0, level),
    "Brightness": _torchvision_factor,
    "Color": _torchvision_factor,
    "Contrast": _torchvision_factor,
    "Sharpness": _torchvision_factor,
    "Posterize": lambda level, sign, side_px: 8 - (level / ((BINS - 1) / 4)).round(),
    "Solarize": lambda level, sign, side_px: _bins(255.0, 0.0, level),
    "AutoContrast": _no_argument,
    "Equalize": _no_argument,
}


def _timm_shear(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return sign * level / TIMM_LEVELS * 0.3


def _timm_translation(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return sign * level / TIMM_LEVELS * 0.45 * side_px


def _timm_factor(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return level / TIMM_LEVELS * 1.8 + 0.1


def _timm_increasing_factor(level: Tensor, sign: Tensor, side_px: int) -> Tensor:
    return (1 + sign * (level / TIMM_LEVELS * 0.9)).clamp(min=0.1)


_TIMM: dict[str, _Argument] = {
    "AutoContrast": _no_argument,
    "Equalize": _no_argument,
    "Invert": _no_argument,
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
_TIMM_INCREASING: dict[str, _Argument] = _TIMM | {
    "Posterize": lambda level, sign, side_px: (4 - (level / TIMM_LEVELS * 4).trunc()).clamp(min=0),
    "Solarize": lambda level, sign, side_px: 256 - _TIMM["Solarize"](level, sign, side_px),
    "Color": _timm_increasing_factor,
    "Contrast": _timm_increasing_factor,
    "Brightness": _timm_increasing_factor,
    "Sharpness": _timm_increasing_factor,
}


@dataclass(frozen=True)
class Policy:
    """Which operations an image may draw, how many, and how strong they are."""

    space: dict[str, _Argument]
    layers: int
    level: int
    level_max: int = BINS - 1
    level_std: float = 0.0
    probability: float = 1.0
    fill_mean: bool = False
    bilinear: bool = False


def parse_policy(text: str) -> Policy:
    """Read ``N,M`` (torchvision's RandAugment) or a timm string such as ``rand-m9-n2-p0.5-mstd0.5-mmax10-inc1``.

    Raises:
        RecipeError: For anything else.
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


class RandAugment:
    """RandAugment (Cubuk et al., 2020) with a draw per image, for a whole batch.

    ``N,M`` has the operations, magnitudes and interpolation (nearest, black outside) of torchvision's ``RandAugment``
    with 31 magnitude bins. A timm string has timm's operations, severities, noise and fill (the mean colour), with one
    difference: geometric operations are always bilinear, where timm draws bilinear or bicubic for each.
    """

    def __init__(self, policy: str, mean: tuple[float, ...]) -> None:
        self.policy = parse_policy(policy)
        colour = [min(255, round(255 * value)) if self.policy.fill_mean else 0 for value in mean]
        self.fill = torch.tensor(colour, dtype=torch.uint8)

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Augment a batch; the draws come from the CPU generator, whatever the device of the images."""
        batch, _, height, width = images.shape
        for operations, arguments in zip(*self.draw(batch, height, width, generator)):
            images = apply_operations(images, operations, arguments, self.fill, self.policy.bilinear)
        return images

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

        named = torch.tensor([OPERATIONS.index(name) for name in policy.space])[choices]
        operations = torch.where(applied, named, OPERATIONS.index("Identity"))
        sides_px = [width if name.endswith("X") else height for name in policy.space]
        options = [argument(levels, signs, side_px) for argument, side_px in zip(policy.space.values(), sides_px)]
        return operations, torch.stack(options).gather(0, choices[None])[0]
