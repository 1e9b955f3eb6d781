"""Validation accuracy by epoch as a static figure (matplotlib), and the curves and colours that the page shares."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import deitkit.system.files as files
from deitkit.report.table_layout import Number, percent
from deitkit.run.metrics import EpochMetrics
from deitkit.run.results import Results
from deitkit.system.words import shortened

if TYPE_CHECKING:  # matplotlib is loaded when something is drawn, not while students train
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart under colour blindness, without its yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1.5)),
    (0, (8, 1.5, 1.5, 1.5, 1.5, 1.5)),
)
LONGEST_NAME = 40  # of a teacher in a figure
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


@dataclass(frozen=True)
class Curve:
    """One value of one student by epoch, for every seed."""

    student: str
    seeds: dict[int, dict[int, Number]]

    @property
    def epochs(self) -> list[int]:
        """The epochs that any seed has reached."""
        return sorted({epoch for values in self.seeds.values() for epoch in values})

    def over_seeds(self, statistic: Callable[[Sequence[Number]], Number]) -> list[Number]:
        """Return a statistic over the seeds that have reached each of `epochs`."""
        return [
            statistic([values[epoch] for values in self.seeds.values() if epoch in values]) for epoch in self.epochs
        ]


def mean(values: Sequence[Number]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def curves_of(metrics: Sequence[EpochMetrics], value: Callable[[EpochMetrics], Number | None]) -> list[Curve]:
    """Gather one value per epoch, by student (in the order they appear) and seed; absent values leave a gap."""
    gathered: dict[str, dict[int, dict[int, Number]]] = {}
    for line in metrics:
        number = value(line)
        if number is not None:
            gathered.setdefault(line.student, {}).setdefault(line.seed, {})[line.epoch] = number
    return [Curve(student, seeds) for student, seeds in gathered.items()]


@dataclass(frozen=True)
class Peak:
    """A student's highest mean validation accuracy, as a fraction, the epoch of it, and that of the last epoch."""

    student: str
    highest: float
    epoch: int
    last: float


def validation_peaks(metrics: Sequence[EpochMetrics]) -> list[Peak]:
    """Return the peak of each student, which selects nothing: a peak well above the end tells of overfitting."""
    peaks = []
    for curve in curves_of(metrics, lambda line: line.main_accuracy):
        means = curve.over_seeds(mean)
        place = max(range(len(means)), key=means.__getitem__)
        peaks.append(Peak(curve.student, means[place], curve.epochs[place], means[-1]))
    return peaks


def colours_of(metrics: Sequence[EpochMetrics]) -> dict[str, str]:
    """Return a colour for every student, the same in all figures."""
    students = dict.fromkeys(line.student for line in metrics)
    return {student: COLOURS[index % len(COLOURS)] for index, student in enumerate(students)}


def teacher_title(results: Results) -> str:
    """Return how figures name the teacher, which has room there: short, also for a path or several teachers."""
    assert results.teacher is not None
    if len(results.teachers) > 1:
        return f"mean of {len(results.teachers)} teachers"
    return f"teacher {shortened(results.teacher.name, LONGEST_NAME)}"


def write_curves(results: Results, metrics: Sequence[EpochMetrics], folder: Path) -> list[Path]:
    """Write ``curves.png`` and ``curves.svg``: one line per student, the mean over seeds within its range.

    Returns:
        What was written: nothing where there is no metric to draw.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    curves = curves_of(metrics, lambda line: line.main_accuracy)
    if not curves:
        return []
    return write_png_and_svg(lambda: _draw(results, curves), folder, "curves")


def write_png_and_svg(draw: Callable[[], "Figure"], folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; the same run gives the same files.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    return write_figure(draw, folder / f"{name}.png", folder / f"{name}.svg")


def write_figure(draw: Callable[[], "Figure"], *paths: Path) -> list[Path]:
    """Write a figure in the formats that the suffixes of the paths name, ``.png`` or ``.svg``, and return the paths.

    Raises:
        CheckpointError: A file cannot be written.
    """
    import matplotlib

    # a fixed salt, no date and text as text
    with matplotlib.rc_context({"svg.hashsalt": "deitkit", "svg.fonttype": "none", "font.size": 10}):
        figure = draw()
        for path in paths:
            metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
            files.write_figure(path, figure, dpi=160, metadata=metadata)
    return list(paths)


def _draw(results: Results, curves: list[Curve]) -> "Figure":
    data = results.dataset
    count = len(results.repetitions)
    spread = f", mean and range over {count} {results.repetition}s" if count > 1 else ""
    figure, axes = curve_axes(f"{data.name}, {data.train:,} training images{spread}")
    finals = [curve.over_seeds(mean)[-1] for curve in curves]
    for index, (curve, final) in enumerate(zip(curves, finals, strict=True)):
        add_curve(axes, curve, index, f"{curve.student}  {percent(final, data.validation)}")
    low = min(min(curve.over_seeds(min)) for curve in curves) * 100
    high = max(max(curve.over_seeds(max)) for curve in curves) * 100
    _draw_references(axes, results, low, high)
    epochs = [epoch for curve in curves for epoch in curve.epochs]
    if min(epochs) == max(epochs):
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.set_xticks(epochs[:1])
    axes.margins(x=0.02)
    add_legend(axes, finals)
    return figure


def data_uri(path: Path) -> str | None:
    """Return a PNG as the source of a picture in a page; None if there is no such file."""
    if not path.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def curve_axes(title: str) -> tuple["Figure", "Axes"]:
    """Return a figure for curves of validation accuracy by epoch, and its axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    axes = add_axes(figure, title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    return figure, axes


def add_axes(figure: "Figure", title: str, grid: Literal["x", "y", "both"] = "y") -> "Axes":
    """Return the axes of a figure, in the style of all figures of a report."""
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def add_curve(axes: "Axes", curve: Curve, index: int, label: str) -> None:
    """Draw the mean over the seeds within its range, in per cent; ``index`` chooses colour and marker."""
    colour = COLOURS[index % len(COLOURS)]
    epochs, means = curve.epochs, [100 * value for value in curve.over_seeds(mean)]
    if len(curve.seeds) > 1:
        low, high = ([100 * value for value in curve.over_seeds(statistic)] for statistic in (min, max))
        if len(epochs) > 1:
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(epochs, low, high, color=colour)
    every = max(1, -(-len(epochs) // 8))
    axes.plot(
        epochs,
        means,
        label=label,
        color=colour,
        linestyle=_DASHES[index % len(_DASHES)],
        linewidth=1.8,
        marker=MARKERS[index % len(MARKERS)],
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=((len(epochs) - 1) % every, every),  # the last epoch always has its marker
    )


def add_legend(axes: "Axes", values: Sequence[float]) -> None:
    """Name the curves beside the axes, the one with the highest last value on top."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        handlelength=4.2,
        labelspacing=0.75,
        title="last epoch (%)",
        alignment="left",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_references(axes: "Axes", results: Results, low: float, high: float) -> None:
    """Draw the teacher and chance, unless they lie so far off that they would flatten the curves."""
    span = max(high - low, 1.0)
    teacher = results.teacher
    chance = 100 / results.dataset.classes
    where: dict[str, Any] = {
        "color": "#444444",
        "fontsize": 9,
        "transform": axes.get_yaxis_transform(),
        "parse_math": False,
    }
    if teacher is not None:
        accuracy = 100 * teacher.top1
        text = f"{teacher_title(results)}: {percent(teacher.top1, teacher.n)} %"
        if low - 0.5 * span <= accuracy <= low + 1.6 * span:
            axes.axhline(accuracy, color="#444444", linestyle="--", linewidth=1.1, zorder=1)
            axes.text(0.01, accuracy, text, va="bottom", **where)
        else:
            axes.text(0.01, 0.985, f"{text} (beyond this axis)", va="top", **{**where, "transform": axes.transAxes})
    if chance >= low - 0.5 * span:
        axes.axhline(chance, color="#444444", linestyle=":", linewidth=1.1, zorder=1)
        axes.text(0.99, chance, "chance", va="bottom", ha="right", **where)
