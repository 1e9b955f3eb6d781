"""A student's batch in parts: what the caches of a CPU hold, several side by side, a core each.

The gradient is that of the whole batch, but for the order of the sums. Cores that share every operation wait for each
other after each; with parts of their own they wait once in a step.
"""

import copy
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.schema import SpeedRecipe
from deitkit.system.device import Precision

# What a block reads in one part (images x tokens x width) is to fit the cache of the cores that work on it; but a
# product needs rows (images x tokens) to be worth fetching its weights.
CACHE_BYTES, LEAST_ROWS = 2**20, 1024

Terms = dict[str, Tensor]
Part = tuple[Tensor | None, ...]


class Parts:
    """Finds the gradient of a classifier's loss, part by part.

    Args:
        classifier: Whose weights get the gradient.
        batch_size: Images of a batch.
        speed: How large the parts are, and whether several are computed side by side.
        precision: Of the forward pass.
        undivided: Whether the loss relates the images of a batch, which it must then see as one part.
    """

    def __init__(
        self,
        classifier: Classifier,
        batch_size: int,
        speed: SpeedRecipe,
        precision: Precision,
        undivided: bool = False,
    ) -> None:
        self.size, self.crew = (batch_size, 1) if undivided else divide(classifier, batch_size, speed, precision)
        # Twins have the weights of the first, and gradients of their own, which nobody else adds to meanwhile.
        self.twins = [classifier, *(_twin(classifier) for _ in range(self.crew - 1))]

    def backward(self, find_terms: Callable[..., Terms], *batch: Tensor | None) -> Terms:
        """Add the gradient of the loss to that of the weights, and return the terms whose sum is the loss.

        Args:
            find_terms: Maps a classifier and a part of the batch to terms that are means over its images.
            batch: Tensors that have the images as their first dimension, or None; the first is no None.
        """
        assert batch[0] is not None
        count = len(batch[0])

        def learn(classifier: Classifier, parts: Sequence[Part]) -> Terms:
            sums: Terms = {}
            for part in parts:
                assert part[0] is not None
                terms = {name: term * (len(part[0]) / count) for name, term in find_terms(classifier, *part).items()}
                torch.stack(list(terms.values())).sum().backward()
                sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
            return sums

        parts = list(self._split(batch))
        if self.crew == 1:
            return learn(self.twins[0], parts)
        each = math.ceil(len(parts) / self.crew)
        shares = [parts[first : first + each] for first in range(0, len(parts), each)]
        results = list(_threads(self.crew, torch.get_num_threads()).map(learn, self.twins, shares))
        for twin in self.twins[1 : len(shares)]:
            _move_gradients(twin, self.twins[0])
        return {name: torch.stack([terms[name] for terms in results]).sum() for name in results[0]}

    def _split(self, batch: Part) -> Iterator[Part]:
        columns = [tensor.split(self.size) if tensor is not None else itertools.repeat(None) for tensor in batch]
        return zip(*columns, strict=False)


def divide(classifier: Classifier, batch_size: int, speed: SpeedRecipe, precision: Precision) -> tuple[int, int]:
    """Return how many images a part has, and how many parts are computed side by side.

    A GPU sees the whole batch unless the recipe says less; so does a student that draws random numbers, since torch has
    one sequence of them for all parts and threads. BatchNorm, of a CNN or a convolutional stem, always sees all of it.
    """
    model = classifier.model
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if not isinstance(model, DeiT) or has_batch_norm or speed.micro_batch_size is None:
        return batch_size, 1
    on_cpu = precision.device.type == "cpu"
    is_random = model.config["drop_path"] > 0 or model.config["dropout"] > 0
    cores = torch.get_num_threads() if on_cpu else 1
    # Twins would have to be compiled each, and torch compiles for one thread.
    crew = cores if speed.side_by_side and not is_random and speed.compile is not True else 1
    if speed.micro_batch_size != "auto":
        size = min(batch_size, speed.micro_batch_size)
        return size, min(crew, math.ceil(batch_size / size))
    if not on_cpu or is_random:
        return batch_size, 1
    tokens, width = model.pos_embed.shape[1:]
    least = math.ceil(LEAST_ROWS / tokens)
    crew = max(
        count for count in range(1, crew + 1) if cores % count == 0 and (count == 1 or count * least <= batch_size)
    )
    most = max(least, CACHE_BYTES * (cores // crew) // (tokens * width * precision.dtype.itemsize))
    rounds = math.ceil(batch_size / (most * crew))
    return math.ceil(batch_size / (rounds * crew)), crew


@functools.cache
def _threads(count: int, cores: int) -> ThreadPoolExecutor:
    """Return threads that share the cores evenly; they wait between two steps, and end with the process."""
    everyone = threading.Barrier(count + 1)

    def take_cores() -> None:
        torch.get_num_threads()  # settles the thread's number, which the first operation would do otherwise
        torch.set_num_threads(max(1, cores // count))
        everyone.wait()

    pool = ThreadPoolExecutor(count, "deitkit-part", initializer=take_cores)
    for _ in range(count):
        pool.submit(lambda: None)
    everyone.wait()
    torch.set_num_threads(cores)  # setting it for one thread sets it for all that come later
    return pool


def _twin(classifier: Classifier) -> Classifier:
    twin = copy.deepcopy(classifier)
    for weight, original in zip(twin.parameters(), classifier.parameters(), strict=True):
        weight.data = original.data
    return twin.train()


def _move_gradients(source: Classifier, target: Classifier) -> None:
    moved = [weight.grad for weight in source.parameters() if weight.grad is not None]
    torch._foreach_add_([weight.grad for weight in target.parameters() if weight.grad is not None], moved)
    source.zero_grad()
