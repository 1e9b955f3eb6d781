"""Random-resized crops: drawing boxes like torchvision, and cutting them from a batch of images."""

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from deitkit.system.device import to_device

CROP_RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def draw_boxes(
    count: int,
    size: Int64[Tensor, "2 1"] | Int64[Tensor, "2 count"],
    area: tuple[float, float],
    ratio: tuple[float, float],
    largest: Int64[Tensor, "2 1"] | Int64[Tensor, "2 count"],
    generator: torch.Generator,
) -> Int64[Tensor, "4 count"]:
    """Draw boxes of uniform area and log-uniform width to height, until one fits, at a uniform place.

    Args:
        count: Number of boxes.
        size: Height and width of the image, the same for all or of each.
        area: Smallest and largest share of the image.
        ratio: Smallest and largest width to height.
        largest: Largest height and width of a box.
        generator: On the CPU.

    Returns:
        Top, left, height and width; size 0 where none of ten attempts fits ``largest``.
    """
    uniform = torch.rand(4, ATTEMPTS, count, generator=generator, dtype=torch.float64)
    areas = (area[0] + (area[1] - area[0]) * uniform[0]) * (size[0] * size[1])
    ratios = ratio[0] * (ratio[1] / ratio[0]) ** uniform[1]
    heights, widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (heights >= 1) & (heights <= largest[0]) & (widths >= 1) & (widths <= largest[1])
    first = fits.int().argmax(dim=0, keepdim=True)
    sizes = torch.stack([heights, widths]).where(fits, 0).gather(1, first.expand(2, -1, -1))[:, 0]
    corners = (uniform[2:, 0] * (size - sizes + 1)).floor()
    return torch.cat([corners, sizes]).long()


def draw_crops(
    count: int, size: Int64[Tensor, "2 1"] | Int64[Tensor, "2 count"], scale_min: float, generator: torch.Generator
) -> Int64[Tensor, "4 count"]:
    """Draw crops like torchvision's ``RandomResizedCrop``, including its central crop if no attempt fits.

    Args:
        count: Number of crops.
        size: Height and width of the image, the same for all or of each, on the CPU.
        scale_min: Smallest share of the area.
        generator: On the CPU.

    Returns:
        Top, left, height and width of each crop in pixels of the image, on the CPU.
    """
    boxes = draw_boxes(count, size, (scale_min, 1.0), CROP_RATIO, size, generator)
    height, width = size
    central_height = torch.minimum(height, (width / CROP_RATIO[0]).double().round().long())
    central_width = torch.minimum(width, (height * CROP_RATIO[1]).double().round().long())
    top, left = (height - central_height) // 2, (width - central_width) // 2
    central = torch.stack([top, left, central_height, central_width])
    return boxes.where(boxes[2] > 0, central)


def resized_crop(
    images: UInt8[Tensor, "batch channels height width"],
    boxes: Int64[Tensor, "4 batch"] | Float64[Tensor, "4 batch"],
    size: tuple[int, int],
) -> UInt8[Tensor, "batch channels {size[0]} {size[1]}"]:
    """Crop a box from every image and resize it: bicubic, antialiased, within one grey level of Pillow's.

    Args:
        images: On any device.
        boxes: Top, left, height and width in pixels of the images, on the CPU; fractions of a pixel count.
        size: Height and width of the result.
    """
    numbers = boxes if boxes.dtype == torch.int64 else boxes.float()
    tops, lefts, heights, widths = to_device(numbers, images.device)
    across = _bicubic_weights(lefts, widths, images.shape[3], size[1])
    down = _bicubic_weights(tops, heights, images.shape[2], size[0])
    # Like Pillow, round between the passes: otherwise overshoots of the first pass would reach the second.
    stretched = (images.float() @ across[:, None].mT).round_().clamp_(0, 255)
    return (down[:, None] @ stretched).round_().clamp_(0, 255).to(torch.uint8)


def _bicubic_weights(starts: Tensor, lengths: Tensor, input_px: int, output_px: int) -> Tensor:
    """Return weights (batch, output, input) that resize ``[start, start + length)`` to ``output_px``: Keys, a = -0.5.

    Where this shrinks, the kernel is as much wider, as in Pillow.
    """
    starts, lengths = starts[:, None, None], lengths[:, None, None]
    positions = torch.arange(input_px, device=starts.device)
    outputs = torch.arange(output_px, device=starts.device)
    centres = (outputs[:, None] + 0.5) * (lengths / output_px) + starts
    distances = (positions + 0.5 - centres).abs() / (lengths / output_px).clamp(min=1)
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((2.5 - 0.5 * distances) * distances - 4) * distances + 2
    weights = torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))
    weights = weights.where((positions + 1 > starts) & (positions < starts + lengths), 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)
