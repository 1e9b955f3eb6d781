"""Logits of classifiers for all images of a split."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.data.split import Split
from deitkit.models.accelerate import uncompiled
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.vit import Output
from deitkit.system.device import Precision, to_device
from deitkit.system.ranks import ALONE, Ranks

# Pixels of a batch for evaluation: small for the caches of a CPU, large for the throughput of a GPU.
CPU_PIXELS, GPU_PIXELS = 2**19, 2**22


def precision_of(card: ModelCard, device: torch.device) -> tuple[Precision, list[str]]:
    """Return the precision in which a saved model is used on a device, and a remark where it is not the card's.

    That is bf16 where the device has no instructions for it, which would take 4 to 400 times as long as fp32.
    """
    precision = Precision.choose("auto" if card.precision == "bf16" else card.precision, device)
    differs = card.precision == "bf16" and precision.name != "bf16"
    remark = f"in {precision.name}, not in the model's bf16, for which this processor has no instructions"
    return precision, [remark] if differs else []


def predict(classifier: Classifier, split: Split, precision: Precision) -> Output:
    """Return the heads' logits for every image of a split, in float32 on the CPU; restore the mode afterwards."""
    return predict_all([classifier], split, precision)[0]


def predict_logits(classifier: Classifier, split: Split, precision: Precision) -> Float[Tensor, "n classes"]:
    """Return the logits of a classifier that has, or answers by, one head; see ``predict``."""
    logits = predict(classifier, split, precision).class_logits
    assert logits is not None
    return logits


@torch.inference_mode()
def predict_all(
    classifiers: Sequence[Classifier],
    split: Split,
    precision: Precision,
    after_batch: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> list[Output]:
    """Return the result of ``predict`` for several classifiers, decoding and moving each image once.

    Args:
        classifiers: On the device.
        split: The images.
        precision: Of the forward passes.
        after_batch: Receives the number of images that are done, of this process's part; may raise, to stop.
        ranks: Processes that share the images, all of which must call this, and get all logits.
    """
    if not classifiers:
        return []
    modes = [classifier.training for classifier in classifiers]
    outputs: list[list[Output]] = [[] for _ in classifiers]
    spans = ranks.spans(len(split))
    part = split if ranks.count == 1 else split[spans[ranks.rank]]
    for classifier in classifiers:
        classifier.eval()
    done = 0
    with uncompiled(), precision.autocast():
        for images in part.batches(_batch_size(split, classifiers, precision.device)):
            view = to_device(images, precision.device).float() / 255
            for classifier, gathered in zip(classifiers, outputs, strict=True):
                gathered.append(classifier(view))
            done += len(images)
            after_batch(done)
    for classifier, training in zip(classifiers, modes, strict=True):
        classifier.train(training)
    heads = ("class_logits", "distillation_logits")
    return [Output(*(_gather(parts, head, spans, ranks) for head in heads)) for parts in outputs]


def _batch_size(split: Split, classifiers: Sequence[Classifier], device: torch.device) -> int:
    """Return how many images to predict at once, at the largest resolution to which a classifier enlarges them."""
    height, width = split.images.shape[-2:]
    largest = max(height * width, *(classifier.image_px**2 for classifier in classifiers if classifier.image_px), 0)
    return max(1, (CPU_PIXELS if device.type == "cpu" else GPU_PIXELS) // largest)


def _gather(outputs: list[Output], head: str, spans: list[slice], ranks: Ranks) -> Tensor | None:
    logits = [getattr(output, head) for output in outputs]
    if logits[0] is None:
        return None
    mine = torch.cat(logits).float().cpu()
    if spans[0] == spans[-1]:  # each process has predicted all images
        return mine
    return ranks.gather(mine, [span.stop - span.start for span in spans])
