"""The survey of images that are streamed: one pass over all of them, whose result is cached on the disk.

It finds what an epoch needs beforehand: which images can be decoded, their shape, and the counts of their values.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from deitkit.data import cache
from deitkit.data.decode import decode_image
from deitkit.data.decode_many import DecodedImage, ImageSink, decode_all
from deitkit.data.listing import EncodedImages, ProgressCallback
from deitkit.data.stream import FlatFile, StreamedImages
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from deitkit.system.process import processes_here, usable_cores

# Of ``Survey.key``, by which `verify` knows the data of earlier runs, and of cached surveys: raise the latter when
# decoding changes.
_VERSIONS = (5, 6)
_MOST_MEMORY = 0.45  # share of the free memory, for decoded images, which are copied once while the cache is written


@dataclass(frozen=True)
class Survey:
    """The result of one pass over a selection of images.

    Attributes:
        images: The images that can be decoded, in the selection's order.
        kept: Which images of the selection these are.
        skipped: Names of the others.
        counts: Counts of the 256 values in each channel of the training images.
        key: Changes whenever the images may have changed.
        hashes: Pixel hash of each image of the selection, as in ``DecodedImages``.
        sizes: Height and width by which random crops of each image of the selection are drawn.
    """

    images: StreamedImages
    kept: Bool[Tensor, " selected"]
    skipped: tuple[str, ...]
    counts: Int64[Tensor, "channels values"]
    key: str
    hashes: Int64[Tensor, " selected"]
    sizes: Int64[Tensor, "selected 2"]


def wants_streaming(
    images: Tensor | EncodedImages, count: int, recipe: DataRecipe, larger: tuple[int, int] = (0, 0)
) -> bool:
    """Return whether ``count`` images are streamed: as set by the recipe, or if decoded they would fill the memory.

    Args:
        images: All images of the data set.
        count: Number of images that are needed.
        recipe: ``streaming``, ``image_px``, ``channels``.
        larger: Number and side of the images that are kept in another size too.

    Raises:
        DataError: The recipe sets streaming, but the images are already decoded.
    """
    if isinstance(images, Tensor):
        if recipe.streaming is True:
            raise DataError(
                f"data.streaming=true, but data.name={recipe.name} fits in memory and is kept there: drop it"
            )
        return False
    if recipe.streaming != "auto":
        return recipe.streaming is True  # those without labels are asked for with True
    if recipe.image_px is not None:
        pixels = recipe.image_px**2
    else:
        try:
            pixels = decode_image(next(iter(images.read([0]))), 1).size
        except Exception:  # decoding all images reports the error
            return False
    pixels = count * pixels + larger[0] * larger[1] ** 2
    return (recipe.channels or 3) * pixels > _MOST_MEMORY * psutil.virtual_memory().available / processes_here()


def survey(
    encoded: EncodedImages,
    selection: Int64[Tensor, " selected"],
    train_count: int,
    recipe: DataRecipe,
    progress: ProgressCallback | None = None,
) -> Survey:
    """Decode the selected images once, keeping none, or read the result of an earlier survey from the cache.

    Args:
        encoded: All images of the data set.
        selection: Positions of the images, in the order of the result.
        train_count: Number of training images, which come first.
        recipe: As for ``decode_images``, and the number of workers.
        progress: Called with the stage, the number of images done, and their total number.

    Raises:
        DataError: As ``decode_images``; or images are not files and cannot be written to the cache folder.
    """
    keys = zip(_VERSIONS, (encoded.key, encoded.cache_key), strict=True)
    key, stored_as = (_key(version, of_files, selection, train_count, recipe) for version, of_files in keys)
    # What is written of the images is the same for every division, size and order of them.
    flat = hashlib.sha256(repr((encoded.cache_key, cache.sha256(selection.sort().values))).encode()).hexdigest()
    path = cache.cache_folder() / "encoded" / f"{flat}.bin"
    cached = cache.load_cached(stored_as)
    written = None if encoded.files is not None else _laid_out(path, flat)
    if cached is None or (encoded.files is None and written is None):
        tally = _Tally(len(selection), train_count, recipe)
        if encoded.files is not None or written is not None:
            decode_all(encoded.read, encoded.names, selection, recipe, tally, progress, "checking images")
            ends = torch.zeros(0, dtype=torch.int64) if written is None else written[0]["ends"]
        else:
            ends = _lay_out(encoded, selection, recipe, tally, progress, path)
            cache.store(flat, {"ends": ends}, [])
        tensors = {"kept": tally.kept.byte(), "counts": tally.counts, "shape": torch.tensor(tally.shape), "ends": ends}
        cached = (tensors | {"hashes": tally.hashes, "sizes": tally.sizes}, list(tally.failures))
        if not tally.may_pass:
            cache.store(stored_as, *cached)
    tensors, skipped = cached
    kept = tensors["kept"].bool()
    counts, channels = tensors["counts"], recipe.channels or int(tensors["shape"][0])
    _, height, width = tensors["shape"].tolist()
    # A flat file contains the images in ascending order of their positions, whatever the selection's order.
    where = selection if encoded.files is not None else selection.argsort().argsort()
    workers = max(1, usable_cores() // processes_here()) if recipe.workers is None else recipe.workers
    eval_crops = torch.full((len(selection),), recipe.eval_crop, dtype=torch.float64)
    eval_crops[:train_count] = 1
    images = StreamedImages(
        encoded.files if encoded.files is not None else FlatFile(path, tensors["ends"]),
        where[kept],
        (channels, height, width),
        recipe.image_px,
        eval_crops[kept],
        workers,
        recipe.fit,
    )
    return Survey(images, kept, tuple(skipped), counts[:channels], key, tensors["hashes"], tensors["sizes"])


def _laid_out(path: Path, key: str) -> tuple[dict[str, Tensor], list[str]] | None:
    """Return what is stored of a flat file; None unless it is whole."""
    found = cache.load_cached(key) if path.exists() else None
    ends = None if found is None else found[0]["ends"]
    is_whole = ends is not None and path.stat().st_size == (int(ends[-1]) if len(ends) else 0)
    return found if is_whole else None


def _key(version: int, of_files: str, selection: Tensor, train_count: int, recipe: DataRecipe) -> str:
    chosen = (of_files, cache.sha256(selection), train_count, recipe.image_px, recipe.channels, recipe.corrupt)
    cropped: tuple[float | str, ...] = (recipe.eval_crop,) if recipe.eval_crop < 1 else ()
    cropped += (recipe.fit,) if recipe.fit != "crop" else ()
    return hashlib.sha256(repr((version, "survey", *chosen, *cropped)).encode()).hexdigest()


def _lay_out(
    encoded: EncodedImages,
    selection: Tensor,
    recipe: DataRecipe,
    tally: "_Tally",
    progress: ProgressCallback | None,
    path: Path,
) -> Tensor:
    """Survey images that are not files, and write them into a flat file; return the ends."""
    ends: list[int] = []

    def copied(file: BinaryIO, positions: list[int]) -> Iterator[Path | bytes]:
        for image in encoded.read(positions):
            assert isinstance(image, bytes)
            file.write(image)
            ends.append(file.tell())
            yield image

    temporary = path.with_suffix(f".{uuid4().hex}.tmp")  # other processes may do the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            read = lambda positions: copied(file, positions)  # noqa: E731
            decode_all(read, encoded.names, selection, recipe, tally, progress, "checking images")
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"'{path.parent}' cannot be written ({error}), but streaming stores images there: set DEITKIT_CACHE to a "
            "folder with space for the data set, or data.streaming=false"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return torch.tensor(ends)


class _Tally(ImageSink):
    """Counts values instead of keeping images."""

    def __init__(self, count: int, train_count: int, recipe: DataRecipe) -> None:
        super().__init__(count, train_count, recipe)
        self.grey = recipe.channels is None
        self.channel_counts = np.zeros((3, 256), np.int64)

    def keep(self, slot: int, decoded: DecodedImage) -> None:
        """Count the values of a training image, and check whether all channels of the image are equal."""
        pixels = decoded.pixels
        if slot < self.train_count:
            for counts, channel in zip(self.channel_counts, pixels):
                counts += np.bincount(channel.reshape(-1), minlength=256)
        self.grey = self.grey and bool((pixels == pixels[:1]).all())

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width; one channel if all images are grey and the recipe does not set ``channels``."""
        _, height, width = self.pixel_shape
        return (1 if self.grey else self.pixel_shape[0], height, width)

    @property
    def counts(self) -> Tensor:
        """Counts of the 256 values in each channel."""
        return torch.from_numpy(self.channel_counts[: self.shape[0]])
