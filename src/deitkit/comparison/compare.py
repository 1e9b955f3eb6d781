"""A comparison: recipe -> teacher -> cohorts over seeds -> test set, once -> results.json -> report.

Each stage writes its result into the run folder, so that a stopped run resumes at the stage that it had reached.
"""

from collections.abc import Sequence
from pathlib import Path

from deitkit.comparison.advice import advice
from deitkit.comparison.collect_results import collect_results
from deitkit.comparison.cost import add_costs
from deitkit.comparison.describe import describe_device
from deitkit.comparison.environment import machine_of, require_same_ingredients
from deitkit.comparison.images import load_images
from deitkit.comparison.prepare import prepare_comparison
from deitkit.comparison.seed_run import (
    SeedRun,
    run_seed,
)
from deitkit.comparison.winner import copy_winner
from deitkit.data.dataset import Dataset
from deitkit.errors import RecipeError
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.schema import Recipe
from deitkit.report.write import write_report
from deitkit.run.folder import check_run
from deitkit.run.layout import REPORT, seed_folder, teacher_folders
from deitkit.run.observer import Watcher
from deitkit.run.results import (
    Results,
    read_results,
    write_results,
)
from deitkit.system.device import Precision
from deitkit.teachers.prepare import is_prepared, prepare_teachers
from deitkit.training.build import (
    needs_teacher,
)


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    watcher: Watcher,
    resume: bool = False,
    dataset: Dataset | None = None,
    costs: bool = True,
) -> Results:
    """Run a comparison into a folder and return its results.

    Args:
        recipe: What to compare.
        folder: New or empty; with ``resume`` one that this recipe has prepared.
        watcher: Receives progress, and may request a stop.
        resume: Continue a run that was stopped, or train the methods and seeds that it lacks; a finished run is only
            reported again.
        dataset: What ``recipe.data`` names, if it is loaded already.
        costs: Measure what each model costs to use, which other processes on this machine would disturb.

    Raises:
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    prepared = prepare_comparison(recipe, folder, watcher=watcher, resume=resume, dataset=dataset)
    recipe, precision = prepared.recipe, prepared.precision
    for seed in recipe.seeds:
        run_seed(SeedRun(recipe, prepared.dataset, prepared.teachers, precision, seed, folder, watcher))
    results = collect_results(prepared, folder)
    return _conclude(_with_costs(results, recipe, folder, precision, watcher) if costs else results, folder)


def complete(recipe: Recipe, folder: Path, watcher: Watcher) -> None:
    """Measure what the models of a finished comparison cost to use, if it ended without; it ran beside others."""
    results = read_results(folder)
    if any(row.cost is None and row.top1_mean is not None and row.kind != "checkpoint" for row in results.rows):
        precision = Precision.of(recipe)
        measured = _with_costs(results, recipe, folder, precision, watcher)
        _conclude(measured.model_copy(update={"machine": machine_of(precision)}), folder)


def _with_costs(results: Results, recipe: Recipe, folder: Path, precision: Precision, watcher: Watcher) -> Results:
    watcher.say("measuring what each model costs to use")
    return add_costs(results, recipe, folder, precision)


def train_part(recipe: Recipe, folder: Path, seed: int, names: Sequence[str], *, watcher: Watcher) -> None:
    """Train some students of a seed of a comparison that is prepared, while other processes train others.

    Raises:
        RecipeError: It is not prepared.
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    recipe = resolved(recipe)
    precision = Precision.of(recipe)
    for line in describe_device(recipe, precision):
        watcher.say(line)
    homes = teacher_folders(folder, len(recipe.all_teachers) if needs_teacher(recipe) else 0)
    check_run(folder, recipe, resume=True)
    if not (folder / "recipe.yaml").exists() or not all(map(is_prepared, homes)):
        raise RecipeError(f"{folder} is not prepared, or its teacher is not: run --unit prepare first")
    dataset = load_images(recipe, folder, watcher)
    require_same_ingredients(recipe, dataset, folder)
    teachers = None
    if homes:
        teachers, _ = prepare_teachers(recipe, dataset, folder=folder, precision=precision, watcher=watcher)
    run_seed(SeedRun(recipe, dataset, teachers, precision, seed, folder, watcher), part=names)


def _conclude(results: Results, folder: Path) -> Results:
    """Add the advice, and write the winner, the results and the reports."""
    results = results.model_copy(update={"advice": advice(results)})
    copy_winner(results, folder, [seed_folder(folder, seed) for seed in results.seeds])
    (folder / REPORT).unlink(missing_ok=True)  # which is written last, so that its absence tells of a kill before
    write_results(results, folder)
    write_report(folder)
    return results


def has_finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether a run folder holds results of all methods and seeds of a recipe and of no others, and a report."""
    if not (folder / "results.json").exists() or not (folder / REPORT).exists():
        return False
    results = read_results(folder)
    return results.recipe["methods"] == list(recipe.methods) and results.seeds == recipe.seeds
