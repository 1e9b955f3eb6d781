"""The command `verify`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deitkit.comparison.verify import verify_run

console = Console()
errors = Console(stderr=True)


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with results.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for another program to read.")] = False,
) -> None:
    """Measure a finished run's saved students again, and say row by row whether its table holds.

    On the machine that made it every figure must come out the same; on another, within half a point. Ends with code 1
    if a figure does not hold, or the data or the teacher are not the run's.
    """
    from deitkit.cli.progress import Terminal

    with Terminal(errors if as_json else console, farewell="stopped; nothing was written") as terminal:
        found = verify_run(run, terminal)
    if as_json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    else:
        table = Table("row", "seed", "recorded %", "measured %", "holds", box=None)
        for row in found["rows"]:
            shown = ["-" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("recorded", "measured")]
            holds = {True: "yes", False: "NO", None: "-"}[row["holds"]]
            table.add_row(escape(row["row"]), str(row["seed"]), *shown, holds)
        console.print(table)
        data = "the run's" if found["same_data"] else "NOT the run's (another fingerprint)"
        teachers = {True: "the run's", False: "NOT the run's (other weights)", None: "none on record"}[
            found["same_teachers"]
        ]
        tolerance = f"{100 * found['tolerance']:.2f} points"
        console.print(f"data: {data}; teacher: {teachers}; tolerance: {tolerance}", highlight=False)
    if not found["holds"]:
        raise typer.Exit(1)
