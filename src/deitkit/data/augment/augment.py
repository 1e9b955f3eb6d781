"""From a batch of uint8 images to the view: crop, flip, policies and erasing, batched and on the images' device.

Random numbers are drawn on the CPU, in a few small tensors, so that a seed gives the same view on every device and
nothing waits for the device. Mixing images with each other is in ``mix.py``; normalisation belongs to each model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from deitkit.data.augment.crop import draw_boxes, draw_crops, resized_crop
from deitkit.data.augment.operations import AugmentPolicy
from deitkit.data.augment.policies import AutoAugment, ColourJitter, ThreeAugment
from deitkit.data.augment.randaugment import RandAugment
from deitkit.recipe.schema import AugmentRecipe
from deitkit.system.device import to_device

ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (1 / 3.3, 1 / 0.3)  # width to height, like a crop's; torchvision gives height to width


@dataclass(frozen=True)
class ViewDraws:
    """All random numbers of a batch's view: small tensors on the CPU, whose last dimension is the batch.

    Attributes:
        boxes: Random-resized crops (top, left, height, width); None for none.
        corners: Upper and left edge of each crop of the padded image; None for neither padding nor flips.
        flipped: Which images are mirrored.
        policies: Operations and their arguments, of each policy.
        erased: Which images are erased; None for none.
        erased_boxes: What is erased (top, left, height, width); size 0 in the others.
        noise_rows: The place of each image among the erased ones of the whole batch, in which order noise is drawn.
        noise_count: Number of erased images of the whole batch.
        noise_seed: Of the noise; None erases to the mean colour.
    """

    boxes: Int64[Tensor, "4 batch"] | None
    corners: Int64[Tensor, "2 batch"] | None
    flipped: Bool[Tensor, " batch"]
    policies: tuple[tuple[Int64[Tensor, "_ batch"], Float64[Tensor, "_ batch"]], ...]
    erased: Bool[Tensor, " batch"] | None
    erased_boxes: Int64[Tensor, "4 batch"]
    noise_rows: Int64[Tensor, " batch"]
    noise_count: int
    noise_seed: int | None

    def __getitem__(self, places: Int64[Tensor, " some"]) -> "ViewDraws":
        """Return the draws of some images of the batch: applied to these, they give the same views."""

        def some(draws: Tensor | None) -> Tensor | None:
            return None if draws is None else draws[..., places]

        chosen = {
            name: some(getattr(self, name))
            for name in ("boxes", "corners", "flipped", "erased", "erased_boxes", "noise_rows")
        }
        policies = tuple((operations[:, places], arguments[:, places]) for operations, arguments in self.policies)
        return replace(self, **chosen, policies=policies)  # type: ignore[arg-type]


class Augment:
    """The augmentation of a recipe, with separate draws for each image.

    It first draws for a whole batch, then applies the draws, to all of its images or to some.
    """

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
        self.pad_px = recipe.pad_px if recipe.crop in ("pad", "simple") else 0
        self.layers = list(_layers(recipe, mean))
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        """Draw for a batch and return its view, see ``draw`` and ``apply``."""
        height, width = images.shape[-2:]
        return self.apply(images, self.draw(len(images), (height, width), generator))

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> ViewDraws:
        """Draw for a batch of images.

        Args:
            batch: Number of images.
            size: Their height and width.
            generator: A CPU generator. Its state alone determines all draws, except the noise of ``erase_mode: pixel``,
                which a generator on the device draws from a seed drawn here.
        """
        recipe, (height, width) = self.recipe, size
        boxes, corners, flipped = None, None, torch.zeros(batch, dtype=torch.bool)
        if self.crops:
            boxes = draw_crops(batch, torch.tensor([[height], [width]]), recipe.scale_min, generator)
        if self.pad_px or recipe.flip:
            corners = torch.randint(2 * self.pad_px + 1, (2, batch), generator=generator)
            flipped = torch.rand(batch, generator=generator) < recipe.flip
        policies = tuple(layer.draw(batch, height, width, generator) for layer in self.layers)
        erased, seed = None, None
        erased_boxes, noise_rows = torch.zeros(4, batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
        if recipe.erase:
            erased = torch.rand(batch, generator=generator) < recipe.erase
            limits = torch.tensor([[height], [width]])
            count = int(erased.sum())
            erased_boxes[:, erased] = draw_boxes(count, limits, ERASE_AREA, ERASE_RATIO, limits - 1, generator)
            noise_rows[erased] = torch.arange(count)
            if recipe.erase_mode == "pixel":
                seed = int(torch.randint(2**62, (), generator=generator))
        return ViewDraws(
            boxes=boxes,
            corners=corners,
            flipped=flipped,
            policies=policies,
            erased=erased,
            erased_boxes=erased_boxes,
            noise_rows=noise_rows,
            noise_count=0 if erased is None else int(erased.sum()),
            noise_seed=seed,
        )

    def apply(
        self, images: UInt8[Tensor, "batch channels height width"], draws: ViewDraws
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the view: float32 in [0, 1], of the images' size, not normalised.

        Args:
            images: Grey or RGB images, on any device; left unchanged.
            draws: Of these images.
        """
        if draws.boxes is not None:
            images = resized_crop(images, draws.boxes, (images.shape[2], images.shape[3]))
        if draws.corners is not None:
            tops, lefts = draws.corners
            reflect = self.recipe.crop == "simple"
            images = shift_and_flip(images, tops, lefts, draws.flipped, self.pad_px, reflect=reflect)
        for layer, (operations, arguments) in zip(self.layers, draws.policies, strict=True):
            images = layer.apply(images, operations, arguments)
        view = images.float().div_(255)
        return view if draws.erased is None else self._erase(view, draws)

    def _erase(self, view: Tensor, draws: ViewDraws) -> Tensor:
        """Erase in place (Zhong et al., 2017): a rectangle of 2 % to 33 % of the area, as torchvision draws it.

        Noise is normal around the mean colour, which is standard normal after normalisation, clamped to [0, 1].
        """
        height, width = view.shape[-2:]
        device = view.device
        assert draws.erased is not None
        index = draws.erased.nonzero().squeeze(1)
        top, left, box_height, box_width = to_device(draws.erased_boxes[:, index], device)[..., None]
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        in_rows = (rows >= top) & (rows < top + box_height)
        in_columns = (columns >= left) & (columns < left + box_width)
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]

        noise_rows = draws.noise_rows[index]
        index = to_device(index, device)
        kept = view.index_select(0, index)
        colour = to_device(self.mean, device)
        if draws.noise_seed is not None:
            generator = torch.Generator(device).manual_seed(draws.noise_seed)
            # Noise of all erased images of the batch, so that each has the same whichever of them are in this view.
            noise = torch.randn((draws.noise_count, *kept.shape[1:]), generator=generator, device=device)
            if len(noise_rows) < draws.noise_count:
                noise = noise.index_select(0, to_device(noise_rows, device))
            colour = (colour + to_device(self.std, device) * noise).clamp_(0, 1)
        return view.index_copy_(0, index, torch.where(inside, colour, kept))


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
    flipped, tops, lefts = (to_device(draw, device)[:, None] for draw in (flipped, tops, lefts))
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
