"""Contact sheets: example images, and what a student's tokens attend to in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from deitkit.errors import one_line
from deitkit.system.figure_file import save_figure

CELL_INCHES = 1.15
DIM = 0.25  # brightness of a pixel that is not attended to at all


@dataclass(frozen=True)
class Example:
    """An image with what its maps show.

    Attributes:
        image: In [0, 1].
        label: The true class.
        decision: The class that the student predicts.
        maps: By title, on the grid of patches.
    """

    image: Float[Tensor, "channels height width"]
    label: str
    decision: str
    maps: dict[str, Float[Tensor, "rows columns"]]


def draw_attention(examples: Sequence[Example], path: Path) -> None:
    """Draw one row for each image: the image, then each of its maps as a tint over it.

    Every map is scaled by its own highest value: colours compare patches of one map, not maps.
    """
    titles = ["image", *examples[0].maps]
    figure = Figure(
        figsize=(CELL_INCHES * len(titles) + 1, 1.1 * CELL_INCHES * len(examples) + 0.4), layout="constrained"
    )
    FigureCanvasAgg(figure)
    cells = figure.subplots(len(examples), len(titles), squeeze=False)
    for axes, title in zip(cells[0], titles, strict=True):
        axes.set_title(title.replace(", ", "\n"), fontsize=8, parse_math=False)
    for row, example in zip(cells, examples, strict=True):
        _show(row[0], example.image.permute(1, 2, 0).squeeze(-1).numpy())
        right = example.decision == example.label
        outcome = "right" if right else f"as {one_line(example.decision)[:14]}"
        row[0].set_ylabel(
            f"{one_line(example.label)[:14]}\n{outcome}",
            fontsize=7,
            rotation="horizontal",
            ha="right",
            va="center",
            color="black" if right else "#A83A00",
            parse_math=False,
        )
        for axes, attention in zip(row[1:], example.maps.values(), strict=True):
            _show(axes, tinted(example.image, attention))
    save_figure(path, figure, dpi=110, metadata={"Software": None})


def tinted(image: Float[Tensor, "channels height width"], attention: Float[Tensor, "rows columns"]) -> np.ndarray:
    """Return the image in grey under the colours of its map, as height x width x 3 in [0, 1]."""
    from matplotlib import colormaps

    patch = image.shape[-1] // attention.shape[-1]
    scaled = (attention / attention.max().clamp(min=1e-12)).numpy()
    colours = colormaps["viridis"](np.kron(scaled, np.ones((patch, patch))))[..., :3]
    grey = image.mean(dim=0).numpy()[..., None]
    blended: np.ndarray = colours * (DIM + (1 - DIM) * grey)
    return blended


def _show(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
