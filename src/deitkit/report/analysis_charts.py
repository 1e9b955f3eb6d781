"""The interactive charts of the analysis, as plain Plotly figures."""

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from deitkit.report.charts import INK, Chart, chart_layout, legend_above
from deitkit.report.figures import COLOURS
from deitkit.report.published import PAPER_COSINES
from deitkit.run.analysis import ClassSummary, ReliabilityBin, RowSummary, TokenSimilarity

MOST_CLASSES = 100  # of a matrix that is drawn whole; of more classes those that are most confused are drawn
LABEL_LENGTH = 28
FEW = 0.01  # of all images: a bin with fewer tells little of a row's calibration
_RIGHT, _WRONG = "0,114,178", "213,94,0"  # of the palette's first two colours, so that alpha can be added
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")
Colour = Callable[[str], str]


def class_labels(names: Sequence[str]) -> list[str]:
    """Return names that are short, escaped and all different (ImageNet has two cranes), for an axis of categories."""
    short = [name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…" for name in names]
    counts = Counter(short)
    return [escape(text if counts[text] == 1 else f"{text} ({place})") for place, text in enumerate(short)]


def similarity_chart(tokens: Sequence[TokenSimilarity], colour: Colour) -> Chart:
    """Return the cosine of class and distillation token by layer: the mean over images, within one deviation."""
    depth = max(len(entry.cosine) for entry in tokens) - 1
    places = ["learned", "input", *(str(block) for block in range(1, depth + 1))]
    data: list[Chart] = []
    for entry in tokens:
        name, means = escape(entry.student), entry.cosine
        line = {"color": colour(entry.student), "width": 2.4, "dash": _dash(entry.student)}
        error = {"type": "data", "array": [0, *entry.deviation], "thickness": 1, "width": 3}
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "line": line, "error_y": error,
            "x": places[: len(means) + 1], "y": [entry.learned, *means],
            "hovertemplate": "%{x}: %{y:.3f}<extra>%{data.name}</extra>",
        })  # fmt: skip
    data.append({
        "type": "scatter", "mode": "markers", "name": "paper (ImageNet, DeiT-B)",
        "x": ["learned", places[-1]], "y": [PAPER_COSINES["learned"], PAPER_COSINES["last"]],
        "marker": {"color": INK, "size": 11, "symbol": "diamond-open", "line": {"width": 2}},
        "hovertemplate": "%{y:.2f}<extra>%{data.name}</extra>",
    })  # fmt: skip
    layout = chart_layout(height=400)
    layout["xaxis"] |= {"type": "category", "title": {"text": "after block"}}
    layout["yaxis"] |= {"title": {"text": "cosine"}, "zeroline": True, "zerolinecolor": INK}
    return {"data": data, "layout": layout | {"legend": legend_above()}}


def reliability_charts(rows: Sequence[RowSummary], colour: Colour) -> dict[str, Chart]:
    """Return by student, first the teacher, accuracy against confidence of each of its readouts."""
    groups: dict[str, list[RowSummary]] = {}
    for row in rows:
        groups.setdefault(row.row.partition("/")[0], []).append(row)
    charts = {}
    for name, members in groups.items():
        line = {"color": INK, "width": 1.2, "dash": "dot"}
        diagonal = {"type": "line", "x0": 0, "y0": 0, "x1": 100, "y1": 100, "line": line, "layer": "below"}
        layout = chart_layout(height=440)
        layout["xaxis"] |= {"title": {"text": "confidence (%)"}, "range": [0, 102]}
        layout["yaxis"] |= {"title": {"text": "accuracy (%)"}, "range": [-2, 102]}
        data = [trace for place, row in enumerate(members) for trace in _reliability_traces(row, place, colour(name))]
        charts[name] = {"data": data, "layout": layout | {"shapes": [diagonal], "legend": legend_above()}}
    return charts


def _reliability_traces(row: RowSummary, place: int, colour: str) -> list[Chart]:
    """Return the bins as dots on a line, and apart from it as hollow ones those of too few images."""
    total, most = sum(entry.count for entry in row.reliability), max(entry.count for entry in row.reliability)
    colour = colour if place == 0 else COLOURS[(COLOURS.index(colour) + place) % len(COLOURS)]

    def trace(bins: list[ReliabilityBin], **look: Any) -> Chart:
        # area in proportion to images, down to what a finger still hits
        marker = {"color": colour, "size": [max(5, 20 * (entry.count / most) ** 0.5) for entry in bins]}
        return {
            "type": "scatter", "name": escape(row.row), "legendgroup": row.row,
            "x": [100 * entry.confidence for entry in bins], "y": [100 * entry.accuracy for entry in bins],
            "text": [f"{entry.count:,} images" for entry in bins], "line": {"color": colour, "width": 2},
            "hovertemplate": "confidence %{x:.1f} %, accuracy %{y:.1f} %, %{text}<extra>%{data.name}</extra>",
            "marker": marker | look.pop("marker"), **look,
        }  # fmt: skip

    few = [entry for entry in row.reliability if entry.count < FEW * total]
    enough = [entry for entry in row.reliability if entry.count >= FEW * total]
    traces = [trace(enough, mode="lines+markers", marker={"opacity": 0.75})]
    if few:
        hollow = {"symbol": "circle-open", "line": {"width": 1.5}}
        traces.append(trace(few, mode="markers", showlegend=False, marker=hollow))
    return traces


def accuracy_by_class_chart(classes: Sequence[ClassSummary], names: Sequence[str], colour: Colour) -> Chart:
    """Return one dot for every class and row, the hardest class on top."""
    known = {
        place: [share for entry in classes if (share := entry.accuracy[place]) is not None]
        for place in range(len(names))
    }
    order = sorted((place for place, values in known.items() if values), key=lambda p: sum(known[p]) / len(known[p]))
    labels = class_labels(names)
    data = [
        {
            "type": "scatter", "mode": "markers", "name": escape(entry.row),
            "x": [None if (share := entry.accuracy[p]) is None else 100 * share for p in order],
            "y": [labels[p] for p in order],
            "marker": {
                "color": colour(entry.row.partition("/")[0]), "opacity": 0.85,
                "size": 9 if len(order) <= 40 else 5, "symbol": _SYMBOLS[number % len(_SYMBOLS)],
            },
            "hovertemplate": "%{y}: %{x:.1f} %<extra>%{data.name}</extra>",
        }
        for number, entry in enumerate(classes)
    ]  # fmt: skip
    layout = chart_layout(height=130 + min(26 * len(order), 900))
    layout["xaxis"] |= {"title": {"text": "accuracy (%)"}, "rangemode": "tozero"}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed"}
    return {"data": data, "layout": layout | {"legend": legend_above()}}


def confusion_charts(classes: Sequence[ClassSummary], names: Sequence[str]) -> dict[str, Chart]:
    """Return by row of the table the shares of each true class that were predicted to be of each class."""
    return {entry.row: _confusion_chart(entry, names) for entry in classes}


def drawn_classes(entry: ClassSummary, count: int) -> list[int]:
    """Return which classes a matrix shows: all, or of very many those that are confused most."""
    if count <= MOST_CLASSES:
        return list(range(count))
    mistakes = [triple for triple in entry.confusion if triple[0] != triple[1]]
    chosen: dict[int, None] = {}
    for true, decided, _ in sorted(mistakes, key=lambda triple: -triple[2]):
        if len(chosen.keys() | {true, decided}) > MOST_CLASSES // 2:
            break
        chosen |= {true: None, decided: None}
    return sorted(chosen)


def _confusion_chart(entry: ClassSummary, names: Sequence[str]) -> Chart:
    places = {place: index for index, place in enumerate(drawn_classes(entry, len(names)))}
    labels = [class_labels(names)[place] for place in places]
    totals: Counter[int] = Counter()
    for true, _, count in entry.confusion:
        totals[true] += count
    wrong: list[list[float | None]] = [[None] * len(places) for _ in places]
    counts = [[0] * len(places) for _ in places]
    right: list[float | None] = [None] * len(places)
    for true, decided, count in entry.confusion:
        if true in places and decided in places:
            row, column, share = places[true], places[decided], round(100 * count / totals[true], 2)
            if row == column:
                right[row] = share
            else:
                wrong[row][column], counts[row][column] = share, count
    text = {"texttemplate": "%{z:.0f}"} if len(places) <= 20 else {}
    # Without both ends, Plotly fits the scale to the values, and the smallest share has no colour.
    shared = {"type": "heatmap", "showscale": False, "xgap": 1, "ygap": 1, "zmin": 0, "zmax": 100} | text
    hover = "%{y}, predicted as %{x}: %{z:.1f} %"
    data = [
        shared | {"x": labels, "y": labels, "z": right, "colorscale": _fading(_RIGHT),
                  "hovertemplate": "%{y}, correct: %{z:.1f} %<extra></extra>"},
        shared | {"x": labels, "y": labels, "z": wrong, "customdata": counts, "colorscale": _fading(_WRONG),
                  "hovertemplate": f"{hover} (%{{customdata}} images)<extra></extra>"},
    ]  # fmt: skip
    layout = chart_layout(height=170 + min(max(30 * len(places), 150), 700))
    category = {"type": "category", "categoryorder": "array", "categoryarray": labels, "showgrid": False}
    layout["xaxis"] |= category | {"title": {"text": "predicted class", "standoff": 12}}
    layout["yaxis"] |= category | {"title": {"text": "true class", "standoff": 12}, "autorange": "reversed"}
    return {"data": data, "layout": layout}


def _fading(colour: str) -> list[list[Any]]:
    """Return a scale from the page's ground to a colour, steep at first, so that few mistakes are seen."""
    return [[place, f"rgba({colour},{alpha})"] for place, alpha in ((0, 0), (0.05, 0.2), (0.3, 0.45), (1, 0.75))]


def _dash(student: str) -> str:
    return "dash" if student.endswith("+ema") else "solid"
