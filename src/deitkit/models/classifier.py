"""The classifier of training and evaluation: from views in [0, 1] to the heads' logits, in both modes.

It adds normalisation and resolution to a model, and is independent of losses and data sets.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deitkit.models.vit import Output

# Means and standard deviations of the images of most published models.
IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The readouts of a student with two heads: logits whose softmax is the readout's probabilities.
READOUT_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class": lambda classes, distillation: classes,
    "distillation": lambda classes, distillation: distillation,
    # The log of the mean probability: the paper adds the softmax of both heads (Touvron et al. 2020, section 4).
    "joint": lambda classes, distillation: (
        torch.logaddexp(classes.float().log_softmax(dim=-1), distillation.float().log_softmax(dim=-1)) - math.log(2)
    ),
    # The mean of the logits, as in the released code, timm and transformers.
    "joint-logits": lambda classes, distillation: (classes + distillation) / 2,
}


class Classifier(nn.Module):
    """A model with its normalisation and resolution.

    Args:
        model: Maps normalised images to ``Output``, or to plain logits (a CNN).
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
        image_px: The side that views are resized to; None for no resizing.
        trainable: Dotted name of the only layer to train, the rest being frozen in evaluation mode; None trains
            everything.
        readout: Return only the logits of this one of ``READOUT_LOGITS``, as those of a single head; None returns those
            of all heads.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_px: int | None = None,
        trainable: str | None = None,
        readout: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.image_px = image_px
        self.trainable = trainable
        self.readout = readout
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        if trainable is not None:
            model.requires_grad_(False)
            model.get_submodule(trainable).requires_grad_(True)

    def forward(self, view: Float[Tensor, "batch channels height width"]) -> Output:
        """Return the heads' logits for views in [0, 1]."""
        if self.image_px is not None and view.shape[-2:] != (self.image_px, self.image_px):
            view = F.interpolate(view, size=(self.image_px, self.image_px), mode="bicubic", antialias=True).clamp(0, 1)
        output = self.model((view - self.mean) / self.std)
        if not isinstance(output, Output):
            return Output(class_logits=output)
        if self.readout is None:
            return output
        return Output(READOUT_LOGITS[self.readout](output.class_logits, output.distillation_logits))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "Classifier":
        """Switch the mode; frozen layers stay in evaluation mode, so that their statistics do not change."""
        super().train(mode)
        if self.trainable is not None:
            self.model.eval()
            self.model.get_submodule(self.trainable).train(mode)
        return self
