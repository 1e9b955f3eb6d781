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

SINGLE_CALLS = 5  # in a measurement of single images, which take a moment
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
        repeats: Number of measurements.
    """

    def classify(classifier: Classifier) -> None:
        with precision.autocast():
            classifier(view)

    functions = {str(number): partial(classify, one) for number, one in enumerate(classifiers.values())}
    with uncompiled():
        calls = SINGLE_CALLS if len(view) == 1 else 1
        taken = time_in_turn(functions, device=precision.device, repeats=repeats, calls=calls)
    return {name: timing.median for name, timing in zip(classifiers, taken.values(), strict=True)}
