"""The report of an ablation: what its chart and its table say of differences that chance may explain."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from deitkit.report.ablation import _draw, difference_chart, lay_out_variants
from deitkit.report.table import write_tables
from deitkit.run.results import AblationResults, parse_results
from report.test_report import make_results, make_row


def make_ablation() -> dict[str, Any]:
    """The base, a variant that differs by more than chance, one that does not after the correction, one by -0.001."""
    found = {
        "sgd": {"mean": -0.05, "ci95": [-0.07, -0.03], "p": 0.001, "test": "McNemar", "p_holm": 0.003},
        "wide": {"mean": 0.02, "ci95": [0.001, 0.039], "p": 0.04, "test": "McNemar", "p_holm": 0.08},
        "deep": {"mean": -0.00001, "ci95": [-0.02, 0.0200001], "p": 1.0, "test": "McNemar", "p_holm": 1.0},
    }
    results = make_results(seeds=(0,))
    results["rows"] = [
        make_row("none", "class", [0.6])
        | {
            "row": f"{name}: none/class",
            "variant": name,
            "changed": "",
            "teacher_name": None,
            "teacher_test_top1": None,
        }
        | {"differences": {"base": found[name]} if name in found else {}}
        for name in ("base", *found)
    ]
    return results | {"variants": {name: {} for name in found}, "winner": None, "published": []}


def parsed() -> AblationResults:
    results = parse_results(make_ablation())
    assert isinstance(results, AblationResults)
    return results


def test_a_difference_that_chance_may_explain_is_hollow() -> None:
    chart = difference_chart(parsed())
    go.Figure(chart)
    assert [trace["marker"]["symbol"] for trace in chart["data"]] == ["circle", "circle-open", "circle-open"]
    assert "+2.00 points [+0.10, +3.90], p = 0.080" in chart["data"][1]["hovertemplate"]
    (axes,) = _draw(parsed()).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True, True]
    assert "hollow: chance may explain it (p ≥ 0.05, corrected for the number of rows)" in axes.get_xlabel()


def test_intervals_are_not_corrected_and_the_table_says_so() -> None:
    layout = lay_out_variants(parsed())
    assert "with their 95 % interval (of one row, not corrected for the number of rows)" in layout.footnotes[1]
    cells = {line.name: line.cells for line in layout.lines}
    assert cells["deep"]["difference"] == "+0.00", "what rounds to zero has no minus"
    assert cells["deep"]["interval"] == "[−2.00, +2.00]"


def test_what_changed_is_wrapped_in_latex_and_has_no_character_that_it_lacks(tmp_path: Path) -> None:
    stored = make_ablation()
    stored["rows"][1]["changed"] = "; ".join(f"augment.field_{number}: 0.0 → 0.5…" for number in range(9))
    text = write_tables(parse_results(stored), tmp_path)[2].read_text(encoding="utf-8")
    assert r"augment.field\_8: 0.0 $\rightarrow$ 0.5\dots{}" in text
    assert text.isascii()
    assert r">{\raggedright\arraybackslash}p{3.0cm}" in text
