"""Finding test images that are also training images, or nearly, as in some self-made sets, CIFAR-10 and CIFAR-100.

Duplicates are reported, never removed: the owner of the data set decides its splits. A model's card keeps a sketch of
its training images, so that the same can be found for data that it meets later, wherever they lie.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

MOST_EXAMPLES = 5
MOST_SEEN = 0.05  # share of test images that may be training images of a given model; photographs repeat
SKETCHED = 256
NEAR = 0.96  # correlation of thumbnails; of 97 pairs above it in CIFAR-10 and flowers, 96 show one photograph
LEAST_NEAR_PX = 32  # smaller images of different things look alike
MOST_PAIRS = 1_000_000_000  # to compare, in some ten seconds
_THUMBNAIL_PX = 16
_MOST_VALUES = 2**24  # in memory at once, as float32


@dataclass(frozen=True)
class Duplicates:
    """Test images with the pixels of a training image, or nearly.

    Attributes:
        count: Number of test images.
        examples: Names of a few of them, each with the name of an equal training image.
        near: Whether they only look alike.
    """

    count: int = 0
    examples: tuple[tuple[str, str], ...] = ()
    near: bool = False

    def sentence(self) -> str:
        """Return one sentence without a full stop; ``count`` must not be 0."""
        test, train = self.examples[0]
        images = "image is" if self.count == 1 else "images are"
        if self.near:
            images = "image nearly equals" if self.count == 1 else "images nearly equal"
            return (
                f"{self.count} test {images} a training image, such as '{test}' and '{train}': nothing was "
                "removed, so accuracies may be too high"
            )
        return (
            f"{self.count} test {images} also among the training images, such as '{test}' (as '{train}'): nothing was "
            "removed, so accuracies may be too high"
        )


def pixel_hashes(images: UInt8[np.ndarray, "n channels height width"]) -> Int64[np.ndarray, " n"]:
    """Return a 64-bit hash (BLAKE2b) of the pixels of each image, for comparing images of one height and width.

    A grey image has the same hash in one channel as in three.
    """
    grey = (images == images[:, :1]).all(axis=(1, 2, 3))
    kept = (image[:1] if is_grey else image for image, is_grey in zip(images, grey, strict=True))
    digests = b"".join(blake2b(image.tobytes(), digest_size=8).digest() for image in kept)
    return np.frombuffer(digests, np.int64)


def find_duplicates(train: Int64[Tensor, " train"], test: Int64[Tensor, " test"]) -> Int64[Tensor, "pairs 2"]:
    """Return the place of each test image with the hash of a training image, and the place of the first such image."""
    if not len(train):
        return torch.zeros(0, 2, dtype=torch.int64)
    ordered, places = train.sort(stable=True)
    nearest = torch.searchsorted(ordered, test).clamp(max=len(train) - 1)
    found = (ordered[nearest] == test).nonzero().flatten()
    return torch.stack([found, places[nearest[found]]], dim=1)


def copies_in_validation(
    train: Int64[Tensor, " train"], validation: Int64[Tensor, " validation"], test: Int64[Tensor, " test"]
) -> Iterator[str]:
    """Yield a sentence for validation images with the hash of a test image, and for those of a training image."""
    effects = (
        ("test", test, "the winner is chosen on images that it is tested on"),
        ("training", train, "validation accuracies may be too high, and the winner is chosen by them"),
    )
    for name, hashes, effect in effects:
        count = int(torch.isin(validation, hashes).sum())
        if count:
            images = "image is" if count == 1 else "images are"
            yield f"{count} validation {images} also among the {name} images: {effect}"


def find_near_duplicates(
    train: UInt8[Tensor, "train channels _ _"], test: UInt8[Tensor, "test channels _ _"]
) -> Int64[Tensor, "pairs 2"]:
    """Return the place of each test image that looks like a training image, and the place of the one most like it.

    Two images look alike where their thumbnails, without the mean of each channel, correlate by more than ``NEAR``:
    copies of another size or JPEG quality, or with a small mark. Mirrored, turned and cropped copies are not found.
    """
    if not len(train) or not len(test):
        return torch.zeros(0, 2, dtype=torch.int64)
    looked_for = torch.cat([_thumbnails(some) for some in test.split(_most_images(test))])
    best, places = torch.zeros(len(test)), torch.zeros(len(test), dtype=torch.int64)
    size = max(1, min(_most_images(train), _MOST_VALUES // len(test)))
    for start in range(0, len(train), size):
        likeness, nearest = (looked_for @ _thumbnails(train[start : start + size]).T).max(dim=1)
        places = torch.where(likeness > best, start + nearest, places)
        best = torch.maximum(best, likeness)
    found = (best > NEAR).nonzero().flatten()
    return torch.stack([found, places[found]], dim=1)


def _most_images(images: UInt8[Tensor, "n channels height width"]) -> int:
    """Return how many of these images are turned into float32 at once."""
    return max(1, _MOST_VALUES // max(1, images[0].numel()))


def _thumbnails(images: UInt8[Tensor, "n channels height width"]) -> Float[Tensor, "n values"]:
    """Return small versions of images as vectors of length 1, each channel with a mean of 0; plain images are 0."""
    small = adaptive_avg_pool2d(images.float(), _THUMBNAIL_PX)
    centred = (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > len(centred[0]) ** 0.5, centred / length, 0.0)  # a deviation of 1 of 255


def sketch(train: Int64[Tensor, " train"]) -> str:
    """Return the smallest 256 hashes of training images, as text: a random sample of the images, whatever their order.

    Source: bottom-k sketches (Broder 1997; Cohen and Kaplan 2007).
    """
    return base64.b64encode(train.unique()[:SKETCHED].numpy().tobytes()).decode()


def merge_sketches(texts: Iterable[str]) -> str:
    """Return the sketch of the images of several sketches, which were hashed at one size."""
    return sketch(torch.cat([torch.zeros(0, dtype=torch.int64), *(hashes_of(text) for text in texts)]))


def share_of_sketch(train: Int64[Tensor, " train"], text: str) -> float:
    """Return which share of the images of a sketch are among these; 1 for an empty one."""
    sketched = hashes_of(text)
    return torch.isin(sketched, train).double().mean().item() if len(sketched) else 1.0


def share_in_sketch(test: Int64[Tensor, " test"], text: str) -> float:
    """Estimate which share of test images are among the training images of a sketch; exact for fewer than 256 of those.

    Only test images whose hash would be in the sketch, if they were training images, are counted.
    """
    sketched = hashes_of(text)
    if len(sketched) >= SKETCHED:
        test = test[test <= sketched[-1]]
    return torch.isin(test, sketched).double().mean().item() if len(test) else 0.0


def share_of_tests_seen(
    hashes: Int64[Tensor, " test"],
    test: Int64[Tensor, " test"],
    train: Int64[Tensor, " train"],
    seen: str,
) -> float:
    """Estimate which share of a run's test images a given model was trained on; training images do not count.

    Args:
        hashes: Of the test images as the model takes them.
        test: Of the same images as the run takes them.
        train: Of the run's training images.
        seen: Sketch of the images that the model has learned from.
    """
    return share_in_sketch(hashes[~torch.isin(test, train)], seen)


def how_to_divide(split: Mapping[Any, Any]) -> str:
    """Return the remedy where a model has seen test images, from the fields of ``data`` that divided those."""
    fields = " ".join(f"data.{field}={value}" for field, value in split.items())
    return f"divide the data as for its training ({fields}), or test on other images"


def hashes_of(text: str) -> Int64[Tensor, " sketched"]:
    """Return the hashes of a sketch, in order; raises ValueError for a text that is not a sketch."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), np.int64).copy())
