"""A figure of augmented views with their labels, as the teacher and the students see them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from deitkit.data.augment.augment import Augment
from deitkit.data.augment.mix import Mix
from deitkit.data.dataset import Dataset
from deitkit.errors import one_line
from deitkit.recipe.schema import AugmentRecipe
from deitkit.system.figure_file import save_figure
from deitkit.system.seeding import derived_generator


def draw_views(dataset: Dataset, recipe: AugmentRecipe, label_smoothing: float, path: Path, count: int = 8) -> None:
    """Draw ``count`` training images, each unchanged and in three augmented views, with the labels of each.

    Above them, where images are not square, are the whole ones, with the part that is kept if they are cropped.

    Args:
        dataset: Its training images are drawn.
        recipe: The augmentation of the views.
        label_smoothing: As in training; shares below 5 % are omitted.
        path: Of the PNG.
        count: Number of images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale_min = dataset.train.scale_of_crops(recipe)
    augment = Augment(recipe, dataset.mean, dataset.std, is_cropped=scale_min is not None)
    mix = Mix(recipe, dataset.classes, label_smoothing)
    chosen = torch.randperm(len(dataset.train), generator=derived_generator(0, "preview"))[:count]
    images, labels = dataset.train.pixels(chosen), dataset.train.labels[chosen]
    generator = derived_generator(0, "preview", "views")
    rows = [(images.float() / 255, torch.nn.functional.one_hot(labels, dataset.classes).float())]
    for _ in range(3):
        if scale_min is not None:
            images = dataset.train.crops(chosen, dataset.train.draw_crops(chosen, scale_min, generator))
        rows.append(mix(augment(images, generator), labels, generator))
    whole = [] if dataset.originals is None else dataset.originals(chosen)
    above = any(image.shape[0] != image.shape[1] for image in whole)
    lines = len(rows) + above
    figure = Figure(figsize=(1.5 * len(chosen), 1.85 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for column, image in enumerate(whole if above else []):
        axes = _axes(figure, lines, len(chosen), 0, column, "whole")
        axes.imshow(image)
        if dataset.fit == "crop":
            axes.add_patch(_kept_part(image))
    for row, (views, targets) in enumerate(rows):
        for column, (view, target) in enumerate(zip(views, targets, strict=True)):
            axes = _axes(figure, lines, len(chosen), row + above, column, "as it is" if row == 0 else f"view {row}")
            axes.imshow(view.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(_shares(target, dataset.class_names, mixed=row > 0), fontsize=7, parse_math=False)
    save_figure(path, figure, dpi=110)


def _axes(figure: Any, lines: int, columns: int, row: int, column: int, title: str) -> Any:
    axes = figure.add_subplot(lines, columns, row * columns + column + 1)
    axes.set_xticks([])
    axes.set_yticks([])
    if column == 0:
        axes.set_ylabel(title, fontsize=8)
    return axes


def _kept_part(image: np.ndarray) -> Any:
    """Return the outline of the centre square of an image ``[height, width, 3]``."""
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    side = min(height, width)
    corner = ((width - side) / 2 - 0.5, (height - side) / 2 - 0.5)
    return Rectangle(corner, side, side, fill=False, edgecolor="red", linewidth=1.5)


def _shares(target: torch.Tensor, names: tuple[str, ...], *, mixed: bool) -> str:
    best = target.topk(min(2, len(target)))
    shares = [
        (one_line(names[int(index)]), float(share)) for share, index in zip(best.values, best.indices, strict=True)
    ]
    kept = [(name, share) for name, share in shares if share >= 0.05]
    return "\n".join(f"{name[:14]} {100 * share:.0f} %" if mixed else name[:14] for name, share in kept)
