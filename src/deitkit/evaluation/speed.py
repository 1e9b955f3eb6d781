"""The time of classifiers, measured side by side."""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.models.accelerate import uncompiled
from deitkit.models.classifier import Classifier
from deitkit.system.device import Precision
from deitkit.system.timer import time_in_turn

# Single images take a moment, in which anything on the machine may disturb them, so that many are measured.
MOST_SINGLE, SECONDS_OF_SINGLE = 100, 1.0
Name = TypeVar("Name", bound=Hashable)


@torch.inference_mode()
def seconds_per_batch(
    classifiers: Mapping[Name, Classifier],
    view: Float[Tensor, "batch channels height width"],
    precision: Precision,
    repeats: int,
) -> dict[Name, float]:
    """Return how long each classifier takes for a batch, in seconds: the median over repeats, measured in turn.

    Args:
        classifiers: In evaluation mode, on the device.
        view: Values in [0, 1], on the device.
        precision: Of the forward passes.
        repeats: Number of measurements; of single images at least.
    """

    def classify(classifier: Classifier) -> None:
        with precision.autocast():
            classifier(view)

    functions = {str(number): partial(classify, one) for number, one in enumerate(classifiers.values())}
    with uncompiled():
        if classifiers and len(view) == 1:
            first = time_in_turn(functions, device=precision.device, repeats=repeats, calls=1)
            slowest = max(timing.median for timing in first.values())
            repeats = max(repeats, min(MOST_SINGLE, int(SECONDS_OF_SINGLE / slowest)))
        taken = time_in_turn(functions, device=precision.device, repeats=repeats, calls=1)
    return {name: timing.median for name, timing in zip(classifiers, taken.values(), strict=True)}
