"""Finding test images that are also training images, by their pixels, as in some self-made sets and in CIFAR-100.

Duplicates are reported, never removed: the owner of the data set decides its splits.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

MOST_EXAMPLES = 5
_CHUNK = 256  # images hashed at a time, so that the copies of wider type stay small


@dataclass(frozen=True)
class Duplicates:
    """Test images with the pixels of a training image.

    Attributes:
        count: Number of test images.
        examples: Names of a few of them, each with the name of an equal training image.
    """

    count: int = 0
    examples: tuple[tuple[str, str], ...] = ()

    def sentence(self) -> str:
        """Return one sentence without a full stop; ``count`` must not be 0."""
        test, train = self.examples[0]
        images = "image is" if self.count == 1 else "images are"
        return (
            f"{self.count} test {images} also among the training images, such as '{test}' (as '{train}'): nothing was "
            "removed, so accuracies may be too high"
        )


def pixel_hashes(images: UInt8[np.ndarray, "n channels height width"]) -> Int64[np.ndarray, " n"]:
    """Return a hash of the pixels of each image, for comparing images of one shape.

    A multilinear hash with random coefficients modulo 2^64 (Carter & Wegman 1979; Lemire & Kaser 2014, "Strongly
    universal string hashing is fast"), over pairs of bytes: two different images collide with a probability of at
    most 2^-49. It is a product of a matrix and a vector, whatever the number of images.
    """
    size = prod(images.shape[1:])
    coefficients = _coefficients((size + 1) // 2)
    padded = np.zeros((min(len(images), _CHUNK), 2 * len(coefficients)), np.uint8)
    hashes = np.empty(len(images), np.uint64)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        padded[: len(chunk), :size] = chunk.reshape(len(chunk), -1)
        hashes[start : start + len(chunk)] = padded[: len(chunk)].view("<u2").astype(np.uint64) @ coefficients
    return hashes.view(np.int64)


@cache
def _coefficients(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, count, dtype=np.uint64)


def find_duplicates(train: Int64[Tensor, " train"], test: Int64[Tensor, " test"]) -> Int64[Tensor, "pairs 2"]:
    """Return the place of each test image with the hash of a training image, and the place of the first such image."""
    if not len(train):
        return torch.zeros(0, 2, dtype=torch.int64)
    ordered, places = train.sort(stable=True)
    nearest = torch.searchsorted(ordered, test).clamp(max=len(train) - 1)
    found = (ordered[nearest] == test).nonzero().flatten()
    return torch.stack([found, places[nearest[found]]], dim=1)
