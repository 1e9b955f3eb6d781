"""Accuracy against the time for an image: a chart for the page, and the same as a static figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING

from deitkit.report.charts import INK, Chart, chart_layout, legend_above
from deitkit.report.figures import (
    MARKERS,
    add_axes,
    colours_of,
    figure_beside_legend,
    teacher_title,
    write_png_and_svg,
)
from deitkit.report.numbers import milliseconds, percent
from deitkit.report.table_layout import WINNER_MARK
from deitkit.run.difference import Interval
from deitkit.run.metrics import EpochMetrics
from deitkit.run.reported import reported_rows
from deitkit.run.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Plotly's names of matplotlib's markers.
_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "h": "hexagon",
}
_TEACHER_MARKER = "D"
_STUDENT_MARKERS = tuple(marker for marker in MARKERS if marker != _TEACHER_MARKER)


@dataclass(frozen=True)
class CostPoint:
    """A model in the chart.

    Attributes:
        name: For the legend.
        colour: Of its curve; the teacher's is ``INK``.
        marker: Of matplotlib.
        milliseconds: For a single image.
        top1: On the test images, as a fraction.
        ci95: Of ``top1``; None for the teacher, and where folds are equal.
        n: Test images.
        is_winner: Whether it is the student that won, maybe by another readout or its averaged weights.
    """

    name: str
    colour: str
    marker: str
    milliseconds: float
    top1: float
    ci95: Interval | None
    n: int
    is_winner: bool = False

    @property
    def legend(self) -> str:
        """Its name, accuracy and time."""
        mark = f"{WINNER_MARK} " if self.is_winner else ""
        return f"{mark}{self.name}  {percent(self.top1, self.n)} %, {milliseconds(self.milliseconds)} ms"


def cost_points(results: Results, metrics: Sequence[EpochMetrics]) -> list[CostPoint]:
    """Return a point for each student by its last weights, the baseline and the teacher; empty without costs."""
    colours, winner = colours_of(metrics, results.rows), results.row(results.winner)
    rows = [row for row in reported_rows(results.rows) if row.weights == "last" and row.kind != "checkpoint"]
    points = [
        CostPoint(
            row.method,
            colours[row.method],
            _STUDENT_MARKERS[place % len(_STUDENT_MARKERS)],
            row.cost.milliseconds,
            row.top1_mean,
            row.top1_ci95,
            row.n,
            is_winner=winner is not None and row.method == winner.method,
        )
        for place, row in enumerate(rows)
        if row.cost is not None and row.top1_mean is not None
    ]
    teacher = results.teacher
    if points and teacher is not None and teacher.cost is not None and teacher.test_top1 is not None:
        taken, images = teacher.cost.milliseconds, results.dataset.test
        title = teacher_title(results)
        points.append(CostPoint(title, INK, _TEACHER_MARKER, taken, teacher.test_top1, None, images))
    return points


def cost_chart(results: Results, metrics: Sequence[EpochMetrics]) -> Chart | None:
    """Return the interactive chart; None without costs."""
    points = cost_points(results, metrics)
    if not points:
        return None
    data: list[Chart] = []
    for point in points:
        trace: Chart = {
            "type": "scatter",
            "mode": "markers",
            "name": escape(point.legend),
            "x": [point.milliseconds],
            "y": [100 * point.top1],
            "marker": {
                "color": point.colour,
                "size": 18 if point.is_winner else 13,
                "symbol": _SYMBOLS[point.marker],
                "line": {"color": INK, "width": 3 if point.is_winner else 0},
            },
            "hovertemplate": "%{data.name}<extra></extra>",
        }
        if point.ci95 is not None:
            low, high = point.ci95
            up, down = [100 * (high - point.top1)], [100 * (point.top1 - low)]
            bar = {"type": "data", "color": INK, "thickness": 1.5, "width": 4}
            trace["error_y"] = bar | {"array": up, "arrayminus": down}
        data.append(trace)
    layout = chart_layout(height=460)
    layout["xaxis"] |= {"title": {"text": "ms for an image"}, "range": [0, _widest(points)]}
    if _is_wide(points):
        ends = [log10(end) for end in _log_ends(points)]
        layout["xaxis"] |= {"title": {"text": "ms for an image (logarithmic)"}, "type": "log", "range": ends}
    layout["yaxis"]["title"] = {"text": "top-1 on the test set (%)"}
    layout["legend"] = legend_above()
    return {"data": data, "layout": layout}


def _is_wide(points: Sequence[CostPoint]) -> bool:
    """Return whether times differ so much that their axis is better logarithmic."""
    times = [point.milliseconds for point in points]
    return max(times) > 8 * min(times)


def _widest(points: Sequence[CostPoint]) -> float:
    return 1.15 * max(point.milliseconds for point in points)


def _log_ends(points: Sequence[CostPoint]) -> tuple[float, float]:
    times = [point.milliseconds for point in points]
    return min(times) / 1.5, max(times) * 1.5


def write_costs(results: Results, metrics: Sequence[EpochMetrics], folder: Path) -> list[Path]:
    """Write ``cost.png`` and ``cost.svg``; nothing without costs.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    points = cost_points(results, metrics)
    return write_png_and_svg(lambda: _draw(results, points), folder, "cost") if points else []


def _draw(results: Results, points: Sequence[CostPoint]) -> "Figure":
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = figure_beside_legend([point.legend for point in points], 4.4)
    axes = add_axes(figure, f"{results.dataset.name}: accuracy and speed", "both")
    for point in points:
        low, high = point.ci95 or (point.top1, point.top1)
        axes.errorbar(
            point.milliseconds,
            100 * point.top1,
            yerr=[[100 * (point.top1 - low)], [100 * (high - point.top1)]],
            label=point.legend,
            color=point.colour,
            ecolor=INK,
            marker=point.marker,
            markersize=13 if point.is_winner else 9,
            markeredgecolor="black" if point.is_winner else "white",
            capsize=3,
            linestyle="none",
        )
    axes.set_xlabel("ms for an image, on the machine of the run")
    axes.set_xlim(0, _widest(points))
    if _is_wide(points):
        axes.set_xscale("log")
        axes.set_xlim(*_log_ends(points))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("ms for an image, on the machine of the run (logarithmic)")
    axes.set_ylabel("top-1 on the test images (%)")
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=0.9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
