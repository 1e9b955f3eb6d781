"""Decoding one image to uint8 pixels.

Finding images belongs in ``sources``; many images in ``decode_many.py``; operations on decoded
pixels in ``pixels.py``.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import ExifTags, Image, features

from deitkit.data.pixels import evaluation_frame

Box = tuple[float, float, float, float]  # left, top, right, bottom
_AVIF = features.check("avif")  # Pillow 11.3 or newer, built with it
SUFFIXES = frozenset(
    (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
        *((".avif",) if _AVIF else ()),
    )
)  # fmt: skip
# A closed list, because Pillow goes by content and would pass an EPS file named .png to Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image, upright and in the mode L or RGB, before it becomes square.

    Attributes:
        image: Its pixels; of a much larger JPEG at 1/2, 1/4 or 1/8 of its size.
        extent: The part of ``image`` that shows the original.
        size: Height and width of the original.
    """

    image: Image.Image
    extent: Box
    size: tuple[int, int]

    @property
    def reduced(self) -> bool:
        """Whether it was decoded at a fraction of its size."""
        return self.image.size != self.size[::-1]


def decode_image(
    encoded: Path | bytes | Image.Image,
    channels: int,
    image_px: int | None = None,
    eval_crop: float = 1.0,
    fit: str = "crop",
) -> UInt8[np.ndarray, "channels height width"]:
    """Decode the first frame of an image in one of the formats of ``SUFFIXES``.

    EXIF orientation is applied, transparency composited on white, and 16 bits are scaled to 8.

    Args:
        encoded: A file, its content, or an image that Pillow has opened.
        channels: 1 for grey (ITU-R 601 luma), 3 for RGB.
        image_px: If given, the side of the square result (bicubic, antialiased).
        eval_crop: The image is resized to ``image_px`` divided by this, and the centre is kept.
        fit: How an image becomes square: ``crop`` keeps the centre, ``pad`` puts it on black, ``squash`` distorts it.

    Raises:
        Exception: The image cannot be decoded; the type is Pillow's choice.
    """
    opened = open_image(encoded, channels, None if image_px is None else 2 * evaluation_frame(image_px, eval_crop)[0])
    return as_array(opened.image if image_px is None else resize_and_crop(opened, image_px, eval_crop, fit))


def open_image(encoded: Path | bytes | Image.Image, channels: int, needed_px: int | None = None) -> OpenedImage:
    """Decode an image in full, or a JPEG at the smallest fraction that has ``needed_px`` on each side."""
    drafted = None
    with _opened(encoded) as image:
        width, height = image.size
        if 0 in image.size:
            raise ValueError("it has no pixels")
        if needed_px is not None:
            drafted = image.draft(image.mode, (needed_px, needed_px))
        image.load()
        orientation = _orientation(encoded if isinstance(encoded, Image.Image) else image)
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        extent = _extent(image, drafted, orientation)
        turned = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
        return OpenedImage(_to_mode(turned, "L" if channels == 1 else "RGB"), extent, (height, width))


def _opened(encoded: Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(encoded, Image.Image):
        return nullcontext(encoded.copy())
    try:
        return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(too_many_pixels()) from None


def too_many_pixels() -> str:
    """Return the reason why an image that Pillow takes for a decompression bomb is not decoded."""
    return f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels"


# What makes an image upright, by its EXIF orientation. Pillow's exif_transpose writes the rest of the metadata again,
# and fails if that is damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation, 1 to 8; 1 where its metadata are absent or damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types, and other programs show such an image as it is
        return 1


def decode_crops(
    encoded: Path | bytes,
    channels: int,
    image_px: int,
    shares: Float64[np.ndarray, "4 crops"],
    fit: str = "crop",
) -> UInt8[np.ndarray, "crops channels {image_px} {image_px}"]:
    """Decode an image once and cut several boxes from its own pixels, each resized to a square (bicubic, antialiased).

    Args:
        encoded: A file, or its content.
        channels: 1 for grey, 3 for RGB.
        image_px: Side of the result.
        shares: Top, left, height and width of each box, as shares of the image's.
        fit: Under ``pad`` these are shares of the square around the image, which is black.

    Raises:
        Exception: The image cannot be decoded; the type is Pillow's choice.
    """
    opened = open_image(encoded, channels, int(2 * image_px / shares[2:].min()) + 1)
    left, top, right, bottom = opened.extent
    across, down = right - left, bottom - top
    if fit == "pad":
        side = max(across, down)
        left, top, across, down = left - (side - across) / 2, top - (side - down) / 2, side, side
    cut = []
    for y, x, height, width in shares.T.tolist():
        box = (left + x * across, top + y * down, left + (x + width) * across, top + (y + height) * down)
        cut.append(as_array(_cut(opened.image, box, image_px)))
    return np.stack(cut)


def _cut(image: Image.Image, box: Box, image_px: int) -> Image.Image:
    """Resize a box to a square (bicubic); what lies outside the image is black."""
    inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.width), min(box[3], image.height))
    scales = image_px / (box[2] - box[0]), image_px / (box[3] - box[1])
    corner = round((inside[0] - box[0]) * scales[0]), round((inside[1] - box[1]) * scales[1])
    end = round((inside[2] - box[0]) * scales[0]), round((inside[3] - box[1]) * scales[1])
    size = (end[0] - corner[0], end[1] - corner[1])
    if size == (image_px, image_px):
        return image.resize(size, Image.Resampling.BICUBIC, box=inside)
    ground = Image.new(image.mode, (image_px, image_px))
    if min(size) > 0:
        ground.paste(image.resize(size, Image.Resampling.BICUBIC, box=inside), corner)
    return ground


def as_array(image: Image.Image) -> UInt8[np.ndarray, "channels height width"]:
    """Return the pixels of an image of the mode L or RGB."""
    pixels = np.asarray(image)
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)


def size_for_crops(size: tuple[int, int], fit: str) -> tuple[int, int]:
    """Return the height and width by which random crops of an image are drawn: its own, or those of a square.

    Under ``pad`` and ``squash`` a model is used on squares, so its crops are drawn from squares.
    """
    return size if fit == "crop" else (max(size), max(size))


def _extent(image: Image.Image, drafted: tuple[str, tuple[float | int, ...]] | None, orientation: int) -> Box:
    """Return the part of a decoded image that shows the whole original, after its EXIF orientation is applied.

    A JPEG decoded at a fraction of its size has up to one more column and row than that fraction of the original.
    """
    width, height = (float(px) for px in (image.size if drafted is None else drafted[1][2:]))
    right, bottom = image.width - width, image.height - height  # what there is too much of, on these sides
    left = right if orientation in (2, 3) else bottom if orientation in (6, 7) else 0.0
    top = bottom if orientation in (3, 4) else right if orientation in (7, 8) else 0.0
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return left, top, left + width, top + height


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to L or RGB without the clipping and loss of transparency of Pillow's own conversion."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels of more than 16 bits have no standard range")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no standard range")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def resize_and_crop(opened: OpenedImage, image_px: int, eval_crop: float, fit: str) -> Image.Image:
    """Resize what is kept of an extent only: without a large intermediate image for a panorama."""
    image, extent = opened.image, opened.extent
    width, height = extent[2] - extent[0], extent[3] - extent[1]
    resized_px, start = evaluation_frame(image_px, eval_crop)
    box, size = extent, (resized_px, resized_px)
    if fit == "crop":
        side = min(width, height)
        left, top = extent[0] + (width - side) / 2, extent[1] + (height - side) / 2
        box = (left, top, left + side, top + side)
    elif fit == "pad":
        scale = resized_px / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = image.resize(size, Image.Resampling.BICUBIC, box=box)
    if fit == "pad":
        ground = Image.new(image.mode, (resized_px, resized_px))
        ground.paste(square, ((resized_px - size[0]) // 2, (resized_px - size[1]) // 2))
        square = ground
    return square.crop((start, start, start + image_px, start + image_px))


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make a decompression bomb an error, and silence Pillow's warnings about malformed metadata.

    Enter it around the whole pool, since warning filters belong to the process and not to a thread.
    """
    Image.init()  # not thread-safe
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
