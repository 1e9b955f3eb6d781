"""``deitkit analyze``: parse, analyze, print."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
errors = Console(stderr=True)


def analyze(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with results.json.")],
    images: Annotated[int, typer.Option("--images", min=0, help="Test images to draw attention maps for.")] = 8,
    seed: Annotated[int | None, typer.Option("--seed", help="Only the students of this seed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for another program to read.")] = False,
) -> None:
    """Ask a finished run's students and teacher what accuracy does not tell, and add the answers to its report.

    Who disagrees with whom (the paper's Table 4), how alike class and distillation token are in every block, what they
    attend to, which classes are confused, how well calibrated each readout is, and whether a student follows its
    teacher into its mistakes. Writes analysis.json and analysis/ into the run folder, and report.html again.
    """
    from deitkit.analyze.analysis import analyze_run
    from deitkit.cli.progress import Terminal

    with Terminal(errors if as_json else console, farewell="stopped; nothing was written") as terminal:
        analysis = analyze_run(run, images=images, seed=seed, watcher=terminal)
    if as_json:
        sys.stdout.write(json.dumps(analysis, ensure_ascii=False) + "\n")
        return
    console.print(_table(analysis))
    for path in (run / "analysis.json", *(run / "analysis" / entry["file"] for entry in analysis["attention"])):
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    console.print(f"page     {run / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


COLUMNS = {
    "top-1": "top1",
    "ECE": "ece",
    "agrees": "agreement_overall",
    "if right": "agreement_teacher_right",
    "if wrong": "agreement_teacher_wrong",
    "corrects": "agreement_corrected",
}


def _table(analysis: dict[str, Any]) -> Table:
    table = Table(
        title=f"{analysis['n']:,} test images, per cent; agreement with the teacher: all, where it is right, wrong",
        title_justify="left",
        box=None,
    )
    table.add_column("judge", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for judge in analysis["judges"]:
        values = [judge.get(key) for key in COLUMNS.values()]
        table.add_row(escape(judge["judge"]), *("" if value is None else f"{100 * value:.2f}" for value in values))
    return table
