"""Running a recipe: one comparison, or one for each variant or fold of it."""

from pathlib import Path

from deitkit.comparison.ablation import compare_variants
from deitkit.comparison.compare import compare
from deitkit.comparison.folds import compare_folds
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.run.results import Results


def run_recipe(recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False) -> Results:
    """Run a recipe into a folder and return its results; see ``compare`` for the arguments.

    Raises:
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    if recipe.variants:
        return compare_variants(recipe, folder, watcher=watcher, resume=resume)
    if recipe.is_cross_validation:
        return compare_folds(recipe, folder, watcher=watcher, resume=resume)
    return compare(recipe, folder, watcher=watcher, resume=resume)
