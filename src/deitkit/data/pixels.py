"""Operations on whole data sets of uint8 pixels: size, channels, statistics, memory. Nothing here is random."""

from math import prod

import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from deitkit.errors import DataError

_CHUNK = 1024  # images processed at a time, so that float copies stay small
_LEAST_STD = 1 / 255  # prevents a division by zero for a constant channel


def require_memory(shape: tuple[int, ...], *others: tuple[int, ...]) -> None:
    """Raise DataError if uint8 images of these shapes together do not fit in the free memory."""
    needed, free = prod(shape) + sum(prod(other) for other in others), psutil.virtual_memory().available
    if needed > 0.9 * free:
        size = f"{shape[-1]}x{shape[-2]}"
        raise DataError(
            f"{shape[0]} images of {size} need {needed / 2**30:.1f} GiB decoded, but {free / 2**30:.1f} GiB of memory "
            "are free: lower data.image_px or data.train_images (or test_images, validation_fraction)"
        )


def evaluation_frame(image_px: int, eval_crop: float) -> tuple[int, int]:
    """Return the side that an image is resized to for evaluation, and where its centre of ``image_px`` begins.

    As in the DeiT code: 224 px at a crop of 0.875 are the centre of an image of 256 px.
    """
    resized_px = int(image_px / eval_crop)
    return resized_px, round((resized_px - image_px) / 2)


def resize(
    images: UInt8[Tensor, "n channels side side"],
    image_px: int,
    *,
    train_count: int | None = None,
    eval_crop: float = 1.0,
) -> UInt8[Tensor, "n channels {image_px} {image_px}"]:
    """Resize square images (bicubic, antialiased, rounded and clamped to 0 to 255).

    Args:
        images: Left unchanged; returned if no resizing is needed.
        image_px: Side of the result.
        train_count: Number of training images, which come first; None for all.
        eval_crop: All others are resized to ``image_px / eval_crop``, and their centre is kept.
    """
    if images.shape[-1] == image_px and eval_crop == 1:
        return images
    resized = images.new_empty((*images.shape[:2], image_px, image_px))
    end = len(images) if train_count is None else train_count
    for part, crop in ((slice(0, end), 1.0), (slice(end, None), eval_crop)):
        whole_px, start = evaluation_frame(image_px, crop)
        kept = slice(start, start + image_px)
        for chunk, target in zip(images[part].split(_CHUNK), resized[part].split(_CHUNK)):
            smooth = F.interpolate(chunk.float(), (whole_px, whole_px), mode="bicubic", antialias=True)
            target.copy_(smooth[..., kept, kept].round().clamp(0, 255))
    return resized


def to_channels(
    images: UInt8[Tensor, "n old height width"], channels: int
) -> UInt8[Tensor, "n {channels} height width"]:
    """Repeat grey to three channels, or reduce three to their luma."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    grey = images.new_empty((len(images), 1, *images.shape[2:]))
    for chunk, target in zip(images.split(_CHUNK), grey.split(_CHUNK)):
        target.copy_(luma(chunk))
    return grey


def luma(pixels: UInt8[Tensor, "n 3 height width"]) -> Int32[Tensor, "n 1 height width"]:
    """Return the luma of ITU-R 601 in Pillow's integer arithmetic, 0 to 255."""
    red, green, blue = pixels.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def is_grey(images: UInt8[Tensor, "n channels height width"]) -> bool:
    """Return whether all channels of every image are equal."""
    return all(bool((chunk == chunk[:, :1]).all()) for chunk in images.split(_CHUNK))


def mean_and_std(images: UInt8[Tensor, "n channels height width"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, of values in [0, 1]: exact, from counts of the 256 values."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(_CHUNK):
        for channel, count in enumerate(counts):
            count += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    return mean_and_std_of_counts(counts)


def mean_and_std_of_counts(counts: Int64[Tensor, "channels 256"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, in [0, 1], from counts of the 256 values.

    The standard deviation is at least 1/255.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    std = (share * (values - mean[:, None]).square()).sum(dim=1).sqrt().clamp(min=_LEAST_STD)
    return tuple(mean.tolist()), tuple(std.tolist())
