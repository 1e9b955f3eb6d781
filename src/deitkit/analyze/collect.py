"""Predictions of several classifiers on the test images, with the similarity of their tokens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from deitkit.analyze.tokens import recorded_similarity
from deitkit.data.split import Split
from deitkit.evaluation.predict import predict_all
from deitkit.models.classifier import Classifier
from deitkit.models.vit import TOKENS, DeiT, Output
from deitkit.system.device import Precision


@dataclass(frozen=True)
class ProgressSplit(Split):
    """A split that reports how many of its images were processed."""

    on_progress: Callable[[int], None]

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Yield all images in order, in batches."""
        done = 0
        for images in super().batches(size):
            yield images
            done += len(images)
            self.on_progress(done)


def has_both_tokens(classifier: Classifier) -> bool:
    """Return whether it is a student with a class and a distillation token."""
    return isinstance(classifier.model, DeiT) and classifier.model.config["tokens"] == list(TOKENS)


def predict_with_similarity(
    classifiers: Mapping[str, Classifier], split: Split, precision: Precision, on_progress: Callable[[int], None]
) -> tuple[dict[str, Output], dict[str, Float[Tensor, "layers n"]]]:
    """Predict every image with every classifier, and record the similarity of the tokens; decode each image once.

    Args:
        classifiers: By name.
        split: The images.
        precision: Of the forward passes.
        on_progress: Called with the number of processed images, after every batch.

    Returns:
        The heads' logits by name; and, of students with both tokens, the cosine of the tokens by layer and image.
    """
    with ExitStack() as stack:
        meters = {
            name: stack.enter_context(recorded_similarity(classifier))
            for name, classifier in classifiers.items()
            if has_both_tokens(classifier)
        }
        outputs = predict_all(
            list(classifiers.values()), ProgressSplit(split.images, split.labels, on_progress), precision
        )
    similarities = {
        name: torch.stack([torch.cat(batches).cpu() for batches in layers]) for name, layers in meters.items()
    }
    return dict(zip(classifiers, outputs, strict=True)), similarities
