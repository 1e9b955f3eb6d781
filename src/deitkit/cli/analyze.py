"""The command ``analyze``."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deitkit.cli.console import console, errors, plain, print_json, say
from deitkit.cli.options import Json, RunArgument

if TYPE_CHECKING:
    from deitkit.run.analysis import Analysis

COLUMNS = {
    "top-1": "top1",
    "ECE": "ece",
    "agrees": "agreement_overall",
    "if right": "agreement_teacher_right",
    "if wrong": "agreement_teacher_wrong",
    "corrects": "agreement_corrected",
}


def analyze(
    run: RunArgument,
    images: Annotated[int, typer.Option("--images", min=0, help="Test images to draw attention maps for.")] = 8,
    seed: Annotated[int | None, typer.Option("--seed", help="Only the students of this seed.")] = None,
    as_json: Json = False,
) -> None:
    """Analyze a finished run's students and teacher beyond accuracy, and add the results to its report.

    Measures pairwise disagreement (the paper's Table 4), the similarity of class and distillation token in every block,
    their attention, the confusion of classes, the calibration of each readout, and how often a student repeats its
    teacher's mistakes. Writes analysis.json and analysis/ into the run folder, and report.html again.
    """
    from deitkit.analyze.analysis import analyze_run
    from deitkit.cli.progress import Terminal

    with Terminal(errors if as_json else console, stopped="stopped; the same command begins again") as terminal:
        analysis = analyze_run(run, images=images, seed=seed, watcher=terminal)
    if as_json:
        print_json(analysis.model_dump(mode="json"))
        return
    console.print(_table(analysis))
    for note in analysis.notes:
        say(note)
    for path in (run / "analysis.json", *(run / "analysis" / sheet.file for sheet in analysis.attention)):
        say(str(path))
    say(f"page     {run / 'report.html'}")


def _table(analysis: "Analysis") -> Table:
    table = Table(
        title=f"{analysis.n:,} test images, per cent; agreement with the teacher: all, where it is right, wrong",
        title_justify="left",
        box=None,
    )
    table.add_column("row", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for row in analysis.rows:
        values = [getattr(row, key) for key in COLUMNS.values()]
        table.add_row(plain(row.row), *("" if value is None else f"{100 * value:.2f}" for value in values))
    return table
