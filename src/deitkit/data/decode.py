"""Decoding images to uint8 pixels, one or many at a time.

Finding images belongs in ``sources``; operations on decoded pixels belong in ``pixels.py``.
"""

import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from deitkit.data import cache
from deitkit.data.duplicates import pixel_hashes
from deitkit.data.listing import EncodedImages, Progress
from deitkit.data.pixels import evaluation_frame, is_grey, require_memory
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe

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
_FORMAT_VERSION = 3  # of cached images: raise it when decoding changes
_WINDOW = 256  # encoded images in memory at a time


@dataclass(frozen=True)
class DecodedImages:
    """The decoded images of a selection, in its order.

    Attributes:
        images: Pixels of the images that could be decoded.
        kept: Which images of the selection these are.
        skipped: Names of the others.
        hashes: Pixel hash of each image of the selection, cropped like a training image; 0 if skipped.
    """

    images: UInt8[Tensor, "kept channels height width"]
    kept: Bool[Tensor, " selected"]
    skipped: tuple[str, ...]
    hashes: Int64[Tensor, " selected"]


def decode_image(
    encoded: Path | bytes,
    channels: int,
    image_px: int | None = None,
    eval_crop: float = 1.0,
    fit: str = "crop",
) -> UInt8[np.ndarray, "channels height width"]:
    """Decode the first frame of an image in one of the formats of ``SUFFIXES``.

    EXIF orientation is applied, transparency composited on white, and 16 bits are scaled to 8.

    Args:
        encoded: A file, or its content.
        channels: 1 for grey (ITU-R 601 luma), 3 for RGB.
        image_px: If given, the side of the square result (bicubic, antialiased).
        eval_crop: The image is resized to ``image_px`` divided by this, and the centre is kept.
        fit: How an image becomes square: ``crop`` keeps the centre, ``pad`` puts it on black, ``squash`` distorts it.

    Raises:
        Exception: The image cannot be decoded; the type is Pillow's choice.
    """
    drafted = None
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS) as image:
        if image_px is not None:
            frame_px = 2 * evaluation_frame(image_px, eval_crop)[0]
            drafted = image.draft(image.mode, (frame_px, frame_px))  # decode a much larger JPEG at 1/2, 1/4 or 1/8
        image.load()
        extent = _extent(image, drafted)
        ImageOps.exif_transpose(image, in_place=True)
        plain = _to_mode(image, "L" if channels == 1 else "RGB")
    if image_px is not None:
        plain = _resize_and_crop(plain, extent, image_px, eval_crop, fit)
    pixels = np.asarray(plain)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _extent(image: Image.Image, drafted: tuple[str, tuple[float | int, ...]] | None) -> Box:
    """Return the part of a decoded image that shows the whole original, after its EXIF orientation is applied.

    A JPEG decoded at a fraction of its size has up to one more column and row than that fraction of the original.
    """
    width, height = (float(px) for px in (image.size if drafted is None else drafted[1][2:]))
    right, bottom = image.width - width, image.height - height  # what there is too much of, on these sides
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
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


def _resize_and_crop(image: Image.Image, extent: Box, image_px: int, eval_crop: float, fit: str) -> Image.Image:
    """Resize what is kept of an extent only: without a large intermediate image for a panorama."""
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


def decode_images(
    encoded: EncodedImages,
    selection: Int64[Tensor, " selected"],
    recipe: DataRecipe,
    progress: Progress | None = None,
    *,
    train_count: int | None = None,
) -> DecodedImages:
    """Decode the selected images on all cores, or take them from the cache.

    Args:
        encoded: All images of the data set.
        selection: Positions of the images to decode, in the order of the result.
        recipe: ``image_px``, ``eval_crop``, ``channels`` (None: 1 if every image is grey, else 3) and ``corrupt``.
        progress: Called with the stage, the number of images done, and their total number.
        train_count: Number of training images, which come first and to which ``eval_crop`` does not apply; None for
            all.

    Raises:
        DataError: Sizes differ and ``image_px`` is not set, the pixels do not fit in memory, no image can
            be decoded, or one cannot and ``corrupt`` is "error".
    """
    train_count = len(selection) if train_count is None else train_count
    parts = (_FORMAT_VERSION, encoded.key, cache.sha256(selection), recipe.image_px, recipe.channels, recipe.corrupt)
    cropped: tuple[int | float | str, ...] = (train_count, recipe.eval_crop) if recipe.eval_crop < 1 else ()
    cropped += (recipe.fit,) if recipe.fit != "crop" else ()
    key = hashlib.sha256(repr(parts + cropped).encode()).hexdigest()
    cached = cache.load_cached(key)
    if cached is not None:
        tensors, names = cached
        return DecodedImages(tensors["images"], tensors["kept"].bool(), tuple(names), tensors["hashes"])
    target = _Pixels(len(selection), train_count, recipe)
    decode_all(encoded.read, encoded.names, selection, recipe, target, progress, "decoding images")
    decoded = target.finish()
    tensors = {"images": decoded.images, "kept": decoded.kept.byte(), "hashes": decoded.hashes}
    cache.store(key, tensors, list(decoded.skipped))
    return decoded


def decode_all(
    read: Callable[[list[int]], Iterator[Path | bytes]],
    names: Sequence[str],
    selection: Int64[Tensor, " selected"],
    recipe: DataRecipe,
    target: "ImageSink",
    progress: Progress | None,
    what: str,
) -> None:
    """Decode the selected images on all cores, in ascending order of their positions, and put them into the target.

    Raises:
        DataError: No image can be decoded, or the target refused one.
    """

    def attempt(image: Path | bytes, slot: int) -> tuple[np.ndarray | str, int]:
        eval_crop = 1.0 if slot < target.train_count else recipe.eval_crop
        try:
            pixels = decode_image(image, recipe.channels or 3, recipe.image_px, eval_crop, recipe.fit)
            # Hash the image as cropped for training, so that duplicates of training images are found.
            whole = pixels
            if eval_crop < 1:
                whole = decode_image(image, recipe.channels or 3, recipe.image_px, fit=recipe.fit)
            return pixels, int(pixel_hashes(whole[None])[0])
        except UnidentifiedImageError:
            return "not an image in a supported format", 0
        except Exception as error:  # Pillow's plug-ins raise many types for damaged files
            return str(error) or type(error).__name__, 0

    slots = selection.argsort().tolist()
    positions = selection[slots].tolist()
    images = read(positions)
    with strict_pillow(), ThreadPoolExecutor() as pool:
        for start in range(0, len(positions), _WINDOW):
            window = pool.map(attempt, islice(images, _WINDOW), slots[start : start + _WINDOW])
            for offset, (pixels, pixel_hash) in enumerate(window, start):
                target.put(slots[offset], names[positions[offset]], pixels)
                target.hashes[slots[offset]] = pixel_hash
            if progress is not None:
                progress(what, min(start + _WINDOW, len(positions)), len(positions))
    if not target.kept.any():
        name, reason = next(iter(target.failures.items()))
        raise DataError(
            f"none of the {len(positions)} images of data.name={recipe.name} can be decoded, such as '{name}' "
            f"({reason}): check the path, or download the data set again"
        )


class ImageSink(ABC):
    """Receives decoded images one by one, and refuses images of different sizes."""

    def __init__(self, count: int, train_count: int, recipe: DataRecipe) -> None:
        self.count, self.train_count, self.recipe = count, train_count, recipe
        self.pixel_shape: tuple[int, ...] = ()
        self.first_name = ""
        self.kept = torch.zeros(count, dtype=torch.bool)
        self.hashes = torch.zeros(count, dtype=torch.int64)
        self.failures: dict[str, str] = {}

    def put(self, slot: int, name: str, pixels: np.ndarray | str) -> None:
        """Receive an image, or the reason why it could not be decoded."""
        if isinstance(pixels, str):
            if self.recipe.corrupt == "error":
                raise DataError(f"'{name}' cannot be decoded ({pixels}): remove it or set data.corrupt=skip")
            self.failures[name] = pixels
            return
        if not self.pixel_shape:
            self.pixel_shape, self.first_name = pixels.shape, name
        if pixels.shape != self.pixel_shape:
            raise DataError(
                f"the images differ in size, such as '{self.first_name}' ({_size(self.pixel_shape)}) and '{name}' "
                f"({_size(pixels.shape)}): set data.image_px, for example data.image_px={min(self.pixel_shape[-2:])}"
            )
        self.keep(slot, pixels)
        self.kept[slot] = True

    @abstractmethod
    def keep(self, slot: int, pixels: np.ndarray) -> None:
        """Process an image of the expected size."""


class _Pixels(ImageSink):
    """Writes images into one array; gaps of missing images are removed at the end."""

    images: np.ndarray

    def keep(self, slot: int, pixels: np.ndarray) -> None:
        """Write an image into the array."""
        if not self.kept.any():
            require_memory((self.count, *pixels.shape))
            self.images = np.empty((self.count, *pixels.shape), np.uint8)
        self.images[slot] = pixels

    def finish(self) -> DecodedImages:
        """Remove the gaps, and reduce grey images to one channel unless the recipe sets ``channels``."""
        images = torch.from_numpy(self.images)
        if self.failures:
            images = images[self.kept]
        if self.recipe.channels is None and is_grey(images):
            images = images[:, :1].contiguous()
        return DecodedImages(images, self.kept, tuple(self.failures), self.hashes)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]}x{shape[-2]}"


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
