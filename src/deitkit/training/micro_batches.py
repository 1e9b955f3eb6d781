"""Micro-batches: their size, chosen so that a student's activations fit the cache of a CPU, and their order."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.speed import SpeedRecipe
from deitkit.system.device import Precision

# The input of a block (images x tokens x width) should fit the caches of the cores, but a matrix product needs enough
# rows (images x tokens) to amortise loading its weights.
CACHE_BYTES, LEAST_ROWS = 2**20, 1024


def choose_micro_batch_size(
    classifier: Classifier, batch_size: int, speed: SpeedRecipe, precision: Precision, whole_batch: bool = False
) -> int:
    """Return the number of images in a micro-batch; the gradient is accumulated over all micro-batches.

    By default, a GPU uses the whole batch. So does a student that draws random numbers, since micro-batches would draw
    others. BatchNorm, of a CNN or a convolutional stem, always needs the whole batch.

    Args:
        classifier: The student.
        batch_size: Images of a step.
        speed: ``speed.micro_batch_size``: a number, ``auto`` or None.
        precision: Of the forward pass.
        whole_batch: Whether the loss relates the images of a batch to each other.
    """
    model, chosen = classifier.model, speed.micro_batch_size
    if whole_batch or not isinstance(model, DeiT) or has_batch_norm(model) or chosen is None:
        return batch_size
    if chosen != "auto":
        return min(batch_size, chosen)
    is_random = model.config["drop_path"] > 0 or model.config["dropout"] > 0
    if precision.device.type != "cpu" or is_random:
        return batch_size
    tokens, width = model.pos_embed.shape[1:]
    cache = CACHE_BYTES * torch.get_num_threads()
    most = max(math.ceil(LEAST_ROWS / tokens), cache // (tokens * width * precision.dtype.itemsize))
    return math.ceil(batch_size / math.ceil(batch_size / most))


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model relates the images of a batch to each other: a CNN, or a convolutional stem.

    ``SyncBatchNorm``, which takes its place among several processes, is one of the kinds.
    """
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def micro_batches(size: int, *parts: tuple[int, int]) -> Iterator[slice]:
    """Yield slices of at most ``size`` images, none of which reaches over the end of a part (first, last + 1)."""
    for first, end in parts:
        for start in range(first, end, size):
            yield slice(start, min(start + size, end))
