"""The analysis on the page: from analysis.json and its pictures, readable at a thousand classes, safe with any name."""

import json
import random
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from PIL import Image

from deitkit.errors import CheckpointError
from deitkit.report.analysis import PublishedPair, Section, lay_out_analysis
from deitkit.report.analysis_charts import class_labels, confusion_charts, drawn_classes
from deitkit.report.write import write_report
from deitkit.run.analysis import Analysis, ClassSummary
from deitkit.run.results import parse_results
from report.test_report import CLASSES, HOSTILE, Page, make_folder, make_metrics, make_results

ROWS = ["teacher", "none/class", "token-hard/class", "token-hard/distillation", "token-hard/joint"]
STUDENTS = ["teacher", "none/class", "token-hard/joint"]


def make_classes(row: str, classes: int, n: int = 2000) -> dict[str, Any]:
    """A row that gets most images right and takes many of class 0 for class 1."""
    draw = random.Random(row)
    counts = {(0, 1): n // classes}
    for _ in range(n):
        true = draw.randrange(classes)
        said = true if draw.random() < 0.7 else draw.randrange(classes)
        counts[true, said] = counts.get((true, said), 0) + 1
    totals = [sum(count for (true, _), count in counts.items() if true == label) for label in range(classes)]
    mistakes = sorted(((count, pair) for pair, count in counts.items() if pair[0] != pair[1]), reverse=True)
    return {
        "row": row,
        "accuracy": [counts.get((c, c), 0) / totals[c] if totals[c] else None for c in range(classes)],
        "confusion": [[true, said, count] for (true, said), count in sorted(counts.items())],
        "most_confused": [
            {"true": t, "decided": d, "count": count, "of": totals[t], "share": count / totals[t]}
            for count, (t, d) in mistakes[:20]
        ],
    }


def make_analysis(classes: int = 10) -> dict[str, Any]:
    bins = [{"low": b / 15, "high": (b + 1) / 15, "count": 10 * b + 1, "confidence": (b + 0.5) / 15,
             "accuracy": b / 15} for b in range(15)]  # fmt: skip
    scores = {"seeds": [0, 1], "top1": 0.6, "ece": 0.051, "mce": 0.2, "nll": 1.25, "brier": 0.5, "reliability": bins}
    scores["ece_by_chance"] = 0.0123
    followed = {"agreement_overall": 0.65, "agreement_teacher_right": 0.7, "agreement_teacher_wrong": 0.3,
                "agreement_corrected": None, "divergence": 1.125}  # fmt: skip
    named = ["truth", *ROWS]
    return {
        "format": 2,
        "deitkit": "0.1.0",
        "created": "2026-11-25T13:00:00Z",
        "seeds": [0, 1],
        "n": 10000,
        "notes": ["The data have changed."],
        "disagreement": {
            "rows": named,
            "shares": [[abs(i - j) / 20 if i != j else 0.0 for j in range(6)] for i in range(6)],
        },
        "rows": [{"row": row, **scores, **(followed if row != "teacher" else {})} for row in ROWS],
        "classes": [make_classes(row, classes) for row in STUDENTS],
        "tokens": [{"student": "token-hard", "learned": 0.5, "cosine": [0.7, 0.9, 0.95], "deviation": [0, 0.1, 0.2]}],
        "attention": [{"student": "token-hard", "seed": 0, "file": "attention-token-hard.png", "images": [4, 2]}],
    }


def make_analyzed(folder: Path, analysis: dict[str, Any], results: dict[str, Any] | None = None) -> Path:
    make_folder(folder, results or make_results(), make_metrics())
    (folder / "analysis.json").write_text(json.dumps(analysis), encoding="utf-8")
    (folder / "analysis").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (30, 200, 30)).save(folder / "analysis" / "attention-token-hard.png")
    return folder


def laid_out(analysis: dict[str, Any], results: dict[str, Any], folder: Path) -> Section:
    return lay_out_analysis(Analysis.model_validate(analysis), parse_results(results), {}, folder)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder)[-1].read_text(encoding="utf-8"))


def test_the_page_shows_an_analysis_and_keeps_it(tmp_path: Path) -> None:
    folder = make_analyzed(tmp_path, make_analysis())
    page = page_of(folder)
    for text in (
        "Analysis: disagreement", "The data have changed.", "1.125", "5.10", "bird", "predicted as automobile",
        "what the tokens attend to",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.charts.keys() >= {"reliability", "by-class", "confusion", "similarity"}
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    (folder / "analysis.json").unlink()
    assert "Analysis" not in page_of(folder).text


def test_the_papers_figures_stand_beside_ours(tmp_path: Path) -> None:
    section = laid_out(make_analysis(), make_results(), tmp_path)
    published = {(pair.first, pair.second): (pair.ours, pair.paper) for pair in section.published}
    assert published["teacher", "token-hard/distillation"] == ("15.00", "10.0")
    assert published["truth", "token-hard/joint"] == ("25.00", "16.6")
    assert len(published) == 10
    alone = make_analysis() | {"disagreement": {"rows": ["truth", "none/class"], "shares": [[0, 0.4], [0.4, 0]]}}
    (pair,) = laid_out(alone, make_results(), tmp_path).published
    assert pair == PublishedPair(first="truth", second="none/class", ours="40.00", paper="18.2")


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_charts_are_valid_plotly_for_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    results = make_results()
    results["dataset"] |= {"class_names": [f"class {label}" for label in range(classes)], "classes": classes}
    section = laid_out(make_analysis(classes), results, tmp_path)
    for tabs in section.charts.values():
        for chart in tabs.values():
            go.Figure(chart)  # raises for any property that Plotly does not know
            assert chart["layout"]["height"] <= 1100
    drawn = len(section.charts["confusion"]["teacher"]["data"][1]["x"])
    assert drawn == classes if classes <= 100 else 2 <= drawn <= 50
    assert section.part_of_classes == (classes == 1000)
    assert len(json.dumps(section.charts)) < 2**21


def test_bins_of_few_images_are_hollow_and_not_on_the_line(tmp_path: Path) -> None:
    """The fixture's bins have 1, 11, 21, ... of 1,065 images: only the first has fewer than 1 %."""
    section = laid_out(make_analysis(), make_results(), tmp_path)
    line, hollow = section.charts["reliability"]["none"]["data"]
    assert (line["mode"], len(line["x"])) == ("lines+markers", 14)
    assert (hollow["mode"], hollow["text"], hollow["marker"]["symbol"]) == ("markers", ["1 images"], "circle-open")
    assert hollow["showlegend"] is False
    text = page_of(make_analyzed(tmp_path, make_analysis())).text
    assert "MCE" not in text
    assert "by chance %" in text
    assert "1.23" in text


@pytest.mark.parametrize("classes", [30, 31])
def test_the_precision_of_many_classes_is_folded_away_with_the_weakest_first(tmp_path: Path, classes: int) -> None:
    results, analysis = make_results(), make_analysis(classes)
    results["dataset"] |= {"class_names": [f"class {label}" for label in range(classes)], "classes": classes}
    for entry in analysis["classes"]:
        f1 = [None, *(1 - label / classes for label in range(1, classes))]
        entry |= {"f1": f1, "precision": [0.5] * classes}
    folder = make_analyzed(tmp_path, analysis, results)
    section = laid_out(analysis, results, folder)
    order = section.classes_of(section.analysis.classes[0])
    many = classes > 30
    assert order == ([*range(classes - 1, 0, -1), 0] if many else list(range(classes)))
    assert (f"All {classes} classes, the lowest F1 first" in page_of(folder).text) == many


def test_every_table_of_the_analysis_can_be_reached_and_is_named(tmp_path: Path) -> None:
    text = write_report(make_analyzed(tmp_path, make_analysis()))[-1].read_text(encoding="utf-8")
    scrolling = re.findall(r'<div class="card scroll"[^>]*>', text)
    assert len(scrolling) == 8
    assert all('tabindex="0" role="region" aria-label="' in tag for tag in scrolling)


def test_a_matrix_holds_the_share_of_each_mistake() -> None:
    confusion = ((0, 0, 3), (0, 2, 1), (2, 0, 5), (2, 2, 5))
    entry = ClassSummary(row="a", confusion=confusion, accuracy=(), most_confused=())
    right, wrong = confusion_charts([entry], ["x", "y", "z"])["a"]["data"]
    # Without both ends, the smallest share would have no colour, whatever it is.
    assert [(trace["zmin"], trace["zmax"]) for trace in (right, wrong)] == [(0, 100), (0, 100)]
    assert right["z"] == [75, None, 50]
    assert wrong["z"] == [[None, None, 25], [None] * 3, [50, None, None]]
    assert wrong["customdata"][2] == [5, 0, 0]


def test_of_very_many_classes_those_confused_most_are_drawn() -> None:
    entry = ClassSummary.model_validate(make_classes("teacher", 1000))
    drawn = drawn_classes(entry, 1000)
    assert {0, 1} <= set(drawn)
    assert drawn == sorted(set(drawn))
    assert drawn_classes(entry, 100) == list(range(100))


def test_labels_are_short_safe_and_all_different() -> None:
    labels = class_labels(["crane", "<b>", "crane", "a" * 40, "a" * 50])
    assert labels[:3] == ["crane (0)", "&lt;b&gt;", "crane (2)"]
    assert len(set(labels)) == 5
    assert max(len(label) for label in labels) < 40


def make_hostile_analysis(analysis: dict[str, Any], name: str = HOSTILE) -> dict[str, Any]:
    """Call everything by a hostile name that a run may call."""
    analysis["notes"] = [name]
    for entry in (*analysis["rows"], *analysis["classes"]):
        entry["row"] = f"{name}{entry['row']}"
    analysis["tokens"][0]["student"] = analysis["attention"][0]["student"] = name
    return analysis


def test_an_analysis_of_an_earlier_table_says_so(tmp_path: Path) -> None:
    results, analysis = make_results(), make_analysis()
    rows = [row["row"] for row in results["rows"]]
    analysis["rows"] = [{**analysis["rows"][1], "row": name} for name in ["teacher", *rows]]
    (fits := make_analyzed(tmp_path / "fits", analysis, results))
    note = "This is the analysis of an earlier table"
    write_report(fits)
    assert note not in (fits / "report.html").read_text(encoding="utf-8")
    for number, other in enumerate(([*rows, "gone/class"], rows[:-1])):
        analysis["rows"] = [{**analysis["rows"][0], "row": name} for name in ["teacher", *other]]
        folder = make_analyzed(tmp_path / str(number), analysis, results)
        write_report(folder)
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert (
            text.index("Analysis: disagreement") < text.index(note) < text.index('aria-label="Table of disagreement"')
        )


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    results, analysis = make_results(), make_analysis()
    plain = page_of(make_analyzed(tmp_path / "plain", analysis, results))
    results["dataset"]["class_names"] = [f"{HOSTILE}{place}" for place in range(len(CLASSES))]
    make_hostile_analysis(analysis)
    hostile = page_of(make_analyzed(tmp_path / "hostile", analysis, results))
    assert hostile.tags["script"] == plain.tags["script"] == len(hostile.scripts)
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    charts = hostile.charts
    texts = [label for chart in charts["confusion"].values() for label in chart["data"][0]["x"]]
    texts += [trace["name"] for trace in charts["similarity"][""]["data"]]
    texts += [trace["name"] for chart in charts["reliability"].values() for trace in chart["data"]]
    assert not any("<" in text for text in texts), "Plotly reads HTML in its texts"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 3}', '{"format": 2}'])
def test_a_file_that_is_no_analysis_gives_one_sentence(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path, make_results(), make_metrics())
    (folder / "analysis.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not an analysis of format 2: delete it, or run `deitkit analyze`"):
        write_report(folder)


def test_a_row_that_stopped_under_the_analyzed_seed_is_not_missing(tmp_path: Path) -> None:
    results, analysis = make_results(), make_analysis()
    analysis |= {"seeds": results["seeds"][-1:]}
    rows = [row["row"] for row in results["rows"] if row["top1"][-1] is not None]
    assert len(rows) < len(results["rows"])
    analysis["rows"] = [{**analysis["rows"][1], "row": name} for name in ["teacher", *rows]]
    folder = make_analyzed(tmp_path, analysis, results)
    write_report(folder)
    assert "This is the analysis of an earlier table" not in (folder / "report.html").read_text(encoding="utf-8")
