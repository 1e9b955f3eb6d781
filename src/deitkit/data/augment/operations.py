"""Pillow's operations on single images, for a whole batch.

The batch is sorted by operation, so that each operation is a few tensor operations on a slice. The operations of each
image are drawn in ``randaugment.py`` and ``policies.py``; flips, crops and erasing are in ``augment.py``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from deitkit.data.pixels import luma
from deitkit.system.device import to_device

BLUR_PASSES = 3  # box blurs in Pillow's GaussianBlur
WITHOUT_FLOAT64 = ("mps",)


def _blend(degenerate: Tensor | float, image: Tensor, factor: Tensor) -> Tensor:
    """Interpolate, or extrapolate beyond factor 1, then truncate like Pillow's ``Image.blend``."""
    return (degenerate + factor.float() * (image - degenerate)).clamp(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """Return the luma as float32, one channel."""
    return pixels.float() if pixels.shape[1] == 1 else luma(pixels).float()


def _smooth(pixels: Tensor) -> Tensor:
    """Apply Pillow's SMOOTH: a 3x3 mean with the centre counted five times; the outermost pixels are unchanged."""
    smooth = pixels.float()
    rows = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = smooth[..., 1:-1, 1:-1]
    inner.copy_(((box + 4 * inner) / 13 + 0.5).floor())
    return smooth


# Operations that map each grey level separately. A table has shape (batch, 1 or channels, 256); `ramp` contains the
# grey levels 0 to 255, and arguments have shape (batch, 1, 1).


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


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most precise type of the device."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def _autocontrast(ramp: Tensor, pixels: Tensor, unused: Tensor) -> Tensor:
    low, high = pixels.flatten(2).aminmax(dim=-1, keepdim=True)
    low, high = low.to(widest_float(pixels.device)), high.to(widest_float(pixels.device))
    # Pillow's float64 arithmetic to the last bit, because truncation follows; `255 / x` would be `255 * (1 / x)`.
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
OPERATIONS = ("Identity", *_GEOMETRIC, *_TABLES, *_DEGENERATES, "GaussianBlur")


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
    """Apply an affine map with nearest interpolation, in Pillow's 16.16 fixed point: exactly the pixels of Pillow."""
    batch, channels, height, width = pixels.shape
    a, b, c, d, e, f = matrices.unbind(1)
    centred = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    fixed = to_device((centred * 65536 + 0.5).floor().int(), pixels.device)[..., None, None]
    columns = torch.arange(width, device=pixels.device, dtype=torch.int32)
    rows = torch.arange(height, device=pixels.device, dtype=torch.int32)[:, None]
    x = (fixed[0] * columns + (fixed[1] * rows + fixed[2])) >> 16
    y = (fixed[3] * columns + (fixed[4] * rows + fixed[5])) >> 16
    # A frame of one pixel in the fill colour represents everything outside the image.
    framed = fill.expand(batch, -1, height + 2, width + 2).clone()
    framed[..., 1:-1, 1:-1] = pixels
    index = (y.clamp_(-1, height) + 1) * (width + 2) + (x.clamp_(-1, width) + 1)
    return framed.flatten(2).gather(2, index.long().view(batch, 1, -1).expand(-1, channels, -1)).view_as(pixels)


def _warp_bilinear(pixels: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Apply an affine map with bilinear interpolation, within one grey level of Pillow's."""
    height, width = pixels.shape[-2:]
    a, b, c, d, e, f = to_device(matrices.float(), pixels.device)[..., None, None].unbind(1)
    columns = torch.arange(width, device=pixels.device) + 0.5
    rows = (torch.arange(height, device=pixels.device) + 0.5)[:, None]
    x, y = a * columns + (b * rows + c), d * columns + (e * rows + f)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)
    moved = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow truncates; the small addend keeps whole values whole despite float32.
    return torch.where(inside[:, None], (moved + 1e-3).to(torch.uint8), fill)


def _gaussian_blur(pixels: Tensor, radii: Tensor) -> Tensor:
    """Apply Pillow's GaussianBlur: box blurs of a fractional width, horizontal, then vertical, each rounded.

    Each pixel is a weighted sum of its neighbours, in Pillow's 8.24 fixed point; edge pixels extend outside the image.
    """
    whole, inner, outer = _box_weights(radii)
    reach = int(whole.max()) + 1
    offsets = torch.arange(-reach, reach + 1)[:, None]
    weights = torch.where(offsets.abs() <= whole, inner, torch.where(offsets.abs() == whole + 1, outer, 0))
    weights = to_device(weights, pixels.device)[..., None, None, None]
    for axis in (3, 2):
        positions = torch.arange(pixels.shape[axis]) + offsets
        neighbours = to_device(positions.clamp_(0, pixels.shape[axis] - 1), pixels.device)
        for _ in range(BLUR_PASSES):
            total = torch.full(pixels.shape, 1 << 23, device=pixels.device)
            for weight, neighbour in zip(weights, neighbours):
                total += weight * pixels.index_select(axis, neighbour)
            pixels = (total >> 24).to(torch.uint8)
    return pixels


def _box_weights(radii: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the box blur whose passes best approximate a Gaussian of this standard deviation, in Pillow's float32.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".

    Returns:
        Whole pixels of the box on each side; the weights, times 2^24, of these and of the next pixel.
    """
    variance = radii.float().square() / BLUR_PASSES
    length = (12.0 * variance.double() + 1.0).sqrt().float()
    whole = ((length - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    radius = whole + part
    inner = ((1 << 24) / (2 * radius + 1)).long()
    whole = radius.long()
    return whole, inner, ((1 << 24) - (2 * whole + 1) * inner) // 2


def apply_operations(
    images: UInt8[Tensor, "batch channels height width"],
    operations: Int64[Tensor, " batch"],
    arguments: Float64[Tensor, " batch"],
    fill: UInt8[Tensor, " channels"] | None = None,
    bilinear: bool = False,
) -> UInt8[Tensor, "batch channels height width"]:
    """Apply a separate operation to each image, like torchvision to a PIL image.

    Identical bit for bit with nearest interpolation; bilinear geometry is within one grey level of Pillow's, and on
    Apple's GPUs, which have no float64, so is everything else.

    Args:
        images: Grey or RGB images, on any device; left unchanged.
        operations: Indices into ``OPERATIONS``, on the CPU.
        arguments: On the CPU. Shear: pixels per pixel; translation: pixels, to the right or down; rotation: degrees
            counter-clockwise; brightness, colour, contrast, sharpness: the enhancement factor (1 changes nothing);
            posterize: bits kept, 0 to 8; solarize: the first grey level inverted; solarize-add: the addend; Gaussian
            blur: the radius, its standard deviation in pixels.
        fill: Colour outside the image, on the CPU; None is black.
        bilinear: Interpolate geometric operations bilinearly.
    """
    height, width = images.shape[-2:]
    order = operations.argsort(stable=True)
    edges = [0, *operations.bincount(minlength=len(OPERATIONS)).cumsum(0).tolist()]
    groups = {name: slice(edges[i], edges[i + 1]) for i, name in enumerate(OPERATIONS) if edges[i] < edges[i + 1]}
    arguments = arguments[order]
    factors = to_device(arguments.to(widest_float(images.device)), images.device)[:, None, None]
    pixels = images.index_select(0, to_device(order, images.device))

    geometric = [name for name in _GEOMETRIC if name in groups]
    if geometric:
        matrices = torch.cat([_matrices(name, arguments[groups[name]], height, width) for name in geometric])
        part = pixels[groups[geometric[0]].start : groups[geometric[-1]].stop]
        warp = _warp_bilinear if bilinear else _warp_nearest
        colour = images.new_zeros(images.shape[1]) if fill is None else to_device(fill, images.device)
        part.copy_(warp(part, matrices, colour[:, None, None]))

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

    if "GaussianBlur" in groups:
        part = pixels[groups["GaussianBlur"]]
        part.copy_(_gaussian_blur(part, arguments[groups["GaussianBlur"]]))
    return pixels.index_select(0, to_device(order.argsort(), images.device))


class AugmentPolicy(ABC):
    """A policy, which draws operations for every image of a batch in layers, and applies the layers in order.

    Attributes:
        fill: Colour outside the image, on the CPU; None is black.
        bilinear: Interpolate geometric operations bilinearly.
    """

    fill: UInt8[Tensor, " channels"] | None = None
    bilinear = False

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Augment a batch, with draws from a CPU generator for images on any device."""
        batch, _, height, width = images.shape
        return self.apply(images, *self.draw(batch, height, width, generator))

    def apply(
        self,
        images: UInt8[Tensor, "batch channels height width"],
        operations: Int64[Tensor, "layers batch"],
        arguments: Float64[Tensor, "layers batch"],
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Apply the layers that ``draw`` drew for these images, in order."""
        for layer in zip(operations, arguments, strict=True):
            images = apply_operations(images, *layer, self.fill, self.bilinear)
        return images

    @abstractmethod
    def draw(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "layers batch"], Float64[Tensor, "layers batch"]]:
        """Draw operations (indices into ``OPERATIONS``) and their arguments for every image."""
