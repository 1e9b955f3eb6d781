"""The interactive charts of the page, as plain Plotly figures: names in them are escaped, since Plotly reads HTML."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from deitkit.report.figures import (
    COLOURS,
    Curve,
    accuracy_range,
    colours_of,
    curves_of,
    fitting_references,
    mean,
    teacher_title,
)
from deitkit.report.numbers import Number, percent
from deitkit.report.table_layout import WINNER_MARK
from deitkit.run.metrics import EpochMetrics
from deitkit.run.results import Results, Row

Chart = dict[str, Any]
Value = Callable[[EpochMetrics], Number | None]

INK = "#76808f"  # legible on the page's light and dark ground alike
_GRID = "rgba(128,136,150,0.22)"
_ROW_PX = 50
# Of the curves of the first seven students, of the next seven, ...: of losses from labels, and from the teacher.
_DASHES, _TEACHER_DASHES = ("solid", "dot", "longdash"), ("dash", "dashdot", "longdashdot")


def accuracy_chart(results: Results, metrics: Sequence[EpochMetrics]) -> Chart:
    """Return top-1 of every row: the mean, its 95 % interval, and one dot per seed; last the teacher."""
    rows = sorted(results.rows, key=lambda row: row.kind == "baseline")
    colours = colours_of(metrics, results.rows)
    data: list[Chart] = []
    notes: list[Chart] = []
    for index, row in enumerate(rows):
        data += _row_traces(row, index, colours[row.method], results)
        value = "stopped" if row.top1_mean is None else percent(row.top1_mean, row.n)
        text = f"<b>{value}</b>  {escape(row.row)}"
        if row.row == results.winner:
            text = f"<b>{WINNER_MARK} {text}</b>"
        notes.append(_note(text, index))
    count = len(rows)
    if results.teacher is not None and results.teacher.test_top1 is not None:
        data.append(_teacher_trace(results, results.teacher.test_top1, count))
        value = percent(results.teacher.test_top1, results.dataset.test)
        notes.append(_note(f"<b>{value}</b>  {escape(teacher_title(results))}", count))
        count += 1
    layout = chart_layout(height=_ROW_PX * count + 60, margin={"l": 4, "r": 4, "t": 12, "b": 44})
    layout["yaxis"] = {"range": [count - 0.35, -0.75], "visible": False, "fixedrange": True}
    layout["xaxis"] |= {"title": {"text": "top-1 on the test set (%)"}, "fixedrange": True, "range": _padded(data)}
    layout["annotations"] = notes
    layout["shapes"] = _none_line(results)
    return {"data": data, "layout": layout}


def _note(text: str, index: int) -> Chart:
    """Return a row's short name, above its bar rather than beside the axis: it then fits a phone."""
    place = {"xref": "paper", "x": 0, "xanchor": "left", "y": index, "yshift": 15}
    return {**place, "text": text, "align": "left", "showarrow": False, "font": {"size": 12.5}}


def _teacher_trace(results: Results, top1: float, index: int) -> Chart:
    return {
        "type": "scatter",
        "mode": "markers",
        "showlegend": False,
        "name": escape(teacher_title(results)),
        "x": [100 * top1],
        "y": [index],
        "marker": {"color": INK, "size": 12, "symbol": "diamond"},
        "hovertemplate": "%{x:.2f} %<extra>%{data.name}</extra>",
    }


def curve_charts(results: Results, metrics: Sequence[EpochMetrics]) -> dict[str, Chart]:
    """Return the curves by title: accuracy, training loss, its terms, learning rate; empty where there is no metric."""
    if not metrics:
        return {}
    terms = list(dict.fromkeys(name for line in metrics for name in line.terms or {}))
    charts = {
        "Accuracy": _curve_chart(results, metrics, {"": _accuracy}, "validation accuracy (%)", descending=True),
        "Training loss": _curve_chart(results, metrics, {"": lambda line: line.train_loss}, "training loss"),
        "Loss terms": _curve_chart(results, metrics, {name: _term(name) for name in terms}, "term of the loss"),
        "Learning rate": _curve_chart(results, metrics, {"": lambda line: line.learning_rate}, "learning rate"),
    }
    accuracies = curves_of(metrics, lambda line: line.main_accuracy)
    if accuracies:
        references = fitting_references(results, accuracies)
        ends = [*accuracy_range(accuracies), *references.values()]
        pad = max(0.05 * (max(ends) - min(ends)), 0.5)
        charts["Accuracy"]["layout"]["yaxis"]["range"] = [min(ends) - pad, max(ends) + pad]
        charts["Accuracy"]["layout"]["shapes"] = _reference_lines(results, references)
    return {title: chart for title, chart in charts.items() if chart["data"]}


def _row_traces(row: Row, index: int, colour: str, results: Results) -> list[Chart]:
    traces: list[Chart] = []
    averaged = row.weights == "ema"
    shared = {"type": "scatter", "showlegend": False, "name": escape(row.label)}
    if row.top1_ci95 is not None:
        interval = [100 * bound for bound in row.top1_ci95]
        line = {"color": INK, "width": 3}
        hover = "95 % interval: %{x:.2f}<extra></extra>"
        traces.append(
            {
                **shared,
                "mode": "lines",
                "x": interval,
                "y": [index] * 2,
                "line": line,
                "hovertemplate": hover,
            }
        )
    seen = [
        (number, 100 * top1) for number, top1 in zip(results.repetitions, row.top1, strict=False) if top1 is not None
    ]
    if len(results.repetitions) > 1:
        traces.append(
            {
                **shared,
                "mode": "markers",
                "x": [top1 for _, top1 in seen],
                "y": [index] * len(seen),
                "text": [f"{results.repetition} {number}" for number, _ in seen],
                "marker": {"color": colour, "size": 7, "symbol": "line-ns-open", "line": {"width": 2}},
                "hovertemplate": "%{text}: %{x:.2f} %<extra>%{data.name}</extra>",
            }
        )
    if row.top1_mean is not None:
        marker = {
            "color": colour,
            "size": 12,
            "symbol": "circle-open" if averaged else "circle",
            "line": {"width": 2.5, "color": colour},
        }
        hover = "%{x:.2f} %<extra>%{data.name}</extra>"
        mean_dot = {"mode": "markers", "x": [100 * row.top1_mean], "y": [index], "marker": marker}
        traces.append({**shared, **mean_dot, "hovertemplate": hover})
    return traces


def _padded(data: list[Chart]) -> list[Number] | None:
    values = [value for trace in data for value in trace["x"]]
    if not values:
        return None
    pad = max(0.05 * (max(values) - min(values)), 0.5)
    return [min(values) - pad, max(values) + pad]


def _none_line(results: Results) -> list[Chart]:
    """A thin line through the row that all others are compared with."""
    reference = results.reference
    if reference is None or reference.top1_mean is None:
        return []
    place = 100 * reference.top1_mean
    line = {"color": INK, "width": 1, "dash": "dot"}
    return [
        {"type": "line", "yref": "paper", "x0": place, "x1": place, "y0": 0, "y1": 1, "line": line, "layer": "below"}
    ]


def _curve_chart(
    results: Results,
    metrics: Sequence[EpochMetrics],
    values: dict[str, Value],
    title: str,
    *,
    descending: bool = False,
) -> Chart:
    """Return curves of every student, in the order of their last values: the best student is first."""
    colours = colours_of(metrics)
    students = list(colours)
    data: list[Chart] = []
    for term, value in values.items():
        dashes = _DASHES if term in ("", "labels") else _TEACHER_DASHES
        curves = curves_of(metrics, value)
        for curve in sorted(curves, key=lambda curve: curve.over_seeds(mean)[-1], reverse=descending):
            dash = dashes[students.index(curve.student) // len(COLOURS) % len(dashes)]  # where colours repeat
            data += _curve_traces(curve, term, colours[curve.student], dash, results.repetition)
    layout = chart_layout(height=460)
    last = max(line.epoch for line in metrics)
    layout["xaxis"] |= {"title": {"text": "epoch"}, "tickformat": "d", "dtick": 1 if last <= 10 else None}
    layout["yaxis"]["title"] = {"text": title}
    layout["legend"] = legend_above()
    layout["hovermode"] = "x unified"
    return {"data": data, "layout": layout}


def _curve_traces(curve: Curve, term: str, colour: str, dash: str, repetition: str) -> list[Chart]:
    """The range over seeds or folds, the mean, and one line for each that a box on the page switches on."""
    name = escape(f"{curve.student}: {term}" if term else curve.student)
    epochs, middle = curve.epochs, curve.over_seeds(mean)
    shared = {"type": "scatter", "name": name, "legendgroup": name}
    hidden = {"showlegend": False, "hoverinfo": "skip"}
    mode = "lines" if len(epochs) > 1 else "markers"
    traces: list[Chart] = []
    if len(curve.seeds) > 1:
        outline = [*curve.over_seeds(max), *reversed(curve.over_seeds(min))]
        band = {
            "mode": "lines",
            "fill": "toself",
            "line": {"width": 0, "color": colour},
            "opacity": 0.18,
            "fillcolor": colour,
        }
        traces.append({**shared, **hidden, **band, "x": [*epochs, *reversed(epochs)], "y": outline, "meta": "range"})
    main = {"mode": mode, "x": epochs, "y": middle, "meta": "mean", "hovertemplate": "%{y:.4~g}"}
    traces.append(
        {
            **shared,
            **main,
            "line": {"color": colour, "width": 2.4, "dash": dash},
            "marker": {"color": colour, "size": 9},
        }
    )
    if len(curve.seeds) > 1:
        for seed, values in curve.seeds.items():
            each = {"x": list(values), "y": list(values.values()), "mode": mode, "meta": "seed", "visible": False}
            style = {"line": {"color": colour, "width": 1}, "marker": {"color": colour, "size": 5}}
            traces.append({**shared, **each, **style, "name": f"{name}, {repetition} {seed}", "showlegend": False})
    return traces


def _reference_lines(results: Results, found: dict[str, float]) -> list[Chart]:
    """The teacher (dashed) and chance (dotted), named on the line."""
    looks = {"chance": ("chance", "dot", "bottom")}
    if results.teacher is not None:
        looks["teacher"] = (teacher_title(results), "dash", "top")
    return [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": accuracy,
            "y1": accuracy,
            "line": {"color": INK, "width": 1.2, "dash": dash},
            "label": {
                "text": escape(title),
                "textposition": "start",
                "yanchor": anchor,
                "font": {"color": INK, "size": 11},
            },
        }
        for name, (title, dash, anchor) in looks.items()
        if (accuracy := found.get(name)) is not None
    ]


def _accuracy(line: EpochMetrics) -> Number | None:
    return None if line.main_accuracy is None else 100 * line.main_accuracy


def _term(name: str) -> Value:
    return lambda line: (line.terms or {}).get(name)


def legend_above() -> Chart:
    """Return the position of a legend above the plot, at the same distance for any height, which the page adds to."""
    place = {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"}
    return {**place, "tracegroupgap": 0, "maxheight": 0.9}  # by default it is cut at half of the height


def chart_layout(height: int, margin: dict[str, int] | None = None) -> Chart:
    """Return what all charts share: grounds that show the page's, colours legible in light and dark."""
    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": _GRID, "automargin": True}
    return {
        "height": height,
        "margin": margin or {"l": 56, "r": 12, "t": 12, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 12.5, "color": INK},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }
