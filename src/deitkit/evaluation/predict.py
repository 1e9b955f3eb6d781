"""Logits of classifiers for all images of a split."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deitkit.data.dataset import Split
from deitkit.errors import Interrupted
from deitkit.models.accelerate import uncompiled
from deitkit.models.classifier import Classifier
from deitkit.models.vit import Output
from deitkit.system.device import Precision

# Pixels of a batch for evaluation: small for the caches of a CPU, large for the throughput of a GPU.
CPU_PIXELS, GPU_PIXELS = 2**19, 2**22


def predict(classifier: Classifier, split: Split, precision: Precision) -> Output:
    """Return the heads' logits for every image of a split, in float32 on the CPU; restore the mode afterwards."""
    return predict_all([classifier], split, precision)[0]


@torch.inference_mode()
def predict_all(
    classifiers: Sequence[Classifier],
    split: Split,
    precision: Precision,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Output]:
    """Return the result of ``predict`` for several classifiers, decoding and moving each image once.

    Raises:
        Interrupted: ``should_stop``, called after every batch, returned True.
    """
    modes = [classifier.training for classifier in classifiers]
    outputs: list[list[Output]] = [[] for _ in classifiers]
    height, width = split.images.shape[-2:]
    for classifier in classifiers:
        classifier.eval()
    with uncompiled(), precision.autocast():
        pixels = CPU_PIXELS if precision.device.type == "cpu" else GPU_PIXELS
        for images in split.batches(max(1, pixels // (height * width))):
            view = images.to(precision.device, non_blocking=True).float() / 255
            for classifier, gathered in zip(classifiers, outputs, strict=True):
                gathered.append(classifier(view))
            if should_stop():
                raise Interrupted
    for classifier, training in zip(classifiers, modes, strict=True):
        classifier.train(training)
    return [Output(*(_gather(parts, head) for head in ("class_logits", "distillation_logits"))) for parts in outputs]


def _gather(outputs: list[Output], head: str) -> Tensor | None:
    logits = [getattr(output, head) for output in outputs]
    return None if logits[0] is None else torch.cat(logits).float().cpu()
