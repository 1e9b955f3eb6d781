"""Where every random number comes from: a seed derived from names, never a state that has to be saved.

A step's draws depend on the run's seed, the epoch and the step alone. So a run that was stopped continues with the
same numbers, and a student draws the same numbers whether it trains alone or beside others.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2^63) for one purpose, independent of all other names."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derived_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seed the CPU's global generator for the block, for code that draws from nothing else, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derived_seed(seed, *names))
        yield
