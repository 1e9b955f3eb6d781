"""The command line: parse, call one function, and turn a user's mistake into one line and exit code 2."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deitkit import __version__
from deitkit.cli.analyze import analyze
from deitkit.cli.bench import app as bench_app
from deitkit.cli.convert import convert
from deitkit.cli.models import models
from deitkit.cli.verify import verify
from deitkit.errors import DeitkitError, Interrupted, RecipeError, is_dead_worker, is_out_of_memory, one_line
from deitkit.recipe.load import describe_fields, load_recipe, shipped_recipes
from deitkit.recipe.schema import Recipe
from deitkit.system.process import configure_process

app = typer.Typer(
    name="deitkit",
    help="Distil a CNN teacher into a small vision transformer, under every method of the DeiT paper side by side.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
console = Console()
errors = Console(stderr=True)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see `deitkit recipes`) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to change, as `train.epochs=40`.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder; by default a new one under runs/.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Train this many seeds, from 0.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out (or the newest of this recipe).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for another program to read.")]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder with model.safetensors, or a run folder (its winner).")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def compare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    seeds: Seeds = None,
    resume: Resume = False,
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Only draw augmented views with their labels, and train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train students under every method of a recipe, side by side, and say which wins and by how much.

    For example `deitkit compare digits`, or `deitkit compare cifar10-cpu train.epochs=40 --seeds 3 --out runs/mine`,
    or with your own images `deitkit compare own-images data.name=folder:photos`.

    A recipe with `variants` is an ablation, such as `deitkit compare ablation-cifar10-cpu`: the recipe as it is, then
    each variant in a folder of its own under variants/, and one table of the differences to the base.

    The run folder then holds table.md, table.csv, table.tex, curves.png, curves.svg, report.html, results.json, and
    the winner, ready for `deitkit predict`. Ctrl-C stops and saves; the same command with --resume goes on.
    """
    loaded = _load(recipe, overrides, seeds)
    if show_batch:
        _show_batch(loaded, out)
        return
    _compare(loaded, out, resume, as_json)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    method: Annotated[str, typer.Option("--method", help="A method: see `deitkit methods`.")] = "token-hard",
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train one student under one method of a recipe: a comparison of one row."""
    from deitkit.distillation.methods import find_method

    name = find_method(method).name
    loaded = _load(recipe, [*(overrides or []), f"methods=[{name}]", "baseline=null"], None)
    _compare(loaded, out, resume, as_json)


@app.command()
def finetune(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A run folder (its winner), a model folder, or a weights file."),
    ],
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    seeds: Seeds = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Go on with a trained student: at a higher resolution, or on other data, with and without a teacher.

    For example `deitkit finetune runs/cifar10-cpu finetune-cpu`. The students of the recipe's methods start from the
    checkpoint, whose architecture they have, and the table compares them with it as it was before.
    """
    from deitkit.comparison.finetune import start_from

    _compare(start_from(_load(recipe, overrides, seeds), checkpoint), out, resume, as_json)


def _compare(recipe: Recipe, out: Path | None, resume: bool, as_json: bool) -> None:
    from deitkit.cli.progress import Terminal
    from deitkit.comparison.ablation import compare_variants
    from deitkit.comparison.compare import compare
    from deitkit.report.table import rich_table
    from deitkit.run.folder import occupied

    folder = _run_folder(out, recipe, resume)
    output = errors if as_json else console
    with Terminal(output) as terminal, occupied(folder):
        terminal.say(f"run folder {folder}")
        results = (compare_variants if recipe.variants else compare)(recipe, folder, watcher=terminal, resume=resume)
    if as_json:
        sys.stdout.write(json.dumps(results) + "\n")
        return
    console.print(rich_table(results))
    _say(f"page     {folder / 'report.html'}")
    _say(f"curves   {folder / 'curves.png'}")
    for name in results.get("variants", {}):
        _say(f"variant  {folder / 'variants' / name}")
    if results["winner"] is not None:
        _say(f"winner   {folder / 'winner'}   (deitkit predict {folder} IMAGE...)")


@app.command()
def teacher(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Train (or load) the teachers of a recipe alone, check them, and print their cards.

    Its folder can teach later: `deitkit compare RECIPE teacher.name=OUT/teacher`.
    """
    from deitkit.cli.progress import Terminal
    from deitkit.data.dataset import load_dataset
    from deitkit.run.folder import begin_run, check_run, occupied
    from deitkit.system.device import Precision, choose_device
    from deitkit.teachers.prepare import common_card, prepare_teachers

    loaded = _load(recipe, overrides, None)
    folder = _run_folder(out, loaded.model_copy(update={"name": f"{loaded.name}-teacher"}), resume)
    precision = Precision.choose(loaded.teacher.train.precision, choose_device(loaded.device))
    with Terminal(errors if as_json else console) as terminal, occupied(folder):
        check_run(folder, loaded, resume)
        dataset = load_dataset(loaded.data, terminal.reading)
        begin_run(folder, loaded)
        teachers, cards = prepare_teachers(
            loaded, dataset, folder=folder / "teacher", precision=precision, watcher=terminal
        )
        together = common_card(teachers, cards, dataset, precision)
    if as_json:
        sys.stdout.write(json.dumps({**together.__dict__, "teachers": [card.__dict__ for card in cards]}) + "\n")
        return
    for number, card in enumerate(cards, start=1):
        table = Table(box=None, show_header=False)
        for key, value in card.__dict__.items():
            table.add_row(key, f"{100 * value:.2f} %" if key in ("top1", "chance") else str(value))
        console.print(table)
        home = folder / ("teacher" if number == 1 else f"teacher-{number}")
        _say(f"teacher in {home}: use it with teacher.name={home}")
    if len(cards) > 1:
        _say(f"their mean answer: {100 * together.top1:.2f} % on {together.n} validation images")


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", help="A named data set, folder:PATH or parquet:PATH.")],
    root: Annotated[Path | None, typer.Option("--root", help="Where named data sets lie.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a saved model on the test images of a data set, for every readout."""
    from deitkit.evaluation.apply import evaluate_model

    result = evaluate_model(_model_folder(model), data, root)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    table = Table("readout", "top-1 %", "95 % interval", "top-5 %", title=f"{result['dataset']}, n = {result['n']}")
    for row in result["readouts"]:
        low, high = row["top1_ci95"]
        top5 = "" if row["top5"] is None else f"{100 * row['top5']:.2f}"
        table.add_row(row["readout"], f"{100 * row['top1']:.2f}", f"{100 * low:.2f} to {100 * high:.2f}", top5)
    console.print(table)


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    readout: Annotated[
        str | None, typer.Option("--readout", help="class, distillation, joint or joint-logits.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Show this many classes for each image.")] = 3,
    as_json: Json = False,
) -> None:
    """Classify images with a trained model."""
    from deitkit.evaluation.apply import predict_files

    answers = predict_files(_model_folder(model), images, readout=readout, top=top)
    if as_json:
        sys.stdout.write(json.dumps(answers, ensure_ascii=False) + "\n")
        return
    table = Table("image", "class", "probability")
    for answer in answers:
        for place, (name, probability) in enumerate(answer["classes"]):
            table.add_row("" if place else _plain(answer["image"]), _plain(name), f"{100 * probability:.1f} %")
    console.print(table)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with results.json.")]) -> None:
    """Write the tables, the curves and the page of a run again, from its folder alone."""
    from deitkit.report.table import rich_table
    from deitkit.report.write import write_report
    from deitkit.run.results import read_results

    written = write_report(run)
    console.print(rich_table(read_results(run)))
    for path in written:
        _say(str(path))


app.command()(analyze)
app.command()(verify)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Print this recipe.")] = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every field with its default and meaning.")] = False,
) -> None:
    """List the shipped recipes, print one, or explain every field."""
    shipped = shipped_recipes()
    if fields:
        table = Table(box=None)
        table.add_column("field", no_wrap=True)
        table.add_column("default")
        table.add_column("meaning")
        for field, default, meaning in describe_fields():
            table.add_row(_plain(field), _plain(default), _plain(meaning))
        console.print(table)
    elif name is not None:
        if name not in shipped:
            load_recipe(name)
            raise RecipeError(f"'{name}' is not a shipped recipe; shipped are {', '.join(shipped)}")
        sys.stdout.write(shipped[name])
    else:
        table = Table("recipe", "what it does", box=None)
        for shipped_name, text in shipped.items():
            table.add_row(shipped_name, _plain(text.splitlines()[0].removeprefix("# ")))
        console.print(table)


@app.command()
def methods() -> None:
    """List the methods that a comparison can name."""
    from deitkit.distillation.methods import METHODS

    table = Table("method", "tokens", "labels", "teacher", "what it is", box=None)
    for method in METHODS.values():
        labels = "yes" if method.uses_labels else "no"
        table.add_row(method.name, method.token_layout, labels, method.teacher_signal or "-", method.summary)
    console.print(table)


app.command()(models)
app.command()(convert)


def _say(text: str) -> None:
    """Print a line that may hold paths: unwrapped, and nothing in it is markup."""
    console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)


def _plain(text: Any) -> str:
    from rich.markup import escape

    return escape(one_line(str(text)))


def _load(source: str, overrides: list[str] | None, seeds: int | None) -> Recipe:
    changes = list(overrides or [])
    if seeds is not None:
        changes.append(f"seeds={list(range(seeds))}")
    return load_recipe(source, changes)


def folder_name(name: str) -> str:
    """Return the name of a recipe as that of a folder, which leads nowhere else: a recipe may be a stranger's."""
    return re.sub(r"[^\w .-]", "-", name).strip(" .")[:100] or "custom"


def _run_folder(out: Path | None, recipe: Recipe, resume: bool) -> Path:
    """Return --out; else a new folder under runs/, or with --resume the newest of this recipe's."""
    if out is not None:
        return out
    base = Path("runs") / folder_name(recipe.name)
    numbered = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    if not resume:
        return next(path for path in numbered if not path.exists())
    existing = [path for path in numbered if (path / "recipe.yaml").exists()]
    if not existing:
        raise RecipeError(f"--resume found no run of recipe '{recipe.name}' under runs/: name its folder with --out")
    return max(existing, key=lambda path: (path / "recipe.yaml").stat().st_mtime)


def _model_folder(path: Path) -> Path:
    from deitkit.models.saved import model_folder

    return model_folder(path)


def _show_batch(recipe: Recipe, out: Path | None) -> None:
    from deitkit.data.augment.preview import draw_views
    from deitkit.data.dataset import load_dataset

    folder = out or Path("runs")
    dataset = load_dataset(recipe.data)
    path = folder / f"{folder_name(recipe.name)}-views.png"
    draw_views(dataset, recipe.augment, recipe.train.label_smoothing, path)
    _say(f"augmented views in {path}")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    configure_process()
    try:
        app()
    except DeitkitError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        errors.print(str(stop) or "stopped; the same command with --resume goes on from here", highlight=False)
        sys.exit(getattr(stop, "exit_code", Interrupted.exit_code))
    except (MemoryError, RuntimeError) as error:
        if is_dead_worker(error):
            advice = "a process that decodes images died, killed or out of memory: --resume goes on; lower data.workers"
        elif is_out_of_memory(error):
            advice = "out of memory: lower train.batch_size, teacher.train.batch_size or data.image_px"
        else:
            raise
        errors.print(f"error: {advice}", style="red", soft_wrap=True)
        sys.exit(2)
