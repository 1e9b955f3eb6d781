"""The teachers of a recipe alone: trained or loaded, checked, and kept for later comparisons."""

from pathlib import Path

from deitkit.comparison.environment import require_same_teachers, write_environment_of_teachers
from deitkit.comparison.images import as_begun, require_same_images
from deitkit.data.dataset import load_labelled
from deitkit.errors import RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import begin_run, check_run
from deitkit.run.observer import Watcher
from deitkit.run.results import TeacherCard
from deitkit.system.device import Precision
from deitkit.teachers.prepare import common_card, dry_run_teachers, prepare_teachers


def train_teachers(
    recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False
) -> tuple[list[TeacherCard], TeacherCard]:
    """Prepare the teachers of a recipe in a run folder; return the card of each, and that of all together.

    Args:
        recipe: Its methods and students play no part.
        folder: New, or with ``resume`` one that holds such a run.
        watcher: Observes the run.
        resume: Continue a run of the same teachers.

    Raises:
        RecipeError: The folder holds a finished comparison, or what is not this run.
        TeacherError: A teacher cannot be built, or the gate refuses it.
    """
    if (folder / "results.json").exists():
        raise RecipeError(
            f"{folder} is a finished run, whose teacher is {folder / 'teacher'}: use that, or name a new folder with "
            "--out"
        )
    check_run(folder, recipe, resume)
    precision = Precision.of(recipe)
    data = as_begun(recipe.data, folder)
    dataset = load_labelled(data, watcher.reading, random_crops=recipe.has_random_crops)
    if len(set(dataset.image_px)) > 1:
        height, width = dataset.image_px
        raise RecipeError(
            f"the images are {height} x {width} px, but models are used on square ones: set data.image_px="
            f"{min(height, width)}"
        )
    require_same_images(dataset, folder, "all_images")
    require_same_teachers(recipe, dataset, folder)
    dry_run_teachers(recipe, dataset, folder, precision)
    begin_run(folder, recipe)
    write_environment_of_teachers(recipe, dataset, folder, precision)
    teachers, cards = prepare_teachers(recipe, dataset, folder=folder, precision=precision, watcher=watcher)
    return cards, common_card(teachers, cards, dataset, precision)
