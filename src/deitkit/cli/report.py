"""The commands that read a finished run: ``report`` and ``verify``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deitkit.cli.console import console, errors, plain, print_json, say
from deitkit.cli.options import Json, RunArgument
from deitkit.errors import RecipeError


def _verify_file(file: Path, data: str | None, root: Path | None, as_json: bool) -> None:
    from deitkit.export.verify import verify_onnx

    found = verify_onnx(file, data, root)
    if as_json:
        print_json(asdict(found))
    else:
        table = Table("file", "recorded %", "measured %", "holds", box=None)
        shown = [f"{100 * value:.2f}" for value in (found.recorded, found.measured)]
        table.add_row(plain(file.name), *shown, "yes" if found.holds else "NO")
        console.print(table)
        say(f"{found.dataset}, n = {found.n:,}; tolerance: {100 * found.tolerance:.2f} points")
    if not found.holds:
        raise typer.Exit(1)


def report(run: RunArgument) -> None:
    """Write the tables, the curves and the page of a run again, from its folder alone."""
    from deitkit.report.table import rich_table
    from deitkit.report.write import write_report
    from deitkit.run.results import read_results

    written = write_report(run)
    console.print(rich_table(read_results(run)))
    for path in written:
        say(str(path))


def verify(
    run: RunArgument,
    data: Annotated[
        str | None, typer.Option("--data", help="Of an ONNX file: where its data set lies, if not where it was.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Of an ONNX file: the folder of the named data sets.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a finished run's saved students again, and check every row of its table; or check an ONNX file.

    On the machine of the run every figure must be identical; on another, within half a point. Exits with code 1 if a
    figure does not match, or if the data or the teacher are not those of the run.
    """
    from deitkit.models.onnx_file import is_onnx

    if is_onnx(run):
        _verify_file(run, data, root, as_json)
        return
    if data is not None or root is not None:
        raise RecipeError(
            "--data and --root are for an ONNX file: a run has its data in its recipe; if they are in a relative "
            "folder, start the command in the folder in which the run was started"
        )
    from deitkit.cli.progress import Terminal
    from deitkit.comparison.verify import verify_run

    with Terminal(errors if as_json else console, stopped="stopped; nothing was written") as terminal:
        found = verify_run(run, terminal)
    if as_json:
        print_json(asdict(found))
    else:
        table = Table("row", "seed", "recorded %", "measured %", "holds", box=None)
        for row in found.rows:
            shown = ["-" if value is None else f"{100 * value:.2f}" for value in (row.recorded, row.measured)]
            holds = {True: "yes", False: "NO", None: "-"}[row.holds]
            table.add_row(plain(row.row), str(row.seed), *shown, holds)
        console.print(table)
        data = "the run's" if found.same_data else "NOT the run's (another fingerprint)"
        teachers = {True: "the run's", False: "NOT the run's", None: "none on record"}[found.same_teachers]
        tolerance = f"{100 * found.tolerance:.2f} points"
        console.print(f"data: {data}; teacher: {teachers}; tolerance: {tolerance}", highlight=False)
        for problem in found.problems:
            say(problem)
    if not found.holds:
        raise typer.Exit(1)
