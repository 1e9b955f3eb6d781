"""Streaming: images stay encoded and are decoded when needed, for data sets that do not fit in memory."""

import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from deitkit.data.decode import decode_crops, decode_image
from deitkit.errors import DataError
from deitkit.system.process import processes_here

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
    ) -> Generator[UInt8[Tensor, "m channels height width"], None, None]:
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
            generator=torch.Generator(),  # else it draws from the caller's
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


def free_shared_memory() -> int:
    """Return how many bytes worker processes can send; without a limit of its own, the free memory."""
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).free
    return psutil.virtual_memory().available
