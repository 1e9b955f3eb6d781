"""Epochs of batches from a split that is resident in memory: shuffled by seed and epoch, and nothing else.

Batch ``step`` of epoch ``epoch`` is a function of the seed, so a run can go on from any step.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from deitkit.data.sources import Split
from deitkit.errors import RecipeError
from deitkit.seeding import derived_generator


class Batches:
    """The training images of a run, in the order of its seed.

    An epoch leaves out the last, smaller batch, so that every step has the same shape.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, device: torch.device) -> None:
        if batch_size > len(split):
            raise RecipeError(
                f"train.batch_size={batch_size} is more than the {len(split)} images to train on: at most {len(split)}"
            )
        self.split = split.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = len(split) // batch_size
        self._order: tuple[int, Tensor] | None = None

    def batch(
        self, epoch: int, step: int
    ) -> tuple[UInt8[Tensor, "batch channels height width"], Int64[Tensor, "batch"]]:
        """Return images and labels of one step (both counted from 0)."""
        assert 0 <= step < self.steps_per_epoch
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.split), generator=derived_generator(self.seed, "order", epoch))
            self._order = (epoch, order.to(self.split.images.device, non_blocking=True))
        indices = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        return self.split.images[indices], self.split.labels[indices]

    def epoch(
        self, epoch: int, first_step: int = 0
    ) -> Iterator[tuple[UInt8[Tensor, "batch channels height width"], Int64[Tensor, "batch"]]]:
        """Yield the batches of an epoch (from 0), from a step on."""
        for step in range(first_step, self.steps_per_epoch):
            yield self.batch(epoch, step)
