"""A trial of a library's model before anything trains: one step at the real size, batch and precision.

Architectures by name come from other libraries. What they cannot process must fail at once, in one sentence.
"""

from copy import deepcopy

import torch

from deitkit.data.dataset import Dataset
from deitkit.errors import is_out_of_memory, reason_of
from deitkit.models.classifier import Classifier
from deitkit.system.device import Precision
from deitkit.system.words import counted


def failure_of(
    classifier: Classifier, dataset: Dataset, batch_size: int, precision: Precision, *, trained: bool
) -> str | None:
    """Return why a classifier cannot process a batch of views, or None. Neither it nor random numbers are changed.

    Args:
        classifier: On the device.
        dataset: Its channels and resolution.
        batch_size: Of the views.
        precision: Of the forward pass.
        trained: Whether to try a training step: training mode, and a backward pass.

    Returns:
        What was tried and what failed, to be completed by a next step.
    """
    height, width = dataset.image_px
    tried = f"cannot process {counted(batch_size, 'image')} of {height} x {width} px"
    shape = (batch_size, dataset.channels, height, width)
    reason = _reason(classifier, shape, dataset.classes if trained else None, precision)
    return None if reason is None else f"{tried}: {reason}"


def _reason(
    classifier: Classifier, shape: tuple[int, int, int, int], classes: int | None, precision: Precision
) -> str | None:
    """Return what fails; ``classes`` is the number of logits that a training step needs, None for no step."""
    trained = classes is not None
    devices = [precision.device] if precision.device.type == "cuda" else []
    try:
        model = deepcopy(classifier).train(trained)
        with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(trained), precision.autocast():
            logits = model(torch.rand(shape, device=precision.device)).class_logits
            if not isinstance(logits, torch.Tensor):
                return f"it returns {type(logits).__name__} instead of logits"
            if logits.ndim != 2 or len(logits) != shape[0]:
                return f"it returns an output of shape {tuple(logits.shape)} instead of one row per image"
            if classes not in (None, logits.shape[1]):
                return f"it returns {logits.shape[1]} logits for {classes} classes"
            if trained:
                logits.float().logsumexp(dim=-1).mean().backward()
    except Exception as error:  # libraries raise many types
        if is_out_of_memory(error):
            raise
        if "view size is not compatible" in str(error):  # of images in torch's channels_last, which is faster
            return "its code uses view, where reshape (or speed.channels_last=false) is needed"
        return reason_of(error)
    return None
