"""The commands that read a run: ``progress``, ``report`` and ``verify``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deitkit.cli.console import console, errors, plain, print_json, say
from deitkit.cli.options import Json, Root, RunArgument
from deitkit.system.words import duration_text

if TYPE_CHECKING:
    from deitkit.report.progress import TrainingProgress


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


def progress(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; its trainings may still be running.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", help="A run folder to compare with, such as results/cifar10.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how far each training of a run is, also while it runs, and draw its curves as RUN/progress.png.

    With `--reference` it says whether a run is on track: each student beside the same student of another run after the
    same epoch, for example `deitkit progress runs/cifar10 --reference results/cifar10`. Accuracies are those of the
    validation images. A training is stopped if its last epoch is missing and no process works on it any more.
    """
    from deitkit.report.progress import progress_of, read_trainings, running_trainings, write_progress

    running = running_trainings(run)  # before the metrics are read, so that none of them is missing
    metrics = read_trainings(run)
    beside = [] if reference is None else read_trainings(reference)
    found = progress_of(metrics, beside, running)
    if as_json:
        print_json([asdict(training) for training in found])
        return
    if not found:
        say(f"no training in {run} has finished an epoch yet")
        return
    console.print(_progress_table(found, beside=reference is not None))
    if any(training.has_stopped for training in found):
        say("stopped: no process is training it; --resume continues it, unless its loss became infinite or NaN")
    if reference is not None:
        say(f"reference {reference}, after the same epoch")
    picture = run / "progress.png"
    if write_progress(metrics, str(run), picture, beside, str(reference)):
        say(f"curves   {picture}")


def _progress_table(found: "list[TrainingProgress]", beside: bool) -> Table:
    table = Table(box=None)
    table.add_column("training", overflow="fold")
    titles = ["seed", "epoch", "loss", "validation %", *(["reference %", "difference"] if beside else []), "left"]
    for title in titles:
        table.add_column(title, justify="right")
    for training in found:
        of = "" if training.epochs is None else f"/{training.epochs}"
        cells = [str(training.seed), f"{training.epoch}{of}", _shown(training.train_loss, "{:.3f}")]
        cells.append(_shown(training.validation, "{:.2%}"))
        if beside:
            cells += [_shown(training.reference, "{:.2%}"), _shown(training.difference, "{:+.2%}")]
        left = training.seconds_left
        ended = "done" if training.is_done else "stopped" if training.has_stopped else "–"
        cells.append(ended if left is None or training.is_done else duration_text(left))
        table.add_row(plain(training.student), *cells)
    return table


def _shown(value: float | None, form: str) -> str:
    text = "–" if value is None else form.format(value).removesuffix("%")
    return "+0.00" if text == "-0.00" else text


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
        str | None,
        typer.Option("--data", help="Where the images lie now, such as folder:PATH, if not where they were."),
    ] = None,
    root: Root = None,
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
    from deitkit.cli.progress import Terminal
    from deitkit.comparison.verify import verify_run

    with Terminal(errors if as_json else console, stopped="stopped; nothing was written") as terminal:
        found = verify_run(run, terminal, data, root)
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
