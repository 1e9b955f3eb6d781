"""Predictions of several classifiers on the test images, with the similarity of their tokens."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.analyze.tokens import recorded_similarity
from deitkit.data.split import Split
from deitkit.evaluation.predict import predict_all
from deitkit.models.classifier import Classifier
from deitkit.models.vit import TOKENS, DeiT, Output
from deitkit.system.device import Precision


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
        outputs = predict_all(list(classifiers.values()), split, precision, on_progress)
    similarities = {
        name: torch.stack([torch.cat(batches).cpu() for batches in layers]) for name, layers in meters.items()
    }
    return dict(zip(classifiers, outputs, strict=True)), similarities
