"""analyze.collect"""

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
class Told(Split):
    """A split that tells how many of its images have been asked for."""

    tell: Callable[[int], None]

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Yield all images in order, so many at a time."""
        done = 0
        for images in super().batches(size):
            yield images
            done += len(images)
            self.tell(done)


def has_both_tokens(classifier: Classifier) -> bool:
    """Return whether it is a student with a class and a distillation token."""
    return isinstance(classifier.model, DeiT) and classifier.model.config["tokens"] == list(TOKENS)


def ask(
    panel: Mapping[str, Classifier], split: Split, precision: Precision, tell: Callable[[int], None]
) -> tuple[dict[str, Output], dict[str, Float[Tensor, "layers n"]]]:
    """Ask every classifier about every image, each image decoded once.

    Args:
        panel: Classifiers by name.
        split: Images.
        precision: Of the forward passes.
        tell: Called with the number of images done, after every batch.

    Returns:
        The heads' logits by name; and, of those with both tokens, the cosine of the tokens by layer and image.
    """
    with ExitStack() as stack:
        meters = {
            name: stack.enter_context(recorded_similarity(classifier))
            for name, classifier in panel.items()
            if has_both_tokens(classifier)
        }
        outputs = predict_all(list(panel.values()), Told(split.images, split.labels, tell), precision)
    similarities = {
        name: torch.stack([torch.cat(batches).cpu() for batches in layers]) for name, layers in meters.items()
    }
    return dict(zip(panel, outputs, strict=True)), similarities
