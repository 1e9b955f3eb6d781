"""Epochs of batches from a split in memory or streamed, shuffled as a function of seed and epoch only.

Batch ``step`` of epoch ``epoch`` is a function of the seed, so a run can resume from any step.
"""

import itertools
from collections.abc import Generator, Iterator

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from deitkit.data.split import Split
from deitkit.data.stream import StreamedImages
from deitkit.errors import RecipeError
from deitkit.system.device import to_device
from deitkit.system.seeding import derived_generator


class Batches:
    """The training images of a run, in the order of its seed.

    An epoch leaves out the last, smaller batch, so that every step has the same shape.

    With repeated augmentation (Hoffer et al. 2020; Berman et al. 2019) an image appears several times in a row, and
    each copy is augmented separately in the same step. As with the DeiT code's sampler, an epoch keeps its number of
    steps and so contains a share of the images; unlike there, this holds on one device too, and for any number of
    images.

    Args:
        split: The images to train on.
        batch_size: Images in a step, copies included.
        seed: Of the order.
        device: Device of the batches.
        repeats: Copies of an image; the last image of an epoch may have fewer.
        epoch_repeats: Passes over the images that make an epoch, each in an order of its own.
        balanced: Draw as many images of every class in an epoch: of a rare class several times the same, of a frequent
            one a part. Without it every image comes once.
        scale_min: Cut a random crop of at least this share of the area from each whole image; None yields the images
            of the split.
        places: The places of each batch to yield, on the CPU; None for all.

    Raises:
        RecipeError: A batch has more images than the split.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        repeats: int = 1,
        epoch_repeats: int = 1,
        balanced: bool = False,
        scale_min: float | None = None,
        places: Int64[Tensor, " part"] | None = None,
    ) -> None:
        if batch_size > len(split):
            raise RecipeError(
                f"train.batch_size={batch_size} exceeds the {len(split)} training images: use at most {len(split)}"
            )
        self.split = split.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.epoch_repeats = epoch_repeats
        self.scale_min = scale_min
        self.places = torch.arange(batch_size) if places is None else places
        self._places_there = self.places.to(device)
        self.class_counts = split.labels.cpu().unique(return_counts=True)[1].tolist() if balanced else None
        self.steps_per_epoch = len(split) * epoch_repeats // batch_size
        self._order: tuple[int, Tensor, Tensor] | None = None
        # Batches that are decoded ahead, with the epoch and the step of the next one.
        self._flow: tuple[tuple[int, int], Generator[Tensor, None, None]] | None = None

    def batch(
        self, epoch: int, step: int
    ) -> tuple[UInt8[Tensor, "part channels height width"], Int64[Tensor, " part"]]:
        """Return images and labels of one step (both counted from 0)."""
        assert 0 <= step < self.steps_per_epoch
        device = self.split.labels.device
        whole, whole_there = (
            order[step * self.batch_size : (step + 1) * self.batch_size] for order in self._orders(epoch)
        )
        here, there = whole[self.places], whole_there[self._places_there]
        if not isinstance(self.split.images, Tensor):
            images = self._streamed(epoch, step, self.split.images, here)
        elif self.scale_min is not None:
            images = self.split.crops(here, self._drawn_crops(epoch, step, whole))
        elif self.split.images.device == device:
            images = self.split.images[there]
        else:  # all images do not fit on the GPU
            images = to_device(self.split.images[here].pin_memory(), device)
        return images, self.split.labels[there]

    def _orders(self, epoch: int) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """Return an epoch's order, in host memory and on the device."""
        if self._order is None or self._order[0] != epoch:
            order = self._shuffled(epoch)
            self._order = epoch, order, to_device(order, self.split.labels.device)
        return self._order[1:]

    def _shuffled(self, epoch: int) -> Int64[Tensor, " n"]:
        generator = derived_generator(self.seed, "order", epoch)
        order = torch.cat([self._one_pass(generator) for _ in range(self.epoch_repeats)])
        return order.repeat_interleave(self.repeats)[: len(order)]

    def _one_pass(self, generator: torch.Generator) -> Int64[Tensor, " n"]:
        order = torch.randperm(len(self.split), generator=generator)
        return order if self.class_counts is None else self._balanced(order, generator)

    def _balanced(self, order: Int64[Tensor, " n"], generator: torch.Generator) -> Int64[Tensor, " n"]:
        """Return an order of the same length with as many images of every class, in random order."""
        assert self.class_counts is not None
        by_class = order[self.split.labels.cpu()[order].argsort(stable=True)].split(self.class_counts)
        each, more = divmod(len(order), len(by_class))
        drawn = []
        for place, own in enumerate(by_class):
            quota = each + (place < more)
            drawn.append(own.repeat(-(-quota // len(own)))[:quota])
        together = torch.cat(drawn)
        return together[torch.randperm(len(together), generator=generator)]

    def _streamed(
        self, epoch: int, step: int, images: StreamedImages, indices: Int64[Tensor, " part"]
    ) -> UInt8[Tensor, "part channels height width"]:
        """Return the batch from worker processes that decode ahead, beyond the end of the epoch too.

        An image that occurs several times is decoded and sent once, unless each time has a crop of its own.
        """
        device = self.split.labels.device
        if self._flow is None or self._flow[0] != (epoch, step):
            self.close()
            self._flow = (epoch, step), images.batches(self._all_indices(epoch, step), pin=device.type == "cuda")
        batch = next(self._flow[1])
        following = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
        self._flow = following, self._flow[1]
        batch = to_device(batch, device)
        if len(batch) == len(indices):
            return batch
        places = indices.unique(return_inverse=True)[1]
        return batch.index_select(0, to_device(places, device))

    def close(self) -> None:
        """End the processes that decode ahead; another batch starts new ones.

        Left to the garbage collector, which finalizes their queues first, each would be waited for five seconds.
        """
        if self._flow is not None:
            self._flow[1].close()
            self._flow = None

    def _all_indices(self, epoch: int, step: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Yield the indices of every batch from a step on, with the crops to cut if any, endlessly."""
        for number in itertools.count(epoch):
            batches = self._shuffled(number).split(self.batch_size)[: self.steps_per_epoch]
            for place, indices in enumerate(batches[step if number == epoch else 0 :], step if number == epoch else 0):
                part = indices[self.places]
                if self.scale_min is None:
                    once = part.unique()
                    yield once if len(once) < len(part) else part
                else:
                    yield part, self._drawn_crops(number, place, indices)

    def _drawn_crops(self, epoch: int, step: int, indices: Int64[Tensor, " batch"]) -> Float64[Tensor, "4 part"]:
        """Draw the crops of a whole batch, and return those of the images to yield."""
        assert self.scale_min is not None
        generator = derived_generator(self.seed, "crops", epoch, step)
        return self.split.draw_crops(indices, self.scale_min, generator)[:, self.places]

    def epoch(
        self, epoch: int, first_step: int = 0
    ) -> Iterator[tuple[UInt8[Tensor, "part channels height width"], Int64[Tensor, " part"]]]:
        """Yield the batches of an epoch (from 0), from a step on."""
        for step in range(first_step, self.steps_per_epoch):
            yield self.batch(epoch, step)
