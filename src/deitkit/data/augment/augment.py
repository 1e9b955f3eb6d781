"""From a batch of uint8 images to the view: crop, flip, policies and erasing, batched and on the images' device.

Random numbers are drawn on the CPU, in a few small tensors, so that a seed gives the same view on every device and
nothing waits for the device. Mixing images with each other is in ``mix.py``; normalisation belongs to each model.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from deitkit.data.augment.crop import draw_boxes, draw_crops, resized_crop
from deitkit.data.augment.operations import AugmentPolicy
from deitkit.data.augment.policies import AutoAugment, ColourJitter, ThreeAugment
from deitkit.data.augment.randaugment import RandAugment
from deitkit.recipe.schema import AugmentRecipe

ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (1 / 3.3, 1 / 0.3)  # width to height, like a crop's; torchvision gives height to width


class Augment:
    """The augmentation of a recipe, with separate draws for each image."""

    def __init__(
        self, recipe: AugmentRecipe, mean: tuple[float, ...], std: tuple[float, ...], *, is_cropped: bool = False
    ) -> None:
        """Prepare a recipe's augmentation.

        Args:
            recipe: The operations and their probabilities.
            mean: Of the training set's pixels in [0, 1], per channel: the colour of erased and uncovered pixels.
            std: Of the same, per channel: the spread of erasing noise.
            is_cropped: Whether the images are random crops already, cut from larger ones (see ``Split.crops``).

        Raises:
            RecipeError: ``recipe.randaugment`` is malformed.
        """
        self.recipe = recipe
        self.crops = recipe.crop == "random-resized" and not is_cropped
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
        if self.crops:
            boxes = draw_crops(batch, torch.tensor([[height], [width]]), recipe.scale_min, generator)
            images = resized_crop(images, boxes, (height, width))
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
        size = torch.tensor([[height], [width]])
        boxes = draw_boxes(len(index), size, ERASE_AREA, ERASE_RATIO, size - 1, generator)
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
