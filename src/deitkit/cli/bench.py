"""The group of commands ``bench``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deitkit.cli.console import console, print_json, say
from deitkit.cli.options import Json, RecipeArgument
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.system.words import counted

app = typer.Typer(
    help="Measure how fast this machine trains and classifies. Fields are those of a recipe, as in "
    "`deitkit bench train data=cifar10 model.patch_px=4 train.batch_size=128 method=token-hard teacher=timm/resnet18`.",
    no_args_is_help=True,
)
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the recipe.")]
Base = Annotated[str | None, typer.Option("--recipe", help="Start from this recipe instead of the defaults.")]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="Use random images instead of a data set.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Number of measurements; their median is reported.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps in each measurement.")]


@app.command()
def train(
    overrides: Overrides = None,
    base: Base = None,
    synthetic: Synthetic = False,
    repeats: Repeats = 5,
    steps: Steps = 3,
    as_json: Json = False,
) -> None:
    """Time training steps: images/s, the share of each phase, and the throughput relative to a large matrix product."""
    from deitkit.bench.training_speed import bench_train

    result = bench_train(_load(overrides, base), synthetic=synthetic, repeats=repeats, steps=steps)
    if _printed_json(result, as_json):
        return
    table = _table(result, "training")
    _speed_rows(table, result)
    for name, share in result["shares"].items():
        table.add_row(f"time in {name}", f"{100 * share:.1f} %")
    _limit_rows(table, result)
    table.add_row("peak memory", f"{result['peak_memory_gib']:.2f} GiB")
    console.print(table)


@app.command()
def infer(
    overrides: Overrides = None,
    base: Base = None,
    table: Annotated[
        str | None, typer.Option("--table", help="paper: the models whose speed was published; zoo: all of them.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Time this model folder, run folder (its winner) or ONNX file.")
    ] = None,
    repeats: Repeats = 5,
    steps: Steps = 3,
    as_json: Json = False,
) -> None:
    """Time classification: a saved model; or, with random weights, a recipe's student or the paper's models."""
    from deitkit.bench.inference_speed import bench_catalogue, bench_infer, bench_saved

    recipe = _load(overrides, base)
    if model is not None and table is not None:
        raise typer.BadParameter("--model and --table exclude each other: give one")
    if table is None:
        timed = {"repeats": repeats, "steps": steps}
        result = bench_infer(recipe, **timed) if model is None else bench_saved(model, recipe, **timed)
        if not _printed_json(result, as_json):
            shown = _table(result, "classification")
            _speed_rows(shown, result)
            if model is None:
                _limit_rows(shown, result)
            console.print(shown)
        return
    if table not in ("paper", "zoo"):
        raise typer.BadParameter(f"'{table}' is not a table: write --table paper or --table zoo")
    rows = []
    for row in bench_catalogue(recipe, table=table, repeats=repeats, steps=steps):
        rows.append(row)
        if not as_json:
            say(f"{row['row']}: {_images_per_second(row)}")
    if not _printed_json(rows, as_json):
        _print_catalogue(rows)


@app.command()
def data(
    overrides: Overrides = None,
    base: Base = None,
    synthetic: Synthetic = False,
    repeats: Repeats = 5,
    steps: Steps = 10,
    as_json: Json = False,
) -> None:
    """Time reading and augmentation without a model."""
    from deitkit.bench.training_speed import bench_data

    result = bench_data(_load(overrides, base), synthetic=synthetic, repeats=repeats, steps=steps)
    if _printed_json(result, as_json):
        return
    table = _table(result, "reading and augmenting")
    table.add_row("read only", f"{result['read_images_per_second']:,.0f} images/s")
    _speed_rows(table, result)
    console.print(table)


@app.command()
def cohort(
    overrides: Overrides = None,
    base: Base = None,
    synthetic: Synthetic = False,
    repeats: Repeats = 5,
    steps: Steps = 1,
    as_json: Json = False,
) -> None:
    """Time all methods in one cohort and each alone, and print the memory that each student adds."""
    from deitkit.bench.training_speed import bench_cohort

    result = bench_cohort(_load(overrides, base), synthetic=synthetic, repeats=repeats, steps=steps)
    if _printed_json(result, as_json):
        return
    table = _table(result, "a cohort and its students alone")
    for name, seconds in result["seconds_per_step"].items():
        table.add_row(f"step of {name}", f"{1000 * seconds['median']:.1f} ms")
    table.add_row("teacher, in student's steps", f"{result['teacher_per_student_step']:.2f}")
    table.add_row("cohort / alone", f"{result['ratio']:.3f}")
    table.add_row("cohort with cached logits / alone", f"{result['ratio_cached']:.3f}")
    peaks = ", ".join(f"{peak:.2f}" for peak in result["peak_memory_gib"])
    table.add_row("peak memory of 1, 2, ... students", f"{peaks} GiB")
    console.print(table)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="GPUs (or processes) that share every step.")] = 1,
    speed: Annotated[
        float | None,
        typer.Option(
            "--speed",
            min=0.001,
            help="Images/s of one device, from `deitkit bench train` there; by default measured here.",
        ),
    ] = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="Training images, if not at hand.")] = None,
    decode: Annotated[
        float | None,
        typer.Option("--decode", min=0.001, help="Images/s that a core decodes; by default measured here."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option("--cores", min=1, help="Cores of all machines; by default those of this one.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0.0, help="Price of a device for an hour.")] = None,
    link: Annotated[float, typer.Option("--link", min=0.001, help="GB/s between the devices.")] = 25.0,
    as_json: Json = False,
) -> None:
    """Compute hours, cores, memory, traffic and cost of a recipe on several devices, and what limits it.

    The times of folds and variants are added up; memory, cores and traffic are those of the most demanding one. The
    training of a teacher is not part of it. For example
    `deitkit bench plan imagenet-deit-small-distilled --devices 8 --speed 2200 --cores 128 --price 3`.
    """
    from deitkit.bench.plan import Cluster
    from deitkit.bench.plan import plan as compute

    result = compute(
        load_recipe(recipe, overrides or []),
        Cluster(
            devices=devices, images_per_second=speed, images=images, decoded_per_second=decode, cores=cores,
            price=price, link_gb_per_second=link,
        ),
    )  # fmt: skip
    if _printed_json(result, as_json):
        return
    table = Table(title=f"{result['recipe']} on {devices} devices", show_header=False, box=None, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in _plan_rows(result):
        table.add_row(name, value)
    console.print(table)
    say(f"limited by {result['bottleneck']}")
    for note in result["notes"]:
        say(note)


def _plan_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from deitkit.system.words import duration_text

    yield "training images", f"{result['images']:,}"
    yield "views of all epochs, seeds, folds and variants", f"{result['views']:,}"
    yield f"images/s of all devices (one: {result['speed']})", f"{result['images_per_second']:,.0f}"
    yield "time", duration_text(3600 * result["hours"])
    for name, hours in result["parts"].items():
        yield f"of it {name}", duration_text(3600 * hours)
    yield "images/s that a core decodes", f"{result['decoded_per_second_and_core']:,.0f}"
    yield "cores that decode", f"{result['cores_to_decode']:,.1f} of {result['cores']}"
    yield "images in memory instead", f"{result['gib_in_memory']:,.1f} GiB"
    yield "a state of all students", f"{result['state_gib']:,.2f} GiB"
    yield "gradients of a step", f"{result['gradient_mb']:,.0f} MB, {1000 * result['traffic_seconds']:.1f} ms"
    yield "a step", f"{1000 * result['step_seconds']:,.1f} ms"
    if result["cost"] is not None:
        yield "cost", f"{result['cost']:,.0f}"


def _load(overrides: list[str] | None, base: str | None) -> Recipe:
    changes = [
        f"methods=[{change.partition('=')[2]}]" if change.startswith("method=") else change
        for change in overrides or []
    ]
    return load_recipe(base, changes)


def _printed_json(result: Any, as_json: bool) -> bool:
    if as_json:
        print_json(result)
    return as_json


def _table(result: dict[str, Any], title: str) -> Table:
    machine = result["machine"]
    cpu = f"{counted(machine['threads'], 'thread')} of {machine['processor']}"
    where = cpu if machine["device"] == "cpu" else machine["device"]
    title = f"{title}: {result['model']['name']}, {where}, {machine['precision']}, torch {machine['torch']}"
    table = Table(title=title, show_header=False, box=None, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    return table


def _speed_rows(table: Table, result: dict[str, Any]) -> None:
    low, high = result["images_per_second_range"]
    table.add_row("images/s", f"{result['images_per_second']:,.1f}")
    table.add_row("slowest and fastest", f"{low:,.1f} to {high:,.1f}")


def _limit_rows(table: Table, result: dict[str, Any]) -> None:
    table.add_row("GFLOP per image", f"{result['gflop_per_image']:.3f}")
    table.add_row("GFLOP/s", f"{result['gflop_per_second']:,.1f}")
    table.add_row("a large matrix product's", f"{result['limit_gflop_per_second']:,.1f}")
    table.add_row("share of it", f"{100 * result['share_of_limit']:.1f} %")


def _images_per_second(row: dict[str, Any]) -> str:
    return row["problem"] if "problem" in row else f"{row['images_per_second']:,.1f} images/s"


def _print_catalogue(rows: list[dict[str, Any]]) -> None:
    table = Table("model", "px", "images/s here", "published (V100)", "parameters", "GFLOP/image", box=None)
    for row in rows:
        known = "problem" not in row
        table.add_row(
            row["row"],
            str(row["image_px"]),
            _images_per_second(row),
            f"{row['published_images_per_second']:,.1f}" if row["published_images_per_second"] else "",
            f"{row['parameters'] / 1e6:.1f} M" if known else "",
            f"{row['gflop_per_image']:.1f}" if known else "",
        )
    console.print(table)
