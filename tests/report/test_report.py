"""The report: what a reader of a run folder sees, in every format, also with hostile names and stopped students."""

import base64
import csv
import io
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

from deitkit.errors import CheckpointError
from deitkit.recipe.schema import Recipe
from deitkit.report.charts import accuracy_chart, curve_charts
from deitkit.report.cost_chart import _draw as _draw_costs
from deitkit.report.cost_chart import cost_chart, cost_points
from deitkit.report.figures import _draw as _draw_curves
from deitkit.report.figures import curve_labels, curves_of, teacher_text, validation_peaks
from deitkit.report.numbers import p_value
from deitkit.report.published import published_figures
from deitkit.report.table import rich_table, write_tables
from deitkit.report.table_layout import Layout, lay_out
from deitkit.report.write import write_report
from deitkit.run.difference import Difference
from deitkit.run.metrics import EpochMetrics, read_metrics
from deitkit.run.results import parse_results, read_results, write_results
from deitkit.system.files import write_bytes, write_text

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PUBLISHED = ("reproduction", "paper")
HOSTILE = """</script><script>alert(1)</script>'"`&|_100%#$~^\\{[x](y)"""
LABELS = {
    "none": "no distillation",
    "soft": "usual distillation",
    "hard": "hard distillation",
    "token-hard": "DeiT⚗ class + distillation",
    "class-only": "class token only",
    "cnn-baseline": "CNN baseline: cifar/resnet56",
}
TEACHERS = {"soft": "soft", "hard": "hard", "token-hard": "hard"}


def make_row(
    method: str, readout: str, top1: list[float | None], weights: str = "last", **changes: Any
) -> dict[str, Any]:
    finished = [value for value in top1 if value is not None]
    mean = sum(finished) / len(finished) if finished else None
    std = math.dist(finished, [mean] * len(finished)) / math.sqrt(len(finished) - 1) if len(finished) > 1 else None
    vs_labels: dict[str, Any] = {}
    if mean is not None and method != "none":
        interval = [mean - 0.609, mean - 0.593]
        vs_labels = {"mean": mean - 0.601, "ci95": interval, "p": 0.0003, "test": "paired t", "p_holm": None}
        vs_labels["ci95_new_images"] = None
    row = {
        "row": f"{method}/{readout}" + ("+ema" if weights == "ema" else ""),
        "label": f"{LABELS[method]} ({method}, {readout})" + (", EMA" if weights == "ema" else ""),
        "kind": "baseline" if method == "cnn-baseline" else "student",
        "reference": (method, weights) == ("none", "last"),
        "method": method,
        "readout": readout,
        "weights": weights,
        "labels": True,
        "teacher": TEACHERS.get(method),
        "tokens": "class+distillation" if method == "token-hard" else "class",
        "top1": top1,
        "top5": [None if value is None else value + 0.25 for value in top1],
        "n": 10000,
        "top1_mean": mean,
        "top1_std": std,
        "top1_ci95": [mean - 0.0094, mean + 0.0094] if mean is not None else None,
        "differences": {"labels": vs_labels} if vs_labels else {},
        "teacher_agreement": 0.687 if method in TEACHERS else None,
        "parameters": 1_213_456,
        "images_per_second": 155.2,
        "train_seconds": 640.4,
        "status": "ok",
    }
    return row | changes


def make_results(seeds: tuple[int, ...] = (0, 1), teacher: bool = True) -> dict[str, Any]:
    def spread(top1: float) -> list[float | None]:
        return [top1 + 0.002 * index for index in range(len(seeds))]

    stopped = "seed 1 stopped at step 120: loss is not finite (learning rate 0.01)"
    rows = [
        make_row("none", "class", spread(0.6)),
        make_row("none", "class", spread(0.604), weights="ema"),
        make_row("soft", "class", spread(0.6111)),
        make_row("hard", "class", [0.6205, *[None] * (len(seeds) - 1)], status=stopped if len(seeds) > 1 else "ok"),
        make_row("token-hard", "class", spread(0.6122)),
        make_row("token-hard", "distillation", spread(0.6201)),
        make_row("token-hard", "joint", spread(0.6233)),
        make_row("token-hard", "joint", spread(0.6244), weights="ema"),
        make_row("cnn-baseline", "class", spread(0.711), parameters=855_770),
    ]
    card = {
        "name": "cifar/resnet56",
        "source": "checkpoint resnet56.th (sha256 4bfd…)",
        "top1": 0.934,
        "n": 5000,
        "test_top1": 0.9339,
        "chance": 0.1,
        "verdict": "fit to teach",
        "weak": False,
        "parameters": 855_770,
        "image_px": 32,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "fit": "none",
    }
    return {
        "format": 1,
        "deitkit": "0.1.0",
        "created": "2026-11-22T22:00:00Z",
        "recipe": Recipe(name="cifar10-small", seeds=seeds, published=("reproduction", "paper")).model_dump(
            mode="json"
        ),
        "dataset": {
            "name": "cifar10",
            "train": 5000,
            "validation": 5000,
            "test": 10000,
            "classes": 10,
            "class_names": CLASSES,
            "image_px": [32, 32],
            "channels": 3,
            "skipped": 0,
            "fingerprint": "a3f19c",
        },
        "teacher": card if teacher else None,
        "teachers": [card] if teacher else [],
        "seeds": list(seeds),
        "rows": rows,
        "winner": "token-hard/joint",
        "verdict": "token-hard, read out jointly, wins: 62.43 % top-1, 2.33 points more than no distillation.",
        "published": [entry.model_dump() for entry in published_figures(PUBLISHED)],
        "machine": {"processor": "A processor", "cores": 2, "memory_gib": 24, "device": "cpu", "precision": "fp32"},
        "notes": ["soft: seed 1 was resumed at epoch 7"],
    }


def make_metrics(seeds: tuple[int, ...] = (0, 1), epochs: int = 20) -> list[dict[str, Any]]:
    lines = []
    for seed in seeds:
        for index, student in enumerate(LABELS):
            for epoch in range(1, epochs + 1):
                if student == "hard" and seed == 1 and epoch > 3:
                    break
                accuracy = 0.1 + (0.5 + 0.02 * index) * (1 - math.exp(-epoch / 6)) + 0.01 * seed
                readouts = {"class": accuracy}
                if student == "token-hard":
                    readouts |= {"distillation": accuracy - 0.01, "joint": accuracy + 0.01}
                lines.append(
                    {
                        "seed": seed,
                        "student": student,
                        "epoch": epoch,
                        "epochs": epochs,
                        "step": 39 * epoch,
                        "train_loss": 2.4 - accuracy,
                        "terms": {"labels": 1.5 - accuracy, "teacher": 0.9}
                        if student in TEACHERS
                        else {"labels": 2.4 - accuracy},
                        "validation": readouts,
                        "learning_rate": 0.002 * (1 - epoch / (epochs + 1)),
                        "images_per_second": 150.0,
                        "seconds": 30.1,
                    }
                )
    return lines


def typed(metrics: list[dict[str, Any]]) -> list[EpochMetrics]:
    return [EpochMetrics(**line) for line in metrics]


def make_folder(folder: Path, results: dict[str, Any], metrics: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    return folder


def laid_out(results: dict[str, Any]) -> Layout:
    return lay_out(parse_results(results))


def terminal(results: dict[str, Any], width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(rich_table(parse_results(results)))
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


class Page(HTMLParser):
    """Collects what the tests ask about: tags, their attributes, text outside and inside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        return next(json.loads(script) for script in self.scripts if script.startswith('{"'))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("run"), make_results(), make_metrics())
    make_folder(folder / "teacher", {}, make_metrics(seeds=(0,), epochs=4))
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "views.png")
    written = write_report(folder)
    names = ["table.md", "table.csv", "table.tex", "curves.png", "curves.svg", "report.html"]
    assert [path.name for path in written] == names
    assert not list(folder.glob(".*")), "temporary files are left behind"
    return folder


@pytest.fixture(scope="module")
def page(reported: Path) -> Page:
    return Page((reported / "report.html").read_text(encoding="utf-8"))


def cells_of(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {line.name: line.cells for line in laid_out(results).lines}


def test_table_states_spread_over_seeds_and_wilson_interval_for_one() -> None:
    assert cells_of(make_results())["token-hard/joint"]["top1"] == "62.43 ± 0.14"
    assert "± standard deviation over 2 seeds, on 10,000 test images" in laid_out(make_results()).footnotes[0]
    one = make_results(seeds=(0,))
    assert cells_of(one)["token-hard/joint"]["top1"] == "62.33 [61.39, 63.27]"
    assert "Wilson interval], one seed" in laid_out(one).footnotes[0]


def test_balanced_accuracy_is_a_column_where_accuracy_hides_the_rare_classes() -> None:
    for balanced, shown in ((0.615, False), (0.5, True)):
        results = make_results()
        for row in results["rows"]:
            row["balanced_accuracy"] = balanced if row["row"] == "soft/class" else row["top1_mean"]
        layout = laid_out(results)
        assert ("balanced" in {column.key for column in layout.columns}) is shown
        assert any(note.startswith("balanced: mean over the classes") for note in layout.footnotes) is shown
    assert next(line for line in layout.lines if line.name == "soft/class").cells["balanced"] == "50.00"


def test_the_teacher_is_in_the_chart_of_accuracies() -> None:
    chart = accuracy_chart(parse_results(make_results()), [])
    teacher = chart["data"][-1]
    assert (teacher["name"], teacher["x"]) == ("teacher cifar/resnet56", [pytest.approx(93.39)])
    assert chart["layout"]["xaxis"]["range"][1] > 93.39
    assert "93.39" in chart["layout"]["annotations"][-1]["text"]
    without = accuracy_chart(parse_results(make_results(teacher=False)), [])
    assert not [trace for trace in without["data"] if "teacher c" in trace["name"]]


def test_table_has_one_decimal_below_a_thousand_images() -> None:
    results = make_results()
    for row in results["rows"]:
        row["n"] = 360
    assert cells_of(results)["token-hard/joint"]["top1"] == "62.4 ± 0.1"


def test_table_gives_difference_interval_and_p() -> None:
    cells = cells_of(make_results())
    assert cells["none/class"]["difference"] == cells["none/class"]["p"] == "–"
    assert [cells["soft/class"][key] for key in ("difference", "interval", "p")] == [
        "+1.11",
        "[+0.31, +1.91]",
        "<0.001",
    ]
    worse = make_results()
    worse["rows"][2]["differences"]["labels"] |= {"mean": -0.02, "p": 0.0421}
    assert [cells_of(worse)["soft/class"][key] for key in ("difference", "p")] == ["−2.00", "0.042"]


def test_a_table_of_one_seed_says_what_that_cannot_tell() -> None:
    assert any("--seeds 5" in note for note in laid_out(make_results(seeds=(0,))).footnotes)
    assert not any("--seeds 5" in note for note in laid_out(make_results(seeds=(0, 1))).footnotes)


def test_a_seed_reading_is_compared_with_its_own_student_without_teacher() -> None:
    results = make_results()
    alone = make_row("class-only", "class", [0.58, 0.59], label="only a class token", reference=True)
    results["rows"] = [alone, results["rows"][2]]
    layout = laid_out(results)
    assert layout.lines[0].label == "only a class token (class-only, class)"
    assert any("more than 'class-only/class'" in note for note in layout.footnotes)
    assert accuracy_chart(parse_results(results), [])["layout"]["shapes"][0]["x0"] == pytest.approx(58.5)


def test_stopped_students_are_marked_and_explained() -> None:
    layout = laid_out(make_results())
    assert cells_of(make_results())["hard/class"]["top1"] == "62.05 (1 of 2)†"
    assert any(note.startswith("† hard/class: seed 1 stopped at step 120") for note in layout.footnotes)
    results = make_results(seeds=(0,))
    results["rows"][3] = make_row("hard", "class", [None], status="seed 0 stopped at step 3: loss is not finite")
    assert cells_of(results)["hard/class"]["top1"] == "stopped†"


def test_published_figures_stand_beside_their_method_and_readout_only() -> None:
    layout = laid_out(make_results())
    cells = {line.name: (line.cells["reproduction"], line.cells["paper"]) for line in layout.lines}
    assert cells["none/class"] == ("67.69", "72.2")
    assert cells["token-hard/joint"] == ("46.11", "74.5")
    assert cells["token-hard/class"] == ("–", "73.9"), "the reproduction's class embedding is another model"
    assert cells["token-hard/joint+ema"] == cells["none/class+ema"] == ("–", "–")
    assert cells["cnn-baseline/class"] == ("88.46", "–")
    assert [column.title for column in layout.columns if column.published] == [
        "reproduction, as published",
        "paper (ImageNet, Ti)",
    ]
    assert len(layout.published_only) == 3
    assert "reproduction, as published: class embedding, teacher hard: 61.69 %" in layout.published_only


def test_seed_figures_prefer_mean_pool_rows_and_the_paper_never_takes_them() -> None:
    results = make_results()
    pooled = make_row("none", "class", [0.5, 0.5]) | {"row": "mean-pool-none/class", "method": "mean-pool-none"}
    results["rows"].append(pooled | {"label": "no distillation"})
    lines = {line.name: line for line in laid_out(results).lines}
    assert (lines["mean-pool-none/class"].cells["reproduction"], lines["mean-pool-none/class"].cells["paper"]) == (
        "67.69",
        "–",
    )
    assert (lines["none/class"].cells["reproduction"], lines["none/class"].cells["paper"]) == ("–", "72.2")
    assert "mean-pool-none" in lines["mean-pool-none/class"].label, "a label that hides its method gets it"


def test_the_published_cnn_stands_beside_a_teacher_trained_here_without_a_baseline() -> None:
    results = make_results()
    results["rows"].pop()  # the baseline
    only = "reproduction, as published: ResNet-18 (CNN baseline), teacher none: 88.46 %"
    assert only in laid_out(results).published_only, "a teacher from a checkpoint is another model"
    results["teacher"]["fit"] = "full"
    assert cells_of(results)["teacher: cifar/resnet56"]["reproduction"] == "88.46"
    assert only not in laid_out(results).published_only
    results["teacher"]["readout"] = "class"
    assert cells_of(results)["teacher: cifar/resnet56"]["reproduction"] == "–", "a student is not a CNN"


def test_paper_column_follows_the_student() -> None:
    results = make_results()
    results["recipe"]["model"]["name"] = "deit_base"
    assert cells_of(results)["token-hard/joint"]["paper"] == "83.4"


def test_published_tables_are_whole() -> None:
    reproduction, paper = published_figures(["reproduction"]), published_figures(["paper"])
    assert [entry.top1 for entry in reproduction] == [0.6769, 0.6885, 0.4019, 0.0807, 0.6169, 0.6919, 0.4611, 0.8846]
    by_model = {
        model: [entry.top1 for entry in paper if entry.model == model]
        for model in dict.fromkeys(entry.model for entry in paper)
    }
    assert by_model["DeiT-B 384"] == [0.831, 0.832, 0.84, 0.842, 0.844, 0.845]
    assert [len(figures) for figures in by_model.values()] == [6, 6, 6, 6]


@pytest.mark.parametrize("width", [80, 100, 140, 250])
def test_terminal_table_fits_and_keeps_what_matters(width: int) -> None:
    text = terminal(make_results(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    head, *rest = text.splitlines()
    assert head.startswith("cifar10: 5,000 training images, 10,000 test images, 2 seeds")
    winner = next(line for line in rest if "★" in line)
    assert winner.split()[:2] == ["★", "token-hard/joint"]
    assert "62.43 ± 0.14" in winner
    assert [line.split()[0] for line in rest if "cnn-baseline" in line or "teacher: cifar" in line] == [
        "cnn-baseline/class",
        "teacher:",
    ]
    header = text.partition("─")[0]
    assert {"p", "labels", "teacher", "none"} <= set(header.split())
    assert ("interval" in header) == (width >= 140)
    assert ("seconds" in header) == (width >= 250) == ("too narrow for" not in text)


def test_terminal_table_survives_an_ascii_terminal_and_markup_in_names() -> None:
    results = make_results()
    results["verdict"] = "[red]not markup[/red] 雪"
    text = terminal(results, 100, "ascii")
    assert "> token-hard/joint" in text
    assert "62.43 +- 0.14" in text
    assert "[red]not markup[/red] ?" in text


def test_markdown_has_a_cell_per_column_and_escapes(tmp_path: Path) -> None:
    results = make_results()
    results["rows"][2]["label"] = "soft " + HOSTILE
    write_tables(parse_results(results), tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(results["rows"]) + 1
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(laid_out(results).columns) + 2}
    assert "<script" not in re.sub(r"\\.", "", text)
    assert "**DeiT⚗ class + distillation (token-hard, joint)** ★" in text


def test_tables_say_where_their_figures_come_from(tmp_path: Path) -> None:
    results = make_results()
    results |= {"code": "c0de" * 16}
    results["teacher"]["sha256"] = "7eac" * 16
    told = (
        "recipe cifar10-small; deitkit 0.1.0 (c0dec0de); data cifar10 (a3f19c); teacher cifar/resnet56 (7eac7eac); "
        "seeds 0, 1; A processor, 2 cores, 24 GiB, cpu, fp32; 2026-11-22"
    )
    markdown, _, latex = (path.read_text(encoding="utf-8") for path in write_tables(parse_results(results), tmp_path))
    assert f"*{told}*" in markdown
    assert told in latex
    del results["code"], results["teacher"]["sha256"]  # as in results from before these were recorded
    assert "deitkit 0.1.0; data" in write_tables(parse_results(results), tmp_path)[0].read_text(encoding="utf-8")


def test_latex_balances_and_escapes(tmp_path: Path) -> None:
    results = make_results()
    results["rows"][2]["label"] = "soft " + HOSTILE
    write_tables(parse_results(results), tmp_path)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    label = next(line for line in text.splitlines() if "soft " in line).split(" & ")[0].strip()
    want = (
        r"soft $<$/script$>$$<$script$>$alert(1)$<$/script$>$'\textquotedbl{}`\&\textbar{}\_100\%\#\$\textasciitilde{}"
    )
    assert label.startswith(want + r"\textasciicircum{}\textbackslash{}\{{[}x{]}(y)")
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    head = next(line for line in text.splitlines() if line.strip().startswith("row & "))
    titles = [title.strip().replace(r"\%", "%") for title in head.removesuffix(r"\\").split(" & ")[1:]]
    assert {"top-1 %", "vs none", "p", "teacher"} <= set(titles)
    left_out = [column.title for column in laid_out(results).columns if column.title not in titles]
    assert f"% too wide for a page, but in table.md and table.csv: {', '.join(left_out)}" in text
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(titles)}
    widths = [float(width) for width in re.findall(r"p\{(\d+\.\d)cm\}", text)]
    assert len(widths) == len(titles) + 1
    assert sum(widths) + 0.28 * len(titles) <= 17.5 + 0.05 * len(widths), "it fits a page of two columns"
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert body.count(r"\midrule") == 2, "baseline and teacher are set apart"
    assert text.isascii() or not re.search("[±−–★†⚗]", text)


def test_csv_keeps_raw_fractions_and_every_field(reported: Path) -> None:
    results = make_results()
    with (reported / "table.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    assert [record["row"] for record in records] == [row["row"] for row in results["rows"]]
    for record, row in zip(records, results["rows"], strict=True):
        assert [record["top1_seed_0"], record["top1_seed_1"]] == [
            "" if value is None else str(value) for value in row["top1"]
        ]
        assert record["status"] == row["status"]
        assert float(record["top1_mean"]) == row["top1_mean"]
        assert float(record["top1_ci95_low"]) == row["top1_ci95"][0]
        spread = {"top1", "top5", "top1_ci95", "differences"}
        assert row.keys() - spread <= record.keys()
        found = row["differences"].get("labels")
        shown = [record[f"difference_vs_labels{end}"] for end in ("", "_ci95_low", "_ci95_high")]
        assert shown == (["", "", ""] if found is None else [str(each) for each in (found["mean"], *found["ci95"])])
        tests = [record[f"p_vs_labels{end}"] for end in ("", "_test", "_holm")]
        assert tests == (["", "", ""] if found is None else ["0.0003", "paired t", ""])
    assert [record["published_paper"] for record in records][:2] == ["0.722", ""]


def test_curves_picture_and_svg(reported: Path, tmp_path: Path) -> None:
    with Image.open(reported / "curves.png") as image:
        assert image.width >= 1200
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    svg = (reported / "curves.svg").read_text(encoding="utf-8")
    for text in (
        "cifar10, 5,000 training images, mean and range over 2 seeds",
        "token-hard  ",
        "chance",
        "teacher cifar/resnet56",
    ):
        assert text in svg
    legend = re.findall(r">(\S+)  (\d+\.\d+)<", svg)
    assert {name for name, _ in legend} == set(LABELS) - {"class-only"}, "which has metrics, but is in no row"
    assert [float(value) for _, value in legend] == sorted((float(value) for _, value in legend), reverse=True)
    again = make_folder(tmp_path, make_results(), make_metrics())
    write_report(again)
    assert (again / "curves.svg").read_bytes() == (reported / "curves.svg").read_bytes()


def test_curves_of_one_epoch_one_seed_and_hostile_names(tmp_path: Path) -> None:
    results = make_results(seeds=(0,))
    results["dataset"]["name"] = results["teacher"]["name"] = HOSTILE
    write_report(make_folder(tmp_path, results, make_metrics(seeds=(0,), epochs=1)))
    charts = Page((tmp_path / "report.html").read_text(encoding="utf-8")).charts
    assert {trace["mode"] for trace in charts["curves"]["Accuracy"]["data"]} == {"markers"}


def test_a_mean_ends_where_a_seed_ends() -> None:
    curves = curves_of(typed(make_metrics()), lambda line: line.main_accuracy)
    curve = next(curve for curve in curves if curve.student == "hard")
    assert curve.epochs == [1, 2, 3]
    assert curve.over_seeds(len) == [2] * 3
    assert curve_labels(curves, ["1"] * 6)[2] == "hard  1 (epoch 3)"
    apart = [line for line in typed(make_metrics()) if (line.seed == 0) == (line.epoch < 5)]
    left = [curve.student for curve in curves_of(apart, lambda line: line.main_accuracy)]
    assert left == ["hard"], "the seeds of the others have no epoch in common, and no mean"


def test_only_trainings_in_the_table_are_drawn(tmp_path: Path) -> None:
    """A resumed run may have been interrupted after the table was written, with more seeds and methods."""
    folder = make_folder(tmp_path, make_results(), make_metrics(seeds=(0, 1, 2)))
    assert {line["student"] for line in make_metrics()} >= {"class-only"}
    charts = Page(write_report(folder)[-1].read_text(encoding="utf-8")).charts["curves"]
    for chart in charts.values():
        shown = {trace["name"] for trace in chart["data"]}
        assert not [name for name in shown if "class-only" in name or "seed 2" in name]
    hard = next(trace for trace in charts["Accuracy"]["data"] if trace["name"] == "hard" and trace["meta"] == "mean")
    assert hard["x"] == list(range(1, 21)), "the mean of its row leaves the stopped seed out too"


def test_every_student_of_a_long_legend_is_in_the_picture(tmp_path: Path) -> None:
    results, metrics = make_results(seeds=(0,)), []
    names = [f"method-{number}-of-a-long-name-that-a-recipe-gave-it" for number in range(30)]
    results["rows"] = [
        make_row("none", "class", [0.6], cost=make_cost(1 + place)) | {"method": name, "row": f"{name}/class"}
        for place, name in enumerate(names)
    ]
    results["winner"] = f"{names[0]}/class"
    for name in names:
        metrics += [line | {"student": name} for line in make_metrics((0,), 3) if line["student"] == "none"]
    parsed, typed_metrics = parse_results(results), typed(metrics)
    drawn = [
        _draw_curves(parsed, curves_of(typed_metrics, lambda line: line.main_accuracy)),
        _draw_costs(parsed, cost_points(parsed, typed_metrics)),
    ]
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        (axes,) = figure.axes
        legend, whole = axes.get_legend().get_window_extent(), figure.bbox
        assert whole.y0 <= legend.y0 < legend.y1 <= whole.y1
        assert legend.x1 <= whole.x1
        assert axes.get_window_extent().width > 0.4 * 960, "the plot keeps its width"


def make_cost(milliseconds: float) -> dict[str, Any]:
    return {"file_bytes": 10**6, "milliseconds": milliseconds, "batch_size": 8, "milliseconds_in_batch": 0.1}


def test_models_differ_by_more_than_colour_in_the_chart_of_costs_and_the_winner_is_marked() -> None:
    results = make_results()
    for place, row in enumerate(results["rows"]):
        row["cost"] = make_cost(1 + place)
    results["teacher"]["cost"] = make_cost(3)
    parsed = parse_results(results)
    chart = cost_chart(parsed, [])  # a run folder may lack its metrics
    assert chart is not None
    go.Figure(chart)
    traces = chart["data"]
    assert len(traces) == 6
    assert (
        len({trace["marker"]["symbol"] for trace in traces}) == len({trace["marker"]["color"] for trace in traces}) == 6
    )
    assert traces[-1]["marker"]["symbol"] == "diamond", "the teacher, as on the page"
    assert all("data.name" in trace["hovertemplate"] for trace in traces)
    marked = [trace for trace in traces if trace["name"].startswith("★")]
    assert [trace["name"].split()[1] for trace in marked] == ["token-hard"]
    assert [trace["marker"]["line"]["width"] > 0 for trace in traces] == [trace in marked for trace in traces]
    colours = {trace["marker"]["color"] for trace in accuracy_chart(parsed, [])["data"] if trace["mode"] == "markers"}
    assert len(colours) == 6


@pytest.mark.parametrize(("fit", "top1"), [("none", 0.9998), ("none", 0.4), ("full", 0.9998), ("full", 0.63)])
def test_a_teacher_far_off_does_not_flatten_the_curves(fit: str, top1: float) -> None:
    results = make_results()
    for card in (results["teacher"], *results["teachers"]):
        card |= {"fit": fit, "top1": top1}
    lines = [line for line in typed(make_metrics()) if line.epoch > 15]  # from 0.56 to 0.69
    chart = curve_charts(parse_results(results), lines)["Accuracy"]
    low, high = chart["layout"]["yaxis"]["range"]
    assert 50 < low < 56
    assert 68 < high < 72
    shapes = [shape["label"]["text"] for shape in chart["layout"]["shapes"]]
    assert shapes == (["teacher cifar/resnet56"] if top1 == 0.63 else [])
    text = teacher_text(parse_results(results), curves_of(lines, lambda line: line.main_accuracy))
    assert ("beyond this axis" in text) == (top1 != 0.63)
    assert ("may have learned from these images" in text) == (fit == "none")


def test_the_legend_of_losses_begins_with_the_lowest() -> None:
    charts = curve_charts(parse_results(make_results()), typed(make_metrics()))
    for title, descending in (("Accuracy", True), ("Training loss", False)):
        ends = [trace["y"][-1] for trace in charts[title]["data"] if trace["meta"] == "mean"]
        assert ends == sorted(ends, reverse=descending)


def test_accuracy_of_a_student_is_its_fullest_readout() -> None:
    def accuracy(validation: dict[str, float | None] | None) -> float | None:
        return EpochMetrics(seed=0, student="none", epoch=1, validation=validation).main_accuracy

    assert accuracy({"class": 0.1, "distillation": 0.2, "joint": 0.3}) == 0.3
    assert accuracy({"distillation": 0.2, "class": None}) == 0.2
    assert accuracy(None) is None


def test_charts_are_valid_plotly_and_hold_every_value() -> None:
    results, metrics = parse_results(make_results()), typed(make_metrics())
    rows = accuracy_chart(results, metrics)
    go.Figure(rows)  # raises for any property that Plotly does not know
    seeds = [value for trace in rows["data"] if "text" in trace for value in trace["x"]]
    assert sorted(seeds) == sorted(100 * value for row in results.rows for value in row.top1 if value is not None)
    charts = curve_charts(results, metrics)
    assert list(charts) == ["Accuracy", "Training loss", "Loss terms", "Learning rate"]
    for chart in charts.values():
        go.Figure(chart)
    shown = [trace["name"] for trace in charts["Accuracy"]["data"] if trace["meta"] == "mean"]
    assert shown[0] == "token-hard" or shown[0] == "cnn-baseline"
    assert {trace["name"] for trace in charts["Loss terms"]["data"] if trace["meta"] == "mean"} >= {
        "soft: teacher",
        "none: labels",
    }
    assert Counter(trace["meta"] for trace in charts["Accuracy"]["data"]) == {"mean": 6, "range": 6, "seed": 12}


def test_page_says_it_all(reported: Path, page: Page) -> None:
    results = make_results()
    for text in (
        results["verdict"],
        "fit to teach",
        "checkpoint resnet56.th (sha256 4bfd…)",
        "93.40 % of 5,000 images",
        "62.43 ± 0.14",
        "deitkit compare recipe.yaml",
        "learning_rate: 0.001",
        "soft: seed 1 was resumed at epoch 7",
        "The paper's table (ImageNet, 300 epochs)",
        "84.5",
        *CLASSES,
        *(row["label"] for row in results["rows"]),
    ):
        assert text in page.text, text
    assert page.text.index(results["verdict"]) < page.text.index("The table") < page.text.index("How it was run")
    picture = base64.b64encode((reported / "views.png").read_bytes()).decode()
    assert ("src", f"data:image/png;base64,{picture}") in page.attributes
    assert page.charts.keys() == {"rows", "curves", "teacher"}


def test_the_page_says_only_what_holds_for_its_run(tmp_path: Path, page: Page) -> None:
    assert page.text.count("soft: seed 1 was resumed at epoch 7") == 1
    assert "A dot is the mean over the seeds" in page.text
    assert "Hollow dots are averaged weights (EMA)." in page.text
    assert "it came trained, and may have learned from these images" in page.text
    assert "Losses of different methods have different terms and are not to be compared." in page.text
    results = make_results(seeds=(0,))
    results["rows"] = [row for row in results["rows"] if row["weights"] == "last"]
    for card in (results["teacher"], *results["teachers"]):
        card["fit"] = "full"
    text = Page(write_report(make_folder(tmp_path, results, make_metrics((0,))))[-1].read_text(encoding="utf-8")).text
    assert not [words for words in ("mean over the seeds", "EMA", "may have learned from") if words in text]


def test_every_table_that_scrolls_can_be_reached_and_is_named(tmp_path: Path) -> None:
    text = write_report(make_folder(tmp_path, make_results(), make_metrics()))[-1].read_text(encoding="utf-8")
    scrolling = re.findall(r'<div class="card scroll"[^>]*>', text)
    assert len(scrolling) == 4
    assert all('tabindex="0" role="region" aria-label="' in tag for tag in scrolling)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        shares = [int(pair, 16) / 255 for pair in re.findall("..", colour[1:])]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_intervals_and_the_numbers_of_axes_can_be_seen_on_light_and_dark(reported: Path) -> None:
    style = (reported / "report.html").read_text(encoding="utf-8").partition("</style>")[0]
    assert ".chart .xtick text, .chart .ytick text, .chart .shape-label text { fill: var(--soft) !important; }" in style
    bars = [trace for trace in accuracy_chart(parse_results(make_results()), [])["data"] if trace["mode"] == "lines"]
    assert bars
    for theme in re.findall(r":root \{ --ground: #1?[^}]*--card: #[^}]*\}", style)[:2]:
        card, soft = (re.search(rf"--{name}: (#\w+)", theme).group(1) for name in ("card", "soft"))  # type: ignore[union-attr]
        card = "#ffffff" if card == "#fff" else card
        assert contrast(card, soft) >= 4.5
        for bar in bars:
            assert bar.get("opacity", 1) == 1
            assert contrast(card, bar["line"]["color"]) >= 3


def test_page_is_self_contained(page: Page) -> None:
    assert page.tags["link"] == page.tags["iframe"] == 0
    loaded = [value for name, value in page.attributes if name in ("src", "srcset", "action")]
    assert all(value is not None and value.startswith("data:") for value in loaded)
    links = {value for name, value in page.attributes if name == "href"}  # of <a>, which load nothing
    assert links == {"https://github.com/kimyunoo/4782_final", "https://arxiv.org/abs/2012.12877"}
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    assert any("default-src 'none'" in (value or "") for name, value in page.attributes if name == "content")


def make_hostile(
    results: dict[str, Any], metrics: list[dict[str, Any]], name: str = HOSTILE
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Call everything by a hostile name that data, files or a recipe may call."""
    for place, key in ((results["dataset"], "name"), (results["teacher"], "name"), (results["teacher"], "source")):
        place[key] = name
    results["recipe"]["name"] = results["verdict"] = results["notes"][0] = name
    results["dataset"]["class_names"] = [name] * 10
    results["machine"] = {name: name}
    for row in results["rows"]:
        row["label"] = row["status"] = name
    for line in metrics:
        line["terms"] = {name: 1.0}
    return results, metrics


def test_page_escapes_hostile_names(tmp_path: Path) -> None:
    results, metrics = make_results(), make_metrics()
    plain = Page(write_report(make_folder(tmp_path / "plain", results, metrics))[-1].read_text(encoding="utf-8"))
    make_hostile(results, metrics)
    hostile = Page(write_report(make_folder(tmp_path / "hostile", results, metrics))[-1].read_text(encoding="utf-8"))
    assert hostile.tags["script"] == plain.tags["script"] == len(hostile.scripts)
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) >= 20
    labels = [trace["name"] for trace in hostile.charts["rows"][""]["data"]]
    labels += [trace["name"] for trace in hostile.charts["curves"]["Loss terms"]["data"]]
    assert not any("<script" in label for label in labels), "Plotly reads HTML in its texts"


def test_page_without_teacher_metrics_winner_or_published(tmp_path: Path) -> None:
    results = make_results(seeds=(0,), teacher=False)
    results |= {"winner": None, "published": [], "notes": []}
    results["rows"] = [make_row("none", "class", [None], status="seed 0 stopped at step 1: loss is not finite")]
    written = write_report(make_folder(tmp_path, results, []))
    assert [path.suffix for path in written] == [".md", ".csv", ".tex", ".html"]
    page = Page(written[-1].read_text(encoding="utf-8"))
    assert "The teacher" not in page.text
    assert "Published figures" not in page.text
    assert page.charts.keys() == {"rows"}
    assert "stopped†" in terminal(results, 80)


@pytest.mark.parametrize(("px", "shown"), [(None, "that of the view"), (48, "48 px")])
def test_the_resolution_of_a_teacher_is_its_own_or_the_views(tmp_path: Path, px: int | None, shown: str) -> None:
    results = make_results()
    results["teacher"]["image_px"] = px
    page = Page(write_report(make_folder(tmp_path, results, []))[-1].read_text(encoding="utf-8"))
    assert shown in page.text
    assert "None px" not in page.text


def test_numbers_that_are_not_finite_become_gaps(tmp_path: Path) -> None:
    metrics = make_metrics()
    metrics[5]["train_loss"] = metrics[7]["validation"]["class"] = math.nan
    folder = make_folder(tmp_path, make_results(), metrics)
    write_report(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert read_metrics(folder)[5].train_loss is None
    first = next(trace for trace in page.charts["curves"]["Training loss"]["data"] if trace["name"] == "none, seed 0")
    assert first["x"] == [epoch for epoch in range(1, 21) if epoch != metrics[5]["epoch"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no results in .* yet: finish the comparison first, with --resume"),
        ("{", "not valid JSON"),
        ("[]", "has format None"),
        ('{"format": 2}', "has format 2, this version reads format 1"),
        ('{"format": 1}', "lacks deitkit, created, recipe, dataset, seeds, rows"),
    ],
)
def test_bad_results_give_one_sentence(tmp_path: Path, text: str | None, said: str) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder: name the one that `deitkit compare` printed"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        write_report(tmp_path)


def test_metrics_forgive_a_kill_and_a_resume_but_no_garbage(tmp_path: Path) -> None:
    lines = [
        {"seed": 0, "student": "none", "epoch": epoch, "train_loss": loss}
        for epoch, loss in ((1, 2.0), (2, 1.5), (2, 1.4))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"seed": 0, "stud')
    assert [line.train_loss for line in read_metrics(tmp_path)] == [2.0, 1.4]
    (tmp_path / "metrics.jsonl").write_text("not json\n" + text)
    with pytest.raises(CheckpointError, match="is not a line of metrics"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "absent") == []


def test_results_read_back_as_written(tmp_path: Path) -> None:
    written = make_results()
    results = read_results(make_folder(tmp_path, written, []))
    stored = results.to_json()
    for key in written.keys() - {"rows"}:
        assert stored[key] == written[key], key
    assert [{key: row[key] for key in written["rows"][0]} for row in stored["rows"]] == written["rows"]
    write_results(results, tmp_path)
    assert read_results(tmp_path) == results
    assert all(row["kind"] == "baseline" if "cnn" in row["row"] else row["kind"] == "student" for row in stored["rows"])
    assert [row["row"] for row in stored["rows"] if row["reference"]] == ["none/class"]


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    results = make_results()
    results["rows"][3]["top1"] = "high"
    with pytest.raises(CheckpointError, match=r"has an invalid rows\.top1: run the comparison again"):
        read_results(make_folder(tmp_path, results, []))
    del results["rows"][3]["top1"]
    with pytest.raises(CheckpointError, match=r"lacks rows\.top1: run the comparison again"):
        read_results(make_folder(tmp_path, results, []))


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first ⚗")
    assert path.read_text(encoding="utf-8") == "first ⚗"

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match=r"cannot write '.*file.txt': no space left on device"):
        write_bytes(path, b"second")
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text(encoding="utf-8") == "first ⚗"
    with pytest.raises(CheckpointError, match="directory"):
        write_text(path / "below" / "deeper", "a file is no folder")


def test_the_p_of_the_table_is_corrected_where_it_can_be() -> None:
    assert p_value(Difference(0.01, (0.0, 0.02), 0.03, "McNemar", 0.09)) == "0.090"
    assert p_value(Difference(0.01, (0.0, 0.02), 0.03, "McNemar")) == "0.030"
    assert p_value(Difference(0.01, (0.0, 0.02), 0.0009, "McNemar", 0.0009)) == "<0.001"
    assert p_value(None) == "–"


def test_the_table_says_that_intervals_are_not_corrected_where_p_is() -> None:
    results = make_results()
    assert "not corrected for the number of rows" in " ".join(laid_out(results).footnotes)  # neither p nor interval
    for row in results["rows"]:
        for difference in row["differences"].values():
            difference["p_holm"] = 0.01
    (note,) = (note for note in laid_out(results).footnotes if note.startswith("vs none"))
    assert "interval (of one row, not corrected for the number of rows); p: paired t, corrected for 7 rows" in note


def test_report_imports_no_training_code() -> None:
    import deitkit.report.write

    folder = Path(deitkit.report.write.__file__).parent
    read = (
        "system.figure_file",
        "system.files",
        "system.process",
        "system.words",
        "run.folder",
        "run.layout",
        "run.difference",
        "run.results",
        "run.analysis",
        "run.metrics",
        "run.record",
        "run.reported",
    )
    sources = [*folder.glob("*.py"), *(folder.parent / f"{name.replace('.', '/')}.py" for name in read)]
    for source in sources:
        text = source.read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:from|import) deitkit\.([\w.]+)", text, re.MULTILINE)
        wrong = [
            name for name in imported if name.split(".")[0] not in ("errors", "recipe", "report") and name not in read
        ]
        assert not wrong, (source.name, wrong)


def test_peaks_are_the_highest_means_and_their_epochs() -> None:
    peaks = {peak.student: peak for peak in validation_peaks(typed(make_metrics()))}
    assert peaks["none"].epoch == 20
    assert peaks["none"].highest == peaks["none"].last
    assert (peaks["none"].last_epoch, peaks["hard"].last_epoch) == (20, 3)
    losses = [line.train_loss for line in typed(make_metrics()) if (line.student, line.epoch) == ("none", 20)]
    assert peaks["none"].last_loss == pytest.approx(sum(filter(None, losses)) / 2)
    falling = [line | {"validation": {"class": 0.5 - 0.01 * line["epoch"]}} for line in make_metrics((0,), 5)]
    assert {(peak.epoch, peak.highest, round(peak.last, 3)) for peak in validation_peaks(typed(falling))} == {
        (1, 0.49, 0.45)
    }
    assert validation_peaks([]) == []


def test_curves_of_more_students_than_colours_differ_by_their_dashes() -> None:
    lines = [
        EpochMetrics(seed=0, student=f"m{number}", epoch=epoch, epochs=2, train_loss=1.0, validation={"class": 0.5})
        for number in range(15) for epoch in (1, 2)
    ]  # fmt: skip
    data = curve_charts(parse_results(make_results()), lines)["Accuracy"]["data"]
    looks = {(trace["line"]["color"], trace["line"]["dash"]) for trace in data if trace["meta"] == "mean"}
    assert len(looks) == 15
