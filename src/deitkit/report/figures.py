"""Validation accuracy by epoch as a static figure (matplotlib), and the curves and colours that the page shares."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deitkit.report.numbers import Number, percent
from deitkit.run.metrics import EpochMetrics
from deitkit.run.results import Results, Row, TeacherCard
from deitkit.system.figure_file import save_figure
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
        """The epochs that all its seeds have: a mean over fewer of them would jump where one ends."""
        return sorted(set.intersection(*(set(values) for values in self.seeds.values())))

    def over_seeds(self, statistic: Callable[[Sequence[Number]], Number]) -> list[Number]:
        """Return a statistic over the seeds at each of `epochs`."""
        return [statistic([values[epoch] for values in self.seeds.values()]) for epoch in self.epochs]


def mean(values: Sequence[Number]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def curves_of(metrics: Sequence[EpochMetrics], value: Callable[[EpochMetrics], Number | None]) -> list[Curve]:
    """Gather one value per epoch, by student (in the order they appear) and seed; absent values leave a gap.

    A student whose seeds have no epoch in common has no curve.
    """
    gathered: dict[str, dict[int, dict[int, Number]]] = {}
    for line in metrics:
        number = value(line)
        if number is not None:
            gathered.setdefault(line.student, {}).setdefault(line.seed, {})[line.epoch] = number
    curves = [Curve(student, seeds) for student, seeds in gathered.items()]
    return [curve for curve in curves if curve.epochs]


@dataclass(frozen=True)
class Peak:
    """A student's highest mean validation accuracy, as a fraction, and its epoch; accuracy and loss of the last."""

    student: str
    highest: float
    epoch: int
    last: float
    last_epoch: int
    last_loss: float | None


def validation_peaks(metrics: Sequence[EpochMetrics]) -> list[Peak]:
    """Return the peak of each student, which selects nothing: a peak well above the end tells of overfitting."""
    losses = {
        curve.student: dict(zip(curve.epochs, curve.over_seeds(mean), strict=True))
        for curve in curves_of(metrics, lambda line: line.train_loss)
    }
    peaks = []
    for curve in curves_of(metrics, lambda line: line.main_accuracy):
        means, ends = curve.over_seeds(mean), curve.epochs[-1]
        place = max(range(len(means)), key=means.__getitem__)
        loss = losses.get(curve.student, {}).get(ends)
        peaks.append(Peak(curve.student, means[place], curve.epochs[place], means[-1], ends, loss))
    return peaks


def colours_of(metrics: Sequence[EpochMetrics], rows: Sequence[Row] = ()) -> dict[str, str]:
    """Return a colour for every student, the same in all figures, also of the rows of students without metrics."""
    students = dict.fromkeys([*(line.student for line in metrics), *(row.method for row in rows)])
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
            save_figure(path, figure, dpi=160, metadata=metadata)
    return list(paths)


def _draw(results: Results, curves: list[Curve]) -> "Figure":
    data = results.dataset
    count = len(results.repetitions)
    spread = f", mean and range over {count} {results.repetition}s" if count > 1 else ""
    finals = [curve.over_seeds(mean)[-1] for curve in curves]
    labels = curve_labels(curves, [percent(final, data.validation) for final in finals])
    figure, axes = curve_axes(f"{data.name}, {data.train:,} training images{spread}", labels)
    for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        add_curve(axes, curve, index, label)
    _draw_references(axes, results, curves)
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


def curve_labels(curves: Sequence[Curve], finals: Sequence[str]) -> list[str]:
    """Return each curve's name with its last value, and the epoch of that if other curves go on."""
    last = max(curve.epochs[-1] for curve in curves)
    ends = [f" (epoch {curve.epochs[-1]})" if curve.epochs[-1] < last else "" for curve in curves]
    return [f"{curve.student}  {final}{end}" for curve, final, end in zip(curves, finals, ends, strict=True)]


def figure_beside_legend(labels: Sequence[str], height: float) -> "Figure":
    """Return a figure with room for a legend beside the axes, at least ``height`` inches high."""
    from matplotlib.figure import Figure

    width = 9.6 + 0.08 * max(0, max(map(len, labels)) - 30)
    return Figure(figsize=(width, max(height, 0.8 + 0.28 * len(labels))), layout="constrained")


def curve_axes(title: str, labels: Sequence[str]) -> tuple["Figure", "Axes"]:
    """Return a figure for curves of validation accuracy by epoch with these labels, and its axes."""
    from matplotlib.ticker import MaxNLocator

    figure = figure_beside_legend(labels, 5.2)
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


def accuracy_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the lowest and the highest accuracy of any seed, in per cent."""
    values = [100 * value for curve in curves for seed in curve.seeds.values() for value in seed.values()]
    return min(values), max(values)


def fitting_references(results: Results, curves: Sequence[Curve]) -> dict[str, float]:
    """Return the accuracies of ``teacher`` and ``chance`` in per cent, but for those that would flatten the curves.

    A teacher that may have learned from the validation images never widens the axis.
    """
    low, high = accuracy_range(curves)
    span = max(high - low, 1.0)
    found = {"chance": 100 / results.dataset.classes}
    if results.teacher is not None and 100 * results.teacher.top1 <= (
        high if may_have_seen(results.teacher, *results.teachers) else low + 1.6 * span
    ):
        found["teacher"] = 100 * results.teacher.top1
    return {name: accuracy for name, accuracy in found.items() if accuracy >= low - 0.5 * span}


def may_have_seen(*teachers: TeacherCard) -> bool:
    """Return whether one came trained, so that the validation images may be among those that it learned from."""
    return any(teacher.fit == "none" for teacher in teachers)


def teacher_text(results: Results, curves: Sequence[Curve]) -> str:
    """Return the teacher's name and validation accuracy, with what a reader of the curves must know about it."""
    assert results.teacher is not None
    remarks = {
        "beyond this axis": "teacher" not in fitting_references(results, curves),
        "may have learned from these images": may_have_seen(results.teacher, *results.teachers),
    }
    text = f"{teacher_title(results)}: {percent(results.teacher.top1, results.teacher.n)} %"
    told = "; ".join(remark for remark, holds in remarks.items() if holds)
    return f"{text} ({told})" if told else text


def _draw_references(axes: "Axes", results: Results, curves: Sequence[Curve]) -> None:
    """Draw the teacher and chance, unless they lie so far off that they would flatten the curves."""
    fitting = fitting_references(results, curves)
    where: dict[str, Any] = {
        "color": "#444444",
        "fontsize": 9,
        "transform": axes.get_yaxis_transform(),
        "parse_math": False,
    }
    for name, style in (("teacher", "--"), ("chance", ":")):
        if name in fitting:
            axes.axhline(fitting[name], color="#444444", linestyle=style, linewidth=1.1, zorder=1)
    if "chance" in fitting:
        axes.text(0.99, fitting["chance"], "chance", va="bottom", ha="right", **where)
    if results.teacher is None:
        return
    text = teacher_text(results, curves)
    if "teacher" in fitting:
        axes.text(0.01, fitting["teacher"], text, va="bottom", **where)
    else:
        axes.text(0.99, 0.1, text, va="bottom", ha="right", **{**where, "transform": axes.transAxes})
