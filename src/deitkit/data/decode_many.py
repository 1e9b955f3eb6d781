"""Decoding a selection of the images of a data set, on all cores, into memory or into a sink of another kind."""

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import UnidentifiedImageError
from torch import Tensor

from deitkit.data import cache
from deitkit.data.decode import as_array, decode_image, open_image, resize_and_crop, size_for_crops, strict_pillow
from deitkit.data.duplicates import pixel_hashes
from deitkit.data.listing import EncodedImages, ProgressCallback
from deitkit.data.pixels import evaluation_frame, is_grey, require_memory
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe

_FORMAT_VERSION = 5  # of cached images: raise it when decoding changes
# Errors of reading that last, or whose mending is noticed: of Pillow itself, a file that is gone, a link to itself.
LASTING = (None, errno.ENOENT, errno.ELOOP)
_WINDOW = 256  # encoded images in memory at a time
_GAP_ROWS = 256  # images that are moved at a time


@dataclass(frozen=True)
class DecodedImages:
    """The decoded images of a selection, in its order.

    Attributes:
        images: Pixels of the images that could be decoded.
        kept: Which images of the selection these are.
        skipped: Names of the others.
        hashes: Pixel hash of each image of the selection, cropped like a training image; 0 if skipped.
        larger: The training images at ``train_px``, for random crops; None if these are cut from ``images``.
        sizes: Height and width by which random crops of each image of the selection are drawn.
    """

    images: UInt8[Tensor, "kept channels height width"]
    kept: Bool[Tensor, " selected"]
    skipped: tuple[str, ...]
    hashes: Int64[Tensor, " selected"]
    larger: UInt8[Tensor, "train channels train_px train_px"] | None = None
    sizes: Int64[Tensor, "selected 2"] | None = None


@dataclass(frozen=True)
class DecodedImage:
    """One image of a selection.

    Attributes:
        pixels: At the size of the recipe.
        pixel_hash: Of the pixels, cropped like a training image.
        size: Height and width by which random crops are drawn.
        larger: The pixels at ``train_px``; None where they are not kept.
    """

    pixels: UInt8[np.ndarray, "channels height width"]
    pixel_hash: int
    size: tuple[int, int]
    larger: UInt8[np.ndarray, "channels train_px train_px"] | None


def decode_images(
    encoded: EncodedImages,
    selection: Int64[Tensor, " selected"],
    recipe: DataRecipe,
    progress: ProgressCallback | None = None,
    *,
    train_count: int | None = None,
    train_px: int | None = None,
) -> DecodedImages:
    """Decode the selected images on all cores, or take them from the cache.

    Args:
        encoded: All images of the data set.
        selection: Positions of the images to decode, in the order of the result.
        recipe: ``image_px``, ``eval_crop``, ``channels`` (None: 1 if every image is grey, else 3) and ``corrupt``.
        progress: Called with the stage, the number of images done, and their total number.
        train_count: Number of training images, which come first and to which ``eval_crop`` does not apply; None for
            all.
        train_px: Keep the training images at this side too, whole, for random crops; None keeps them at ``image_px``.

    Raises:
        DataError: Sizes differ and ``image_px`` is not set, the pixels do not fit in memory, no image can
            be decoded, or one cannot and ``corrupt`` is "error".
    """
    train_count = len(selection) if train_count is None else train_count
    parts = (
        _FORMAT_VERSION,
        encoded.cache_key,
        cache.sha256(selection),
        recipe.image_px,
        recipe.channels,
        recipe.corrupt,
    )
    cropped: tuple[int | float | str, ...] = (train_count, recipe.eval_crop) if recipe.eval_crop < 1 else ()
    cropped += (recipe.fit,) if recipe.fit != "crop" else ()
    cropped += (train_count, "train_px", train_px) if train_px is not None else ()
    key = hashlib.sha256(repr(parts + cropped).encode()).hexdigest()
    cached = cache.load_cached(key)
    if cached is not None:
        tensors, names = cached
        tensors["kept"] = tensors["kept"].bool()
        return DecodedImages(**tensors, skipped=tuple(names))
    target = _Pixels(len(selection), train_count, recipe, train_px)
    decode_all(encoded.read, encoded.names, selection, recipe, target, progress, "decoding images")
    decoded = target.finish()
    tensors = {"images": decoded.images, "kept": decoded.kept.byte(), "hashes": decoded.hashes}
    if decoded.larger is not None and decoded.sizes is not None:
        tensors |= {"larger": decoded.larger, "sizes": decoded.sizes}
    if not target.may_pass:
        cache.store(key, tensors, list(decoded.skipped))
    return decoded


def decode_all(
    read: Callable[[list[int]], Iterator[Path | bytes]],
    names: Sequence[str],
    selection: Int64[Tensor, " selected"],
    recipe: DataRecipe,
    target: "ImageSink",
    progress: ProgressCallback | None,
    what: str,
) -> None:
    """Decode the selected images on all cores, in ascending order of their positions, and put them into the target.

    Raises:
        DataError: No image can be decoded, or the target refused one.
    """

    def attempt(image: Path | bytes, slot: int) -> DecodedImage | str:
        try:
            return _decode_one(image, recipe, is_train=slot < target.train_count, train_px=target.train_px)
        except UnidentifiedImageError:
            return "not an image in a supported format"
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plug-ins raise many types for damaged files
            if isinstance(error, OSError) and error.errno not in LASTING:
                target.may_pass = True
            return str(error) or type(error).__name__

    slots = selection.argsort().tolist()
    positions = selection[slots].tolist()
    images = read(positions)
    with strict_pillow(), ThreadPoolExecutor() as pool:
        for start in range(0, len(positions), _WINDOW):
            window = pool.map(attempt, islice(images, _WINDOW), slots[start : start + _WINDOW])
            for offset, decoded in enumerate(window, start):
                target.put(slots[offset], names[positions[offset]], decoded)
            if progress is not None:
                progress(what, min(start + _WINDOW, len(positions)), len(positions))
    if not target.kept.any():
        name, reason = next(iter(target.failures.items()))
        raise DataError(
            f"none of the {len(positions)} images of data.name={recipe.name} can be decoded, such as '{name}' "
            f"({reason}): check the path, or download the data set again"
        )


def _decode_one(image: Path | bytes, recipe: DataRecipe, *, is_train: bool, train_px: int | None) -> DecodedImage:
    """Decode an image of a selection: at the size of the recipe and, to train on, at ``train_px`` unless that is None.

    Whatever else is kept, pixels and hash are those of ``decode_image``, so that equal files have equal ones.
    """
    channels, image_px, fit = recipe.channels or 3, recipe.image_px, recipe.fit
    eval_crop = 1.0 if is_train else recipe.eval_crop
    opened = open_image(image, channels, None if image_px is None else 2 * evaluation_frame(image_px, eval_crop)[0])
    pixels = whole = as_array(opened.image if image_px is None else resize_and_crop(opened, image_px, eval_crop, fit))
    if eval_crop < 1:  # hash the image as cropped for training, so that duplicates of training images are found
        whole = decode_image(image, channels, image_px, fit=fit)
    larger = None
    if is_train and train_px is not None:
        source = open_image(image, channels, 2 * train_px) if opened.reduced else opened
        larger = as_array(resize_and_crop(source, train_px, 1.0, "pad" if fit == "pad" else "squash"))
    return DecodedImage(pixels, int(pixel_hashes(whole[None])[0]), size_for_crops(opened.size, fit), larger)


class ImageSink(ABC):
    """Receives decoded images one by one, and refuses images of different sizes."""

    def __init__(self, count: int, train_count: int, recipe: DataRecipe, train_px: int | None = None) -> None:
        self.count, self.train_count, self.recipe, self.train_px = count, train_count, recipe, train_px
        self.sizes = torch.zeros(count, 2, dtype=torch.int64)
        self.pixel_shape: tuple[int, ...] = ()
        self.first_name = ""
        self.kept = torch.zeros(count, dtype=torch.bool)
        self.hashes = torch.zeros(count, dtype=torch.int64)
        self.failures: dict[str, str] = {}
        self.may_pass = False  # whether an image could not be read for a reason that is not the file's, as of a disk

    def put(self, slot: int, name: str, decoded: DecodedImage | str) -> None:
        """Receive an image, or the reason why it could not be decoded."""
        if isinstance(decoded, str):
            if self.recipe.corrupt == "error":
                raise DataError(f"'{name}' cannot be decoded ({decoded}): remove it or set data.corrupt=skip")
            self.failures[name] = decoded
            return
        shape = decoded.pixels.shape
        if not self.pixel_shape:
            self.pixel_shape, self.first_name = shape, name
        if shape != self.pixel_shape:
            raise DataError(
                f"the images differ in size, such as '{self.first_name}' ({_size(self.pixel_shape)}) and '{name}' "
                f"({_size(shape)}): set data.image_px, for example data.image_px={min(self.pixel_shape[-2:])}"
            )
        self.keep(slot, decoded)
        self.hashes[slot], self.sizes[slot] = decoded.pixel_hash, torch.tensor(decoded.size)
        self.kept[slot] = True

    @abstractmethod
    def keep(self, slot: int, decoded: DecodedImage) -> None:
        """Process an image of the expected size."""


class _Pixels(ImageSink):
    """Writes images into arrays; gaps of missing images are removed at the end."""

    images: np.ndarray
    larger: np.ndarray | None = None

    def keep(self, slot: int, decoded: DecodedImage) -> None:
        """Write an image into the arrays."""
        if not self.kept.any():
            self._allocate(decoded.pixels.shape)
        self.images[slot] = decoded.pixels
        if self.larger is not None and decoded.larger is not None:
            self.larger[slot] = decoded.larger

    def _allocate(self, shape: tuple[int, ...]) -> None:
        side = self.train_px or 0
        larger = (self.train_count, shape[0], side, side)
        require_memory((self.count, *shape), larger)
        self.images = np.empty((self.count, *shape), np.uint8)
        if side:
            self.larger = np.empty(larger, np.uint8)

    def finish(self) -> DecodedImages:
        """Remove the gaps, and reduce grey images to one channel unless the recipe sets ``channels``."""
        images = torch.from_numpy(close_gaps(self.images, self.kept.numpy()))
        larger = None
        if self.larger is not None:
            larger = torch.from_numpy(close_gaps(self.larger, self.kept[: self.train_count].numpy()))
        if self.recipe.channels is None and is_grey(images):
            images = images[:, :1].contiguous()
            larger = None if larger is None else larger[:, :1].contiguous()
        sizes = None if larger is None else self.sizes
        return DecodedImages(images, self.kept, tuple(self.failures), self.hashes, larger, sizes)


def close_gaps(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the kept rows of an array, moved to its beginning in place: a copy of all may not fit in memory."""
    places = np.flatnonzero(kept)
    if len(places) < len(rows):
        for start in range(0, len(places), _GAP_ROWS):
            some = places[start : start + _GAP_ROWS]
            rows[start : start + len(some)] = rows[some]
    return rows[: len(places)]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]}x{shape[-2]}"
