"""Streaming: images stay encoded and are decoded when needed, for data sets that do not fit in memory.

A survey, one pass over all images whose result is cached on the disk, finds what an epoch needs beforehand: which
images can be decoded, their shape, and the counts of their values.
"""

import hashlib
import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from deitkit.data import cache
from deitkit.data.decode import decode_crops, decode_image
from deitkit.data.decode_many import DecodedImage, ImageSink, decode_all
from deitkit.data.listing import EncodedImages, Progress
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from deitkit.system.process import processes_here, usable_cores

_FORMAT_VERSION = 5  # of a survey: raise it when decoding changes
_MOST_MEMORY = 0.6  # share of the free memory, for decoded images
MOST_SHARED = 0.5  # share of the free shared memory, for parts of batches
PARTS_AHEAD = 4  # of each worker
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has it; containers often have 64 MiB of it


@dataclass(frozen=True)
class FlatFile:
    """Encoded images concatenated in a file, for random access.

    Attributes:
        path: The file.
        ends: Offset of the end of each image, in bytes.
    """

    path: Path
    ends: Int64[Tensor, " n"]

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) if index else 0
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(int(self.ends[index]) - start)


@dataclass(frozen=True)
class StreamedImages:
    """Images of a split, with the part of a uint8 tensor's interface that is used: shape, indexing, splitting.

    Attributes:
        encoded: Files, or their contents.
        positions: Which of them belong to the split, in its order.
        image_shape: Channels, height and width.
        image_px: Side to resize to; None for no resizing.
        eval_crops: For each image, the divisor of ``image_px`` before the centre is kept; 1 for training.
        workers: Processes that decode; 0 decodes in this one.
        fit: How an image becomes square, as for ``decode_image``.
    """

    encoded: Sequence[Path] | FlatFile
    positions: Int64[Tensor, " n"]
    image_shape: tuple[int, int, int]
    image_px: int | None
    eval_crops: Float64[Tensor, " n"]
    workers: int
    fit: str = "crop"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, channels, height and width, like a tensor's shape."""
        return (len(self.positions), *self.image_shape)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, some: slice | Bool[Tensor, " n"]) -> "StreamedImages":
        """Return some of the images, still encoded."""
        return replace(self, positions=self.positions[some], eval_crops=self.eval_crops[some])

    def split(self, sizes: list[int]) -> "list[StreamedImages]":
        """Split into parts of these sizes, still encoded."""
        ends = np.cumsum(sizes).tolist()
        return [self[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def decode(self, indices: Int64[Tensor, " m"]) -> UInt8[Tensor, "m channels height width"]:
        """Decode some images in this process; raise DataError if one is missing or has changed since the survey."""
        # Under repeated augmentation an index occurs several times: decode the image once.
        decoded = {index: self._decode_one(index) for index in dict.fromkeys(indices.tolist())}
        return torch.from_numpy(np.stack([decoded[index] for index in indices.tolist()]))

    def crops(
        self, indices: Int64[Tensor, " m"], shares: Float64[Tensor, "4 m"]
    ) -> UInt8[Tensor, "m channels height width"]:
        """Decode some images in this process, and cut a box from each image's own pixels, as ``decode_crops`` does."""
        assert self.image_px is not None
        channels, image_px = self.image_shape[0], self.image_px
        cut = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        for index in indices.unique().tolist():
            places = (indices == index).nonzero().flatten()
            decode = partial(
                decode_crops, channels=channels, image_px=image_px, shares=shares[:, places].numpy(), fit=self.fit
            )
            cut[places] = torch.from_numpy(self._read(index, decode))
        return cut

    def batches(
        self, indices: Iterable[Tensor | tuple[Tensor, Tensor]], *, pin: bool = False
    ) -> Iterator[UInt8[Tensor, "m channels height width"]]:
        """Yield the images of each tensor of indices, decoded ahead by worker processes.

        Workers send parts of a batch through shared memory, small enough that all parts ahead fill a share of it.

        Args:
            indices: Of each batch, with the shares of ``crops`` to cut these; may be endless.
            pin: Use pinned memory, from which a GPU copies asynchronously.

        Raises:
            DataError: A file is missing or has changed since the survey.
        """
        sizes: deque[int] = deque()  # of the batches that are being decoded
        loader = DataLoader(
            _Decoder(self),
            sampler=self._parts(indices, sizes),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PARTS_AHEAD if self.workers else None,
        )
        batch, filled = torch.empty(0), 0
        for images in loader:
            if isinstance(images, str):
                raise DataError(images)
            if filled == 0:
                batch = torch.empty((sizes[0], *images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
            batch[filled : filled + len(images)] = images
            filled += len(images)
            if filled == sizes[0]:
                sizes.popleft()
                filled = 0
                yield batch

    def _parts(
        self, indices: Iterable[Tensor | tuple[Tensor, Tensor]], sizes: deque[int]
    ) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Yield batches of indices (with their crops) in parts, and append the size of each batch to ``sizes``."""
        for wanted in indices:
            some = wanted if isinstance(wanted, Tensor) else wanted[0]
            sizes.append(len(some))
            most, start = self._part_size(len(some)), 0
            while start < len(some):
                end = min(start + most, len(some))
                while end < len(some) and some[end] == some[end - 1]:
                    end += 1  # crops of one image are cut by one worker, which decodes it once
                part, start = slice(start, end), end
                yield some[part] if isinstance(wanted, Tensor) else (some[part], wanted[1][:, part])

    def _part_size(self, batch: int) -> int:
        """Return how many images of a batch a worker decodes at once."""
        if self.workers == 0:
            return batch
        room = int(MOST_SHARED * free_shared_memory() / (self.workers * PARTS_AHEAD * processes_here()))
        fair = -(-batch // self.workers)  # so that all workers share the first batch
        return max(1, min(fair, room // math.prod(self.image_shape)))

    def _decode_one(self, index: int) -> np.ndarray:
        eval_crop = float(self.eval_crops[index])
        pixels = self._read(
            index, lambda image: decode_image(image, self.image_shape[0], self.image_px, eval_crop, self.fit)
        )
        if pixels.shape != self.image_shape:
            name = self._name(int(self.positions[index]))
            raise DataError(f"{name} has changed in size during the run: put it back")
        return pixels

    def _read(self, index: int, decode: Callable[[Path | bytes], np.ndarray]) -> np.ndarray:
        position = int(self.positions[index])
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # the survey has reported everything
                return decode(self.encoded[position])
        except Exception as error:  # Pillow raises many types
            raise DataError(f"{self._name(position)} can no longer be decoded ({error}): put it back") from None

    def _name(self, position: int) -> str:
        if isinstance(self.encoded, FlatFile):
            return f"image {position} of '{self.encoded.path}'"
        return f"'{self.encoded[position]}'"


class _Decoder(torch.utils.data.Dataset[UInt8[Tensor, "m c h w"] | str]):
    """The data set of a worker process: maps indices, and perhaps boxes, to a batch, or to the message of an error."""

    def __init__(self, images: StreamedImages) -> None:
        self.images = images

    def __getitem__(
        self, wanted: Int64[Tensor, " m"] | tuple[Int64[Tensor, " m"], Float64[Tensor, "4 m"]]
    ) -> UInt8[Tensor, "m c h w"] | str:
        try:
            return self.images.decode(wanted) if isinstance(wanted, Tensor) else self.images.crops(*wanted)
        except DataError as error:
            return str(error)


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


def free_shared_memory() -> int:
    """Return how many bytes worker processes can send; without a limit of its own, the free memory."""
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).free
    return psutil.virtual_memory().available


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
        return recipe.streaming
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
    progress: Progress | None = None,
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
    chosen = (encoded.key, cache.sha256(selection), train_count, recipe.image_px, recipe.channels, recipe.corrupt)
    cropped: tuple[float | str, ...] = (recipe.eval_crop,) if recipe.eval_crop < 1 else ()
    cropped += (recipe.fit,) if recipe.fit != "crop" else ()
    key = hashlib.sha256(repr((_FORMAT_VERSION, "survey", *chosen, *cropped)).encode()).hexdigest()
    path = cache.cache_folder() / "encoded" / f"{key}.bin"
    cached = cache.load_cached(key)
    if cached is None or (encoded.files is None and not path.exists()):
        tally = _Tally(len(selection), train_count, recipe)
        if encoded.files is not None:
            decode_all(encoded.read, encoded.names, selection, recipe, tally, progress, "checking images")
            ends = torch.zeros(0, dtype=torch.int64)
        else:
            ends = _lay_out(encoded, selection, recipe, tally, progress, path)
        tensors = {"kept": tally.kept.byte(), "counts": tally.counts, "shape": torch.tensor(tally.shape), "ends": ends}
        cached = (tensors | {"hashes": tally.hashes, "sizes": tally.sizes}, list(tally.failures))
        cache.store(key, *cached)
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


def _lay_out(
    encoded: EncodedImages,
    selection: Tensor,
    recipe: DataRecipe,
    tally: "_Tally",
    progress: Progress | None,
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
