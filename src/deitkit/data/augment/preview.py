"""A figure of augmented views with their labels, as the teacher and the students see them."""

from pathlib import Path

import torch

from deitkit.data.augment.augment import Augment
from deitkit.data.augment.mix import Mix
from deitkit.data.dataset import Dataset
from deitkit.errors import one_line
from deitkit.recipe.schema import AugmentRecipe
from deitkit.system.files import write_figure
from deitkit.system.seeding import derived_generator


def draw_views(dataset: Dataset, recipe: AugmentRecipe, label_smoothing: float, path: Path, count: int = 8) -> None:
    """Draw ``count`` training images, each unchanged and in three augmented views, with the labels of each.

    Args:
        dataset: Its training images are drawn.
        recipe: The augmentation of the views.
        label_smoothing: As in training; shares below 5 % are omitted.
        path: Of the PNG.
        count: Number of images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    augment, mix = Augment(recipe, dataset.mean, dataset.std), Mix(recipe, dataset.classes, label_smoothing)
    chosen = torch.randperm(len(dataset.train), generator=derived_generator(0, "preview"))[:count]
    images, labels = dataset.train.pixels(chosen), dataset.train.labels[chosen]
    generator = derived_generator(0, "preview", "views")
    rows = [(images.float() / 255, torch.nn.functional.one_hot(labels, dataset.classes).float())]
    rows += [mix(augment(images, generator), labels, generator) for _ in range(3)]
    figure = Figure(figsize=(1.5 * len(chosen), 1.85 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (views, targets) in enumerate(rows):
        for column, (view, target) in enumerate(zip(views, targets, strict=True)):
            axes = figure.add_subplot(len(rows), len(chosen), row * len(chosen) + column + 1)
            axes.imshow(view.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(_shares(target, dataset.class_names, mixed=row > 0), fontsize=7, parse_math=False)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel("as it is" if row == 0 else f"view {row}", fontsize=8)
    write_figure(path, figure, dpi=110)


def _shares(target: torch.Tensor, names: tuple[str, ...], *, mixed: bool) -> str:
    best = target.topk(min(2, len(target)))
    shares = [
        (one_line(names[int(index)]), float(share)) for share, index in zip(best.values, best.indices, strict=True)
    ]
    kept = [(name, share) for name, share in shares if share >= 0.05]
    return "\n".join(f"{name[:14]} {100 * share:.0f} %" if mixed else name[:14] for name, share in kept)
