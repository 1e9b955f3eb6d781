"""Mixup and CutMix of a view, and its dense targets. Augmentation of single images is in ``augment.py``."""

import math

import torch
from jaxtyping import Float, Int64
from scipy.special import betaincinv
from torch import Tensor

from deitkit.recipe.schema import AugmentRecipe


class Mix:
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of a batch with itself in reverse order.

    Like timm's ``Mixup`` in batch mode: one share for the batch, CutMix's share corrected to the true area of the box,
    and labels smoothed before they are mixed.
    """

    def __init__(self, recipe: AugmentRecipe, classes: int, label_smoothing: float) -> None:
        """Prepare a recipe's mixing.

        Args:
            recipe: Only ``mixup``, ``cutmix``, ``mix_probability`` and ``mix_switch`` are used.
            classes: Number of classes, the width of the targets.
            label_smoothing: Share of a target that is distributed evenly over all classes, in [0, 1).
        """
        self.recipe = recipe
        self.classes = classes
        self.label_smoothing = label_smoothing

    def __call__(
        self,
        view: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
        """Mix a batch.

        Args:
            view: On any device; left unchanged.
            labels: In [0, classes), on the same device.
            generator: A CPU generator, whose state alone determines all draws.

        Returns:
            The mixed view, and targets (float32) whose rows sum to 1.
        """
        targets = smoothed_one_hot(labels, self.classes, self.label_smoothing)
        recipe = self.recipe
        if not (recipe.mixup or recipe.cutmix):
            return view, targets
        draws = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        mixed, switched, quantile, centre_y, centre_x = draws
        if mixed >= recipe.mix_probability:
            return view, targets
        cut = recipe.cutmix > 0 and (recipe.mixup == 0 or switched < recipe.mix_switch)
        alpha = recipe.cutmix if cut else recipe.mixup
        share = float(betaincinv(alpha, alpha, quantile))
        if cut:
            view, share = cutmix(view, share, centre_y, centre_x)
        else:
            view = torch.lerp(view.flip(0), view, share)
        return view, torch.lerp(targets.flip(0), targets, share)


def smoothed_one_hot(
    labels: Int64[Tensor, " batch"], classes: int, label_smoothing: float
) -> Float[Tensor, "batch classes"]:
    """Return ``1 - s + s / classes`` for the true class and ``s / classes`` for every other (Szegedy et al., 2016)."""
    spread = label_smoothing / classes
    targets = torch.full((len(labels), classes), spread, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - label_smoothing + spread)


def balanced_weights(labels: Int64[Tensor, " n"], classes: int) -> Float[Tensor, " classes"]:
    """Return n / (classes x images of a class) for each class: 1 where all have as many, in the mean of all images too.

    Source: King and Zeng 2001; scikit-learn's ``balanced``.
    """
    counts = labels.cpu().bincount(minlength=classes).clamp(min=1)
    return (len(labels) / (classes * counts.double())).float()


def weigh_images(
    targets: Float[Tensor, "batch classes"], class_weights: Float[Tensor, " classes"], label_smoothing: float
) -> Float[Tensor, "batch classes"]:
    """Return targets in which each image, or its share of a mixed one, has the weight of its class.

    A weight scales the whole smoothed target of an image. `torch.nn.functional.cross_entropy` scales its columns
    instead, and so teaches frequent images the rare class, which takes most of their target from a ratio of
    ``(1 - s + s / classes) / (s / classes)`` on (19 to 1 of two classes).

    Args:
        targets: As ``Mix`` returns them: mixed, and smoothed by ``label_smoothing``.
        class_weights: Of ``balanced_weights``.
        label_smoothing: Of the targets, in [0, 1).
    """
    spread = label_smoothing / targets.shape[-1]
    own = (targets - spread) * class_weights
    return own + spread / (1 - label_smoothing) * own.sum(dim=-1, keepdim=True)


def cutmix(
    view: Float[Tensor, "batch channels height width"], share: float, centre_y: float, centre_x: float
) -> tuple[Float[Tensor, "batch channels height width"], float]:
    """Replace a box of ``1 - share`` of the area by the same box of the reversed batch.

    Args:
        view: Left unchanged.
        share: Share of the area that keeps its image, in [0, 1], before the box is clipped to the image.
        centre_y: Centre of the box, as a fraction of the height in [0, 1).
        centre_x: Centre of the box, as a fraction of the width in [0, 1).

    Returns:
        The mixed view, and the true share of the area that keeps its image.
    """
    height, width = view.shape[-2:]
    side = math.sqrt(1 - share)
    rows = _span(int(centre_y * height), int(height * side), height)
    columns = _span(int(centre_x * width), int(width * side), width)
    mixed = view.clone()
    mixed[..., rows, columns] = view[..., rows, columns].flip(0)
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def _span(centre: int, length: int, limit: int) -> slice:
    return slice(max(centre - length // 2, 0), min(centre + (length + 1) // 2, limit))
