"""From a batch of uint8 images to the view: crop, flip, policies and erasing, batched and on the images' device.

Random numbers are drawn on the CPU, in a few small tensors, so that a seed gives the same view on every device and
nothing waits for the device. Mixing images with each other is in ``mix.py``; normalisation belongs to each model.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from deitkit.data.augment.operations import AugmentPolicy
from deitkit.data.augment.policies import AutoAugment, ColourJitter, ThreeAugment
from deitkit.data.augment.randaugment import RandAugment
from deitkit.recipe.schema import AugmentRecipe

CROP_RATIO = (3 / 4, 4 / 3)
ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (1 / 3.3, 1 / 0.3)  # width to height, like CROP_RATIO; torchvision gives height to width
ATTEMPTS = 10


class Augment:
    """The augmentation of a recipe, with separate draws for each image."""

    def __init__(self, recipe: AugmentRecipe, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Prepare a recipe's augmentation.

        Args:
            recipe: The operations and their probabilities.
            mean: Of the training set's pixels in [0, 1], per channel: the colour of erased and uncovered pixels.
            std: Of the same, per channel: the spread of erasing noise.

        Raises:
            RecipeError: ``recipe.randaugment`` is malformed.
        """
        self.recipe = recipe
        self.layers = list(_layers(recipe, mean))
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the view: float32 in [0, 1], of the images' size, not normalised.

        Args:
            images: Grey or RGB images, on any device; left unchanged.
            generator: A CPU generator. Its state alone determines all draws, except the noise of ``erase_mode: pixel``,
                which a generator on the device draws from a seed drawn here.
        """
        recipe = self.recipe
        batch, _, height, width = images.shape
        pad_px = recipe.pad_px if recipe.crop in ("pad", "simple") else 0
        if recipe.crop == "random-resized":
            boxes = draw_crops(batch, height, width, recipe.scale_min, generator)
            images = resized_crop(images, *boxes)
        if pad_px or recipe.flip:
            tops, lefts = torch.randint(2 * pad_px + 1, (2, batch), generator=generator)
            flipped = torch.rand(batch, generator=generator) < recipe.flip
            images = shift_and_flip(images, tops, lefts, flipped, pad_px, reflect=recipe.crop == "simple")
        for layer in self.layers:
            images = layer(images, generator)
        view = images.float().div_(255)
        return self._erase(view, generator) if recipe.erase else view

    def _erase(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Erase in place (Zhong et al., 2017): a rectangle of 2 % to 33 % of the area, as torchvision draws it.

        Noise is normal around the mean colour, which is standard normal after normalisation, clamped to [0, 1].
        """
        height, width = view.shape[-2:]
        device = view.device
        chosen = torch.rand(len(view), generator=generator) < self.recipe.erase
        index = chosen.nonzero().squeeze(1)
        boxes = _draw_boxes(len(index), (height, width), ERASE_AREA, ERASE_RATIO, (height - 1, width - 1), generator)
        top, left, box_height, box_width = boxes.to(device, non_blocking=True)[..., None]
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        in_rows = (rows >= top) & (rows < top + box_height)
        in_columns = (columns >= left) & (columns < left + box_width)
        erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]

        index = index.to(device, non_blocking=True)
        kept = view.index_select(0, index)
        colour = self.mean.to(device, non_blocking=True)
        if self.recipe.erase_mode == "pixel":
            seed = int(torch.randint(2**62, (), generator=generator))
            noise = torch.randn(kept.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
            colour = (colour + self.std.to(device, non_blocking=True) * noise).clamp_(0, 1)
        return view.index_copy_(0, index, torch.where(erased, colour, kept))


def _layers(recipe: AugmentRecipe, mean: tuple[float, ...]) -> Iterator[AugmentPolicy]:
    """Yield the policies, which change colours or shape of single images, in their order."""
    if recipe.randaugment is not None:
        yield RandAugment(recipe.randaugment, mean)
    if recipe.autoaugment is not None:
        yield AutoAugment(recipe.autoaugment)
    if recipe.three_augment:
        yield ThreeAugment()
    if recipe.colour_jitter:
        yield ColourJitter(recipe.colour_jitter)


def shift_and_flip(
    images: UInt8[Tensor, "batch channels height width"],
    tops: Tensor,
    lefts: Tensor,
    flipped: Tensor,
    pad_px: int,
    reflect: bool = False,
) -> UInt8[Tensor, "batch channels height width"]:
    """Pad, crop every image at its own corner, and mirror some; one gather for the batch.

    Args:
        images: On any device.
        tops: Upper edge of each crop in the padded image, 0 to ``2 * pad_px``, on the CPU.
        lefts: Left edge, likewise.
        flipped: Which images are mirrored, on the CPU.
        pad_px: Pixels on each side.
        reflect: Pad with the image mirrored at its outermost pixels instead of with black.
    """
    channels, height, width = images.shape[1:]
    device = images.device
    flipped, tops, lefts = (draw.to(device, non_blocking=True)[:, None] for draw in (flipped, tops, lefts))
    columns = torch.arange(width, device=device)
    columns = torch.where(flipped, columns.flip(0), columns) + lefts
    rows = torch.arange(height, device=device) + tops
    if reflect:
        padded, rows, columns = images, _reflected(rows - pad_px, height), _reflected(columns - pad_px, width)
    else:
        padded = F.pad(images, (pad_px, pad_px, pad_px, pad_px))
    index = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    index = index.flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)


def _reflected(positions: Tensor, side_px: int) -> Tensor:
    """Return the pixel at a position that may be outside: mirrored at the outermost pixels, which are not repeated."""
    period = max(1, 2 * (side_px - 1))
    positions = positions % period
    return torch.minimum(positions, period - positions).clamp_(max=side_px - 1)


def _draw_boxes(
    count: int,
    size: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
    largest: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Draw boxes of uniform area and log-uniform width to height, until one fits, at a uniform place.

    Returns:
        Top, left, height and width: (4, count), int64; size 0 where none of ten attempts fits ``largest``.
    """
    uniform = torch.rand(4, ATTEMPTS, count, generator=generator, dtype=torch.float64)
    areas = (area[0] + (area[1] - area[0]) * uniform[0]) * (size[0] * size[1])
    ratios = ratio[0] * (ratio[1] / ratio[0]) ** uniform[1]
    heights, widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (heights >= 1) & (heights <= largest[0]) & (widths >= 1) & (widths <= largest[1])
    first = fits.int().argmax(dim=0, keepdim=True)
    sizes = torch.stack([heights, widths]).where(fits, 0).gather(1, first.expand(2, -1, -1))[:, 0]
    corners = (uniform[2:, 0] * (torch.tensor(size)[:, None] - sizes + 1)).floor()
    return torch.cat([corners, sizes]).long()


def draw_crops(count: int, height: int, width: int, scale_min: float, generator: torch.Generator) -> Tensor:
    """Draw crops like torchvision's ``RandomResizedCrop``, including its central crop if no attempt fits.

    Returns:
        Top, left, height and width of each crop: (4, count), int64, on the CPU.
    """
    boxes = _draw_boxes(count, (height, width), (scale_min, 1.0), CROP_RATIO, (height, width), generator)
    central_width = min(width, round(height * CROP_RATIO[1]))
    central_height = min(height, round(width / CROP_RATIO[0]))
    top, left = (height - central_height) // 2, (width - central_width) // 2
    central = torch.tensor([top, left, central_height, central_width])[:, None]
    return boxes.where(boxes[2] > 0, central)


def resized_crop(
    images: UInt8[Tensor, "batch channels height width"], tops: Tensor, lefts: Tensor, heights: Tensor, widths: Tensor
) -> UInt8[Tensor, "batch channels height width"]:
    """Crop a box from every image and resize it to the image's size: bicubic, within one grey level of Pillow's.

    The crop is never larger than the result, so Pillow's antialiasing has no effect. Boxes are on the CPU.
    """
    height, width = images.shape[-2:]
    tops, lefts, heights, widths = (
        edge.to(images.device, non_blocking=True) for edge in (tops, lefts, heights, widths)
    )
    across, down = _bicubic_weights(lefts, widths, width), _bicubic_weights(tops, heights, height)
    # Like Pillow, round between the passes: otherwise overshoots of the first pass would reach the second.
    stretched = (images.float() @ across[:, None].mT).round_().clamp_(0, 255)
    return (down[:, None] @ stretched).round_().clamp_(0, 255).to(torch.uint8)


def _bicubic_weights(starts: Tensor, lengths: Tensor, side_px: int) -> Tensor:
    """Return weights (batch, output, input) that resize ``[start, start + length)`` to ``side_px``: Keys, a = -0.5."""
    starts, lengths = starts[:, None, None], lengths[:, None, None]
    positions = torch.arange(side_px, device=starts.device)
    centres = (positions[:, None] + 0.5) * (lengths / side_px) + starts
    distances = (positions + 0.5 - centres).abs()
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((2.5 - 0.5 * distances) * distances - 4) * distances + 2
    weights = torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))
    weights = weights.where((positions >= starts) & (positions < starts + lengths), 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)
