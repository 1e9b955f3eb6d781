"""Random numbers from seeds derived by name, so that no generator state has to be saved.

The random numbers of a step depend only on the run's seed, the epoch and the step. A resumed run therefore continues
with the same numbers, and a student draws the same numbers alone as in a cohort.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor


def derived_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2^63) for one purpose, independent of the seeds under all other names."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derived_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


def fixed_shuffle(count: int) -> Int64[Tensor, " {count}"]:
    """Return 0 to ``count - 1`` in random order, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seed the CPU's global generator inside the block, for code that takes no generator; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derived_seed(seed, *names))
        yield
