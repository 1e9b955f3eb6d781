"""The units of a comparison: parts that separate processes run, on several devices or machines.

``prepare`` checks the recipe, begins the run folder and trains the teachers. Then the other units run in any order and
side by side; the same command without a unit gathers what they have left in the run folder.
"""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from deitkit.comparison.ablation import named_in_errors, prepare_variants, variant_recipes
from deitkit.comparison.cohort_states import missing_students
from deitkit.comparison.compare import compare, has_finished, train_part
from deitkit.comparison.folds import fold_recipes, prepare_folds
from deitkit.comparison.prepare import prepare_comparison
from deitkit.comparison.seed_run import LOCK_SECONDS
from deitkit.errors import RecipeError
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import check_run, locked
from deitkit.run.layout import fold_folder, seed_folder, variant_folder
from deitkit.run.observer import Watcher
from deitkit.training.build import student_names

PREPARE = "prepare"


def divide(recipe: Recipe, count: int, folder: Path | None = None) -> list[str]:
    """Divide a comparison into units: about as many as can run side by side, or more.

    A fold or a variant is a unit. So is a seed, since its students share views and teacher, unless there are fewer
    seeds than ``count``: then the students of each are divided.

    Args:
        recipe: Of the comparison.
        count: How many units can run side by side.
        folder: Leave out what is finished in this run folder.

    Returns:
        Names: ``fold-2``, ``variant-NAME``, ``seed-0``, or ``seed-0/none,soft``.
    """
    if recipe.variants or recipe.is_cross_validation:
        return [
            name for name, (home, own) in _parts(recipe, folder).items() if home is None or not has_finished(home, own)
        ]
    names = student_names(recipe)
    missing = {seed: names if folder is None else missing_students(folder, seed, names) for seed in recipe.seeds}
    missing = {seed: some for seed, some in missing.items() if some}
    groups = -(-count // max(1, len(missing)))
    return [
        f"seed-{seed}" if len(some) == len(names) else f"seed-{seed}/{','.join(some)}"
        for seed, each in missing.items()
        for some in _groups(each, groups)
    ]


def _parts(recipe: Recipe, folder: Path | None) -> dict[str, tuple[Path | None, Recipe]]:
    """Return the run folder (None of no folder) and the recipe of each fold or variant, by the name of its unit."""
    if recipe.variants:
        variants = variant_recipes(recipe)
        return {f"variant-{name}": (folder and variant_folder(folder, name), own) for name, own in variants.items()}
    folds = fold_recipes(recipe)
    return {f"fold-{fold}": (folder and fold_folder(folder, fold), own) for fold, own in folds.items()}


def _groups(names: Sequence[str], count: int) -> list[Sequence[str]]:
    """Divide names into at most ``count`` groups of nearly equal size."""
    count = min(count, len(names))
    ends = [len(names) * number // count for number in range(count + 1)]
    return [names[start:end] for start, end in itertools.pairwise(ends)]


def unit_folders(folder: Path, unit: str) -> list[Path]:
    """Return the folders in a run folder in which a unit keeps what it trains; for any other name the run folder."""
    kind, _, which = unit.partition("-")
    if unit == PREPARE:
        return [*folder.glob("teacher*"), *folder.glob("variants/*/teacher*")]
    if kind == "seed":
        seed, _, students = which.partition("/")
        home = seed_folder(folder, int(seed))
        return [home / name for name in students.split(",")] if students else [home]
    if kind == "fold":
        return [fold_folder(folder, int(which))]
    return [variant_folder(folder, which)] if kind == "variant" else [folder]


def run_unit(recipe: Recipe, folder: Path, unit: str, *, watcher: Watcher) -> None:
    """Run one unit of a comparison; one that is finished already ends at once.

    Args:
        recipe: Of the comparison.
        folder: Its run folder, on a disk that all processes see.
        unit: ``prepare``, a name from ``divide``, or ``2/8`` for the second of eight shares of all units.
        watcher: Receives progress, and may request a stop.

    Raises:
        RecipeError: There is no such unit, or the run folder is not prepared.
        Interrupted: The watcher requested a stop; the same unit continues.
    """
    recipe = resolved(recipe)
    if unit == PREPARE:
        with locked(folder, LOCK_SECONDS, watcher.say):
            _prepare(recipe, folder, watcher)
        return
    check_run(folder, recipe, resume=True)
    if not (folder / "recipe.yaml").exists():
        raise RecipeError(f"{folder} is not prepared: run --unit prepare first")
    for name in _named(recipe, unit):
        watcher.say(f"unit {name}")
        kind, _, which = name.partition("-")
        if kind == "seed":
            seed, _, students = which.partition("/")
            names = students.split(",") if students else student_names(recipe)
            train_part(recipe, folder, int(seed), names, watcher=watcher)
            continue
        home, own = _parts(recipe, folder)[name]
        assert home is not None
        if has_finished(home, own):
            continue
        with locked(home, LOCK_SECONDS, watcher.say), named_in_errors(which) if kind == "variant" else nullcontext():
            compare(own, home, watcher=watcher, resume=True, costs=False)


def _prepare(recipe: Recipe, folder: Path, watcher: Watcher) -> None:
    if recipe.variants:
        prepare_variants(recipe, folder, watcher=watcher, resume=True)
    elif recipe.is_cross_validation:
        prepare_folds(recipe, folder, watcher=watcher, resume=True)
    else:
        prepare_comparison(recipe, folder, watcher=watcher, resume=True)


def _named(recipe: Recipe, unit: str) -> list[str]:
    """Return the units that a name or a share (``2/8``) stands for.

    Raises:
        RecipeError: It stands for none.
    """
    number, _, count = unit.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return divide(recipe, int(count))[int(number) - 1 :: int(count)]
    units = divide(recipe, 1)
    name, slash, students = unit.partition("/")
    if name in units and slash and name.startswith("seed-"):
        chosen, known = students.split(","), student_names(recipe)
        if len(set(chosen)) < len(chosen) or not set(chosen) <= {*known}:
            raise RecipeError(f"--unit {unit}: name some of {', '.join(known)} after the seed, each once")
    elif name not in units or slash:
        raise RecipeError(
            f"--unit {unit} is not a unit of this recipe: name {PREPARE}, a share such as 1/{len(units)}, or one of "
            f"{', '.join(units)}"
        )
    return [unit]
