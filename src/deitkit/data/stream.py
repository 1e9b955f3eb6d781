"""Images that stay encoded and are decoded whenever they are asked for: for data sets that do not fit in memory.

One pass over all of them, whose result is kept on the disk, finds what an epoch must know beforehand: which images can
be decoded, their shape, and how often each value occurs.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from deitkit.data import cache
from deitkit.data.decode import ImageSink, decode_all, decode_image
from deitkit.data.listing import EncodedImages, Progress
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from deitkit.system.process import usable_cores

_FORMAT_VERSION = 2  # of a survey: raise it when decoding changes
_MOST_MEMORY = 0.6  # of what is free, for decoded images


@dataclass(frozen=True)
class FlatFile:
    """Encoded images one after the other in a file, so that any of them can be read at once.

    Attributes:
        path: The file.
        ends: Where each image ends.
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
    """Images of a split, used like the uint8 tensor that they would be: asked for their shape, indexed, and cut.

    Attributes:
        encoded: Files, or their contents.
        positions: Which of them belong to the split, in its order.
        image_shape: Channels, height and width.
        image_px: What they are resized to; None leaves them as they are.
        eval_crops: Of each image: by what ``image_px`` is divided first, before the centre is kept; 1 for training.
        workers: Processes that decode; 0 decodes in this one.
    """

    encoded: Sequence[Path] | FlatFile
    positions: Int64[Tensor, " n"]
    image_shape: tuple[int, int, int]
    image_px: int | None
    eval_crops: Float64[Tensor, " n"]
    workers: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As a tensor's."""
        return (len(self.positions), *self.image_shape)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, some: slice) -> "StreamedImages":
        """Return some of the images, still encoded."""
        return replace(self, positions=self.positions[some], eval_crops=self.eval_crops[some])

    def split(self, sizes: list[int]) -> "list[StreamedImages]":
        """Cut into parts of these sizes, still encoded."""
        ends = np.cumsum(sizes).tolist()
        return [self[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def decode(self, indices: Int64[Tensor, " m"]) -> UInt8[Tensor, "m channels height width"]:
        """Decode some images here and now; DataError if one has gone or has changed since it was surveyed."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # all was said when they were surveyed
            # Repeated augmentation asks for an image several times: it is decoded once.
            decoded = {index: self._decode_one(index) for index in dict.fromkeys(indices.tolist())}
            return torch.from_numpy(np.stack([decoded[index] for index in indices.tolist()]))

    def batches(self, indices: Iterable[Tensor], *, pin: bool = False) -> Iterator[Tensor]:
        """Yield the images of each tensor of indices, decoded ahead by worker processes.

        Args:
            indices: Of each batch; may go on without end.
            pin: Lay batches into memory that a GPU reads while this process goes on.

        Raises:
            DataError: A file has gone or has changed since it was surveyed.
        """
        loader = DataLoader(
            _Decoder(self),
            sampler=indices,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=pin,
            prefetch_factor=2 if self.workers else None,
        )
        for images in loader:
            if isinstance(images, str):
                raise DataError(images)
            yield images

    def _decode_one(self, index: int) -> np.ndarray:
        position = int(self.positions[index])
        try:
            eval_crop = float(self.eval_crops[index])
            pixels = decode_image(self.encoded[position], self.image_shape[0], self.image_px, eval_crop)
        except Exception as error:  # whatever Pillow stumbles over
            raise DataError(f"{self._name(position)} can no longer be decoded ({error}): put it back") from None
        if pixels.shape != self.image_shape:
            raise DataError(f"{self._name(position)} has changed in size while it was used: put it back")
        return pixels

    def _name(self, position: int) -> str:
        if isinstance(self.encoded, FlatFile):
            return f"image {position} of '{self.encoded.path}'"
        return f"'{self.encoded[position]}'"


class _Decoder(torch.utils.data.Dataset[UInt8[Tensor, "m c h w"] | str]):
    """What a worker process does: a batch for a tensor of indices, or a sentence that says why not."""

    def __init__(self, images: StreamedImages) -> None:
        self.images = images

    def __getitem__(self, indices: Int64[Tensor, " m"]) -> UInt8[Tensor, "m c h w"] | str:
        try:
            return self.images.decode(indices)
        except DataError as error:
            return str(error)


@dataclass(frozen=True)
class Survey:
    """What one pass over a selection of images found.

    Attributes:
        images: Those that can be decoded, in the selection's order.
        kept: Which images of the selection these are.
        skipped: Names of the others.
        counts: How often each value occurs in each channel of the training images.
        key: Changes whenever the images may have changed.
        hashes: Of the pixels of each image of the selection, as of ``DecodedImages``.
    """

    images: StreamedImages
    kept: Bool[Tensor, " selected"]
    skipped: tuple[str, ...]
    counts: Int64[Tensor, "channels values"]
    key: str
    hashes: Int64[Tensor, " selected"]


def wants_streaming(images: Tensor | EncodedImages, count: int, recipe: DataRecipe) -> bool:
    """Return whether so many images are to stay encoded: as the recipe says, or where they would fill the memory.

    Raises:
        DataError: They are to stay encoded but come decoded.
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
        except Exception:  # decoding all of them tells what is wrong
            return False
    return count * (recipe.channels or 3) * pixels > _MOST_MEMORY * psutil.virtual_memory().available


def survey(
    encoded: EncodedImages,
    selection: Int64[Tensor, " selected"],
    train_count: int,
    recipe: DataRecipe,
    progress: Progress | None = None,
) -> Survey:
    """Decode the selected images once, keeping none, or take what was found before from the cache.

    Args:
        encoded: Where the images come from.
        selection: Positions of the images that are wanted, in the order in which they are wanted.
        train_count: How many of them, the first ones, are training images.
        recipe: As for ``decode_images``, and the number of workers.
        progress: Called with what is done, how many images are done, and how many there are.

    Raises:
        DataError: As ``decode_images``, or the cache is not writable, where images that are no files are laid out.
    """
    chosen = (encoded.key, cache.sha256(selection), train_count, recipe.image_px, recipe.channels, recipe.corrupt)
    cropped = (recipe.eval_crop,) if recipe.eval_crop < 1 else ()
    key = hashlib.sha256(repr((_FORMAT_VERSION, "survey", *chosen, *cropped)).encode()).hexdigest()
    path = cache.cache_folder() / "encoded" / f"{key}.bin"
    known = cache.load_cached(key)
    if known is None or (encoded.files is None and not path.exists()):
        tally = _Tally(len(selection), train_count, recipe)
        if encoded.files is not None:
            decode_all(encoded.read, encoded.names, selection, recipe, tally, progress, "looking at images")
            ends = torch.zeros(0, dtype=torch.int64)
        else:
            ends = _lay_out(encoded, selection, recipe, tally, progress, path)
        tensors = {"kept": tally.kept.byte(), "counts": tally.counts, "shape": torch.tensor(tally.shape), "ends": ends}
        known = (tensors | {"hashes": tally.hashes}, list(tally.failures))
        cache.store(key, *known)
    tensors, skipped = known
    kept = tensors["kept"].bool()
    counts, channels = tensors["counts"], recipe.channels or int(tensors["shape"][0])
    _, height, width = tensors["shape"].tolist()
    # A flat file holds the images in ascending order of their positions, whatever the selection's.
    where = selection if encoded.files is not None else selection.argsort().argsort()
    workers = usable_cores() if recipe.workers is None else recipe.workers
    eval_crops = torch.full((len(selection),), recipe.eval_crop, dtype=torch.float64)
    eval_crops[:train_count] = 1
    images = StreamedImages(
        encoded.files if encoded.files is not None else FlatFile(path, tensors["ends"]),
        where[kept],
        (channels, height, width),
        recipe.image_px,
        eval_crops[kept],
        workers,
    )
    return Survey(images, kept, tuple(skipped), counts[:channels], key, tensors["hashes"])


def _lay_out(
    encoded: EncodedImages,
    selection: Tensor,
    recipe: DataRecipe,
    tally: "_Tally",
    progress: Progress | None,
    path: Path,
) -> Tensor:
    """Survey images that are no files, and write them one after the other into one."""
    ends: list[int] = []

    def copied(file: BinaryIO, positions: list[int]) -> Iterator[Path | bytes]:
        for image in encoded.read(positions):
            assert isinstance(image, bytes)
            file.write(image)
            ends.append(file.tell())
            yield image

    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            read = lambda positions: copied(file, positions)  # noqa: E731
            decode_all(read, encoded.names, selection, recipe, tally, progress, "looking at images")
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"'{path.parent}' cannot be written ({error}), and streaming lays images out there: set DEITKIT_CACHE to a "
            "folder with room for the data set, or data.streaming=false"
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

    def keep(self, slot: int, pixels: np.ndarray) -> None:
        """Count the values of a training image, and look whether all its channels are equal."""
        if slot < self.train_count:
            for counts, channel in zip(self.channel_counts, pixels):
                counts += np.bincount(channel.reshape(-1), minlength=256)
        self.grey = self.grey and bool((pixels == pixels[:1]).all())

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width; one channel if all images are grey and nothing else was asked for."""
        _, height, width = self.pixel_shape
        return (1 if self.grey else self.pixel_shape[0], height, width)

    @property
    def counts(self) -> Tensor:
        """How often each value occurs in each channel."""
        return torch.from_numpy(self.channel_counts[: self.shape[0]])
