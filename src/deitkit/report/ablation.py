"""The report of an ablation: its table, and a chart of its differences to the base."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from deitkit.report.charts import INK, Chart, chart_layout
from deitkit.report.figures import COLOURS, add_axes, write_png_and_svg
from deitkit.report.footnotes import ONE_SEED, STATUS_MARK, interval_words, spread_note, stopped_notes, test_names
from deitkit.report.numbers import NOTHING, interval, millions, p_value, percent, points, whole
from deitkit.report.table_layout import Column, Layout, Line, accuracy, lay_out, provenance_of, title_of
from deitkit.run.difference import Difference
from deitkit.run.results import AblationResults, Results, VariantRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = (
    Column("changed", "what changed", 5, numeric=False),
    Column("teacher", "teacher", 4, numeric=False),
    Column("teacher_top1", "teacher %", 3),
    Column("top1", "top-1 %", 0),
    Column("difference", "vs base", 1),
    Column("interval", "95 % interval", 6),
    Column("p", "p", 2),
    Column("agreement", "agreement %", 8),
    Column("parameters", "params", 9),
    Column("seconds", "seconds", 10),
)


def lay_out_any(results: Results) -> Layout:
    """Lay out an ablation by its variants, any other comparison by its methods."""
    return lay_out_variants(results) if isinstance(results, AblationResults) else lay_out(results)


def lay_out_variants(results: AblationResults) -> Layout:
    """Return an ablation's results as columns, lines and footnotes, without empty columns."""
    lines = tuple(_line(row, results) for row in results.rows)
    used = {key for line in lines for key, cell in line.cells.items() if cell != NOTHING}
    return Layout(
        title=title_of(results),
        columns=tuple(column for column in _COLUMNS if column.key in used),
        lines=lines,
        published_only=(),
        footnotes=tuple(_footnotes(results)),
        advice="",
        verdict=results.verdict,
        provenance=provenance_of(results),
    )


def _line(row: VariantRow, results: AblationResults) -> Line:
    images, difference = row.n, row.differences.get("base")
    cells = {
        "changed": row.changed or NOTHING,
        "teacher": row.teacher_name or NOTHING,
        "teacher_top1": percent(row.teacher_test_top1, images),
        "top1": accuracy(row) + (STATUS_MARK if row.status != "ok" else ""),
        "difference": points(difference, images),
        "interval": interval(difference, images),
        "p": p_value(difference),
        "agreement": percent(row.teacher_agreement, images),
        "parameters": millions(row.parameters),
        "seconds": whole(row.train_seconds),
    }
    name = _short(row, results)
    return Line(name, name, cells, group=row.method, link=f"variants/{row.variant}/report.html")


def _short(row: VariantRow, results: AblationResults) -> str:
    """Name a row by its variant alone where there is only one method."""
    ending = "+ema" if row.weights == "ema" else ""
    return row.variant + ending if len({other.method for other in results.rows}) == 1 else row.row


def _footnotes(results: AblationResults) -> list[str]:
    rows = results.rows
    students = ", ".join(dict.fromkeys(f"{row.method}/{row.readout}" for row in rows))
    notes = [f"top-1 of {students}: {spread_note(results)}, on {rows[0].n:,} test images; weights of the last epoch."]
    tests = test_names(row.differences.get("base") for row in rows)
    if tests:
        notes.append(
            f"vs base: points of top-1 more than the base's same row on the same test images, {interval_words(tests)}."
        )
    if tests and len(results.seeds) == 1:
        notes.append(ONE_SEED)
    return notes + stopped_notes(rows) + list(results.notes)


def difference_chart(results: AblationResults) -> Chart:
    """Return the differences to the base, in points of top-1, with their 95 % intervals."""
    rows = _compared(results)
    data: list[Chart] = []
    for index, (row, difference) in enumerate(rows):
        low, middle, high = _in_points(difference)
        colour = _colour(row, results)
        error = {"type": "data", "symmetric": False, "array": [high - middle], "arrayminus": [middle - low]}
        symbol = "circle" if difference.is_significant else "circle-open"
        shown = f"{points(difference, row.n)} points {interval(difference, row.n)}, p = {p_value(difference)}"
        data.append(
            {
                "type": "scatter",
                "showlegend": False,
                "name": escape(row.row),
                "x": [middle],
                "y": [index],
                "mode": "markers",
                "marker": {"color": colour, "size": 11, "symbol": symbol, "line": {"color": colour, "width": 2.5}},
                "error_x": {**error, "color": INK, "thickness": 2, "width": 0},
                "hovertemplate": f"{escape(shown)}<extra>%{{data.name}}</extra>",
            }
        )
    layout = chart_layout(height=36 * len(rows) + 80, margin={"l": 4, "r": 12, "t": 12, "b": 48})
    layout["yaxis"] |= {
        "tickvals": list(range(len(rows))),
        "ticktext": [escape(_short(row, results)) for row, _ in rows],
        "range": [len(rows) - 0.4, -0.6],
        "fixedrange": True,
    }
    layout["xaxis"] |= {"title": {"text": "points"}, "fixedrange": True}
    zero = {"type": "line", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "layer": "below"}
    layout["shapes"] = [{**zero, "line": {"color": "#76808f", "width": 1, "dash": "dot"}}]
    return {"data": data, "layout": layout}


def write_differences(results: AblationResults, folder: Path) -> list[Path]:
    """Write ``differences.png`` and ``differences.svg``; nothing where no row could be compared.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    return write_png_and_svg(lambda: _draw(results), folder, "differences") if _compared(results) else []


def _draw(results: AblationResults) -> "Figure":
    from matplotlib.figure import Figure

    rows = _compared(results)
    figure = Figure(figsize=(9.6, 1.3 + 0.36 * len(rows)), layout="constrained")
    axes = add_axes(figure, title_of(results), "x")
    for index, (row, difference) in enumerate(rows):
        low, middle, high = _in_points(difference)
        colour = _colour(row, results)
        axes.plot([low, high], [index, index], color=INK, linewidth=2, zorder=1.5)
        face = colour if difference.is_significant else "white"
        axes.plot(middle, index, "o", color=colour, markersize=7, markerfacecolor=face, markeredgewidth=2)
    axes.axvline(0, color="#444444", linestyle=":", linewidth=1.1, zorder=1)
    axes.set_yticks(range(len(rows)), [_short(row, results) for row, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    corrected = ", corrected for the number of rows" if any(found.p_holm is not None for _, found in rows) else ""
    axes.set_xlabel(
        "points of top-1 more than the base, with the 95 % interval of each row alone\n"
        f"hollow: chance may explain it (p ≥ 0.05{corrected})"
    )
    return figure


def _compared(results: AblationResults) -> list[tuple[VariantRow, Difference]]:
    return [(row, row.differences["base"]) for row in results.rows if "base" in row.differences]


def _in_points(difference: Difference) -> tuple[float, float, float]:
    """Return lower bound, mean and upper bound of a difference in points."""
    low, high = difference.ci95 or (difference.mean,) * 2
    return 100 * low, 100 * difference.mean, 100 * high


def _colour(row: VariantRow, results: AblationResults) -> str:
    methods = list(dict.fromkeys(other.method for other in results.rows))
    return COLOURS[methods.index(row.method) % len(COLOURS)]
