"""The commands that train: ``compare``, ``train``, ``finetune`` and ``teacher``, and where their run folders go."""

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deitkit.cli.console import console, errors, print_json, say
from deitkit.cli.options import Json, On, Out, Overrides, RecipeArgument, Resume, Seeds
from deitkit.errors import RecipeError
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.system.process import was_restarted

if TYPE_CHECKING:
    from deitkit.run.results import Results, TeacherCard


def compare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    seeds: Seeds = None,
    folds: Annotated[
        int | None, typer.Option("--folds", min=2, help="Cross-validate: this many comparisons, in one table.")
    ] = None,
    resume: Resume = False,
    show_batch: Annotated[
        bool,
        typer.Option(
            "--show-batch", help="Draw augmented views with their labels into OUT/RECIPE-views.png instead of training."
        ),
    ] = False,
    on: On = None,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="With --on: GPUs (or processes) per unit, started by torchrun.")
    ] = 1,
    unit: Annotated[
        str | None,
        typer.Option("--unit", help="Run only a part: `prepare`, then in any order `1/8` to `8/8`. See docs/scale.md."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train students under every method of a recipe, side by side, and print which wins and by how much.

    For example `deitkit compare digits`, or `deitkit compare digits train.epochs=40 --seeds 3 --out runs/mine`, or with
    your own images `deitkit compare own-images data.name=folder:photos`.

    A recipe with `variants` is an ablation, such as `deitkit compare ablation-cifar10-cpu`: it runs the recipe
    unchanged, then each variant in its own folder under variants/, and prints one table of the differences from the
    base.

    With `--folds 5` every image is a test image once: five comparisons, each in its own folder under folds/, and one
    table. Use it where a single test set is too small to decide; it takes five times as long.

    With `--on local` its seeds, folds, variants or methods run as processes side by side, one on each GPU or core, and
    with `--on ray:ADDRESS` on the machines of a Ray cluster; what is lost starts again from its last state. To share
    every step of a training among GPUs: `torchrun --nproc-per-node=8 -m deitkit compare ...`.

    The run folder then contains table.md, table.csv, table.tex, curves.png, curves.svg, report.html, results.json, and
    the winner, ready for `deitkit predict`. Ctrl-C saves and stops; the same command with --resume continues.
    """
    loaded = _load(recipe, overrides, seeds, folds)
    if show_batch:
        _show_batch(loaded, out)
        return
    if on is None and devices > 1:
        raise RecipeError(f"--devices {devices} is of each unit of --on: add --on local, or start torchrun instead")
    if unit is not None:
        if on is not None or as_json:
            raise RecipeError(
                f"--unit {unit} runs one part in this process: drop {'--on' if on is not None else '--json'}"
            )
        _run_unit(loaded, out, unit)
        return
    _compare(loaded, out, resume, as_json, on, devices)


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    method: Annotated[str, typer.Option("--method", help="A method: see `deitkit methods`.")] = "token-hard",
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train one student under one method of a recipe: a comparison with one student."""
    from deitkit.distillation.methods import find_method

    name = find_method(method).name
    several = next((change for change in overrides or [] if change.startswith(("methods=", "baseline"))), None)
    if several is not None:
        raise RecipeError(f"{several}: train has one student, under --method; use `deitkit compare` for more")
    loaded = _load(recipe, [*(overrides or []), f"methods=[{name}]", "baseline=null"], None)
    _compare(loaded, out, resume, as_json)


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
    """Fine-tune a trained student at a higher resolution or on other data, with and without a teacher.

    For example `deitkit finetune runs/digits digits data.image_px=12`. The student of each method starts from the
    checkpoint and has its architecture; the table compares the students with the checkpoint before fine-tuning.
    """
    from deitkit.comparison.finetune import start_from

    _compare(start_from(_load(recipe, overrides, seeds), checkpoint), out, resume, as_json)


def teacher(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Train (or load) only the teachers of a recipe, check them, and print their cards.

    To use a teacher later: `deitkit compare RECIPE teacher.name=OUT/teacher`.
    """
    from deitkit.cli.progress import Terminal
    from deitkit.comparison.seed_run import LOCK_SECONDS
    from deitkit.comparison.teachers_only import train_teachers
    from deitkit.models.weights.pretrained import resolved
    from deitkit.run.folder import choose_run_folder, locked_run

    loaded = resolved(_load(recipe, overrides, None))
    restarted = was_restarted()
    folder = choose_run_folder(out, loaded, resume, "-teacher", restarted=restarted)
    resume = resume or restarted
    with (
        Terminal(errors if as_json else console) as terminal,
        locked_run(folder, LOCK_SECONDS if resume else 0.0, terminal.say),
    ):
        cards, together = train_teachers(loaded, folder, watcher=terminal, resume=resume)
    if as_json:
        print_json(_facts(together) | {"teachers": [_facts(card) for card in cards]})
        return
    _print_cards(cards, folder)
    if len(cards) > 1:
        say(f"the mean of their outputs: {100 * together.top1:.2f} % on {together.n} validation images")


def _facts(card: "TeacherCard") -> dict[str, Any]:
    from deitkit.run.results import TESTED

    return card.model_dump(exclude=TESTED)


def _print_cards(cards: list["TeacherCard"], folder: Path) -> None:
    from deitkit.run.layout import teacher_folders

    for home, card in zip(teacher_folders(folder, len(cards)), cards, strict=True):
        table = Table(box=None, show_header=False)
        for key, value in _facts(card).items():
            if value is not None:
                shares = ("top1", "chance", "own_px_top1", "view_px_top1")
                table.add_row(key, f"{100 * value:.2f} %" if key in shares else str(value))
        console.print(table)
        say(f"teacher in {home}: use it with teacher.name={home}")


def _run_unit(recipe: Recipe, out: Path | None, unit: str) -> None:
    from deitkit.cli.progress import Terminal
    from deitkit.comparison.units import run_unit

    if out is None:
        raise RecipeError(f"--unit {unit} runs a part of a comparison: name its run folder with --out")
    with Terminal(console, stopped="stopped; the same command continues") as terminal:
        run_unit(recipe, out, unit, watcher=terminal)


def _compare(
    recipe: Recipe, out: Path | None, resume: bool, as_json: bool, on: str | None = None, devices: int = 1
) -> None:
    from deitkit.cli.progress import Terminal
    from deitkit.comparison.pools import open_pool
    from deitkit.comparison.run import run_recipe
    from deitkit.comparison.seed_run import LOCK_SECONDS
    from deitkit.comparison.side_by_side import run_side_by_side
    from deitkit.models.weights.pretrained import resolved
    from deitkit.run.folder import choose_run_folder, locked_run
    from deitkit.run.results import AblationResults

    # --resume looks for a run of the recipe as it was stored
    recipe = resolved(recipe)
    restarted = was_restarted()
    folder = choose_run_folder(out, recipe, resume, restarted=restarted)
    resume = resume or restarted
    with Terminal(errors if as_json else console) as terminal, ExitStack() as stack:
        pool = None if on is None else open_pool(on, devices, recipe.device)
        terminal.say(f"run folder {folder}")
        if pool is None:
            stack.enter_context(locked_run(folder, LOCK_SECONDS if resume else 0.0, terminal.say))
            results = run_recipe(recipe, folder, watcher=terminal, resume=resume)
        else:
            stack.callback(pool.close)
            results = run_side_by_side(recipe, folder, pool=pool, watcher=terminal, resume=resume, devices=devices)
    if as_json:
        print_json(results.to_json())
    else:
        _print(results, folder)
    if results.winner is None and not isinstance(results, AblationResults):
        raise typer.Exit(1)  # no student reached the end of its training


def _print(results: "Results", folder: Path) -> None:
    from deitkit.report.table import rich_table
    from deitkit.run.layout import fold_folder
    from deitkit.run.results import AblationResults, FoldResults

    console.print(rich_table(results))
    say(f"page     {folder / 'report.html'}")
    say(f"curves   {folder / 'curves.png'}")
    for name in results.variants if isinstance(results, AblationResults) else ():
        say(f"variant  {folder / 'variants' / name}")
    for fold in results.folds if isinstance(results, FoldResults) else ():
        say(f"fold     {fold_folder(folder, fold)}")
    if results.winner is not None:
        say(f"winner   {folder / 'winner'}   (deitkit predict {shlex.quote(str(folder))} IMAGE...)")


def _show_batch(recipe: Recipe, out: Path | None) -> None:
    from deitkit.data.augment.preview import draw_views
    from deitkit.data.dataset import load_labelled
    from deitkit.run.folder import folder_name

    path = (out or Path("runs")) / f"{folder_name(recipe.name)}-views.png"
    dataset = load_labelled(recipe.data, random_crops=recipe.has_random_crops)
    draw_views(dataset, recipe.augment, recipe.train.label_smoothing, path)
    say(f"augmented views in {path}")


def _load(source: str, overrides: list[str] | None, seeds: int | None, folds: int | None = None) -> Recipe:
    changes = list(overrides or [])
    options = (("seeds", seeds, list(range(seeds or 0))), ("data.folds", folds, folds))
    for field, given, value in options:
        if given is None:
            continue
        twice = next((change for change in changes if change.startswith(f"{field}=")), None)
        if twice is not None:
            raise RecipeError(f"--{field.removeprefix('data.')} {given} and {twice} exclude each other: give one")
        changes.append(f"{field}={value}")
    return load_recipe(source, changes)
