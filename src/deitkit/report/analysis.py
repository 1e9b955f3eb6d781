"""The report's section on what `deitkit analyze` found, from ``analysis.json`` and the pictures beside it alone."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deitkit.errors import CheckpointError
from deitkit.report.analysis_charts import (
    MOST_CLASSES,
    Chart,
    accuracy_by_class_chart,
    confusion_charts,
    reliability_charts,
    similarity_chart,
)
from deitkit.report.figures import COLOURS
from deitkit.report.published import PAPER_DISAGREEMENT
from deitkit.report.table_layout import percent

FORMAT = 1
MOST_PAIRS = 10
_REQUIRED = ("seeds", "n", "disagreement", "judges", "classes", "tokens", "attention")


@dataclass(frozen=True)
class Section:
    """What the template draws.

    Attributes:
        analysis: As in the file.
        charts: By place on the page, then by tab.
        beside: The paper's disagreements with ours: the two judges, ours and the paper's share, in per cent.
        pairs: The mistakes made most often: true class, class decided, and each judge's share in per cent.
        pictures: Student and data URI of its contact sheet.
        part_of_classes: Whether the matrices show a part of the classes only.
    """

    analysis: dict[str, Any]
    charts: dict[str, dict[str, Chart]]
    beside: list[dict[str, str]]
    pairs: list[dict[str, Any]]
    pictures: list[tuple[str, str]]
    part_of_classes: bool


def read_analysis(folder: Path) -> dict[str, Any] | None:
    """Return ``analysis.json`` of a run folder; None where it was not analyzed.

    Raises:
        CheckpointError: It is no JSON, of another format than 1, or lacks what every analysis has.
    """
    path = folder / "analysis.json"
    if not path.is_file():
        return None
    try:
        analysis = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        analysis = None
    if not isinstance(analysis, dict) or analysis.get("format") != FORMAT or not analysis.keys() >= set(_REQUIRED):
        raise CheckpointError(f"'{path}' is no analysis of format {FORMAT}: delete it, or run `deitkit analyze` again")
    return analysis


def lay_out_analysis(
    analysis: dict[str, Any], results: dict[str, Any], colours: dict[str, str], folder: Path
) -> Section:
    """Gather what the page shows of an analysis.

    Args:
        analysis: What `read_analysis` returned.
        results: ``results.json`` of the run, for the names of its classes.
        colours: Of the students, as in the other figures.
        folder: Of the run.
    """
    names = results["dataset"]["class_names"]

    def colour(student: str) -> str:
        return colours.get(student.removesuffix("+ema"), COLOURS[-1])  # the teacher's is grey

    charts = {
        "similarity": {"": similarity_chart(analysis["tokens"], colour)} if analysis["tokens"] else {},
        "by-class": {"": accuracy_by_class_chart(analysis["classes"], names, colour)},
        "confusion": confusion_charts(analysis["classes"], names),
        "reliability": reliability_charts(analysis["judges"], colour),
    }
    return Section(
        analysis=analysis,
        charts={name: tabs for name, tabs in charts.items() if tabs},
        beside=_beside_the_paper(analysis),
        pairs=_confused_pairs(analysis, names),
        pictures=list(_pictures(analysis, folder)),
        part_of_classes=len(names) > MOST_CLASSES,
    )


def _beside_the_paper(analysis: dict[str, Any]) -> list[dict[str, str]]:
    judges, shares = analysis["disagreement"]["judges"], analysis["disagreement"]["shares"]
    beside = []
    for first, second, published in PAPER_DISAGREEMENT:
        if first in judges and second in judges:
            share = shares[judges.index(first)][judges.index(second)]
            ours = percent(share, analysis["n"])
            beside.append({"first": first, "second": second, "ours": ours, "paper": f"{100 * published:.1f}"})
    return beside


def _confused_pairs(analysis: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Return the mistakes with the highest share in any judge's class, and what each judge makes of them."""
    highest: dict[tuple[int, int], float] = {}
    shares: list[dict[tuple[int, int], float]] = []
    for entry in analysis["classes"]:
        totals: dict[int, int] = {}
        for true, _, count in entry["confusion"]:
            totals[true] = totals.get(true, 0) + count
        shares.append({(true, said): count / totals[true] for true, said, count in entry["confusion"] if true != said})
        for mistake in entry["most_confused"]:
            pair = (mistake["true"], mistake["decided"])
            highest[pair] = max(highest.get(pair, 0), mistake["share"])
    pairs = sorted(highest, key=lambda pair: -highest[pair])[:MOST_PAIRS]
    return [
        {
            "true": names[true],
            "decided": names[said],
            "shares": [f"{100 * share.get((true, said), 0):.1f}" for share in shares],
        }
        for true, said in pairs
    ]


def _pictures(analysis: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    found = []
    for entry in analysis["attention"]:
        path = folder / "analysis" / Path(entry["file"]).name
        if path.is_file():
            encoded = base64.b64encode(path.read_bytes()).decode("ascii")
            found.append((entry["student"], f"data:image/png;base64,{encoded}"))
    return found
