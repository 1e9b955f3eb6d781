"""The students and teachers of a finished run, loaded as they were trained."""

from pathlib import Path

import torch

from deitkit.data.dataset import Dataset
from deitkit.errors import CheckpointError
from deitkit.models.accelerate import accelerate
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier
from deitkit.recipe.schema import Recipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.layout import seed_folder, teacher_folders
from deitkit.run.observer import Watcher
from deitkit.run.results import Results
from deitkit.system.device import Precision
from deitkit.teachers.frozen import Teachers
from deitkit.teachers.prepare import CARD, is_prepared, prepare_teachers
from deitkit.teachers.resolution import TeacherLogits, predict_test


def teachers_of(folder: Path, recipe: Recipe, dataset: Dataset, precision: Precision, watcher: Watcher) -> Teachers:
    """Load the teachers of a run, as they taught.

    Raises:
        CheckpointError: One of them is not in the run folder.
    """
    for home in teacher_folders(folder, len(recipe.all_teachers)):
        if not is_prepared(home):
            raise CheckpointError(f"{home} holds no {CARD}: copy the teacher's folder back into its run")
    teachers, _ = prepare_teachers(recipe, dataset, folder=folder, precision=precision, watcher=watcher)
    return teachers


def students_of(folder: Path, results: Results, seed: int) -> dict[str, Path]:
    """Return the folders of the students that finished their training under a seed; ``+ema`` for averaged weights.

    A row without a model in the run folder, such as that of a checkpoint before fine-tuning, has none.

    Args:
        folder: Of the run.
        results: Of the run.
        seed: Of the run.
    """
    place = results.seeds.index(seed)
    homes = {row.folder_name: seed_folder(folder, seed) / row.folder_name for row in results.rows}
    stopped = {row.folder_name for row in results.rows if row.top1[place:] and row.top1[place] is None}
    return {name: home for name, home in homes.items() if name not in stopped and (home / "model.json").exists()}


def load_as_trained(folder: Path, speed: SpeedRecipe, device: torch.device) -> Classifier:
    """Load a classifier with the kernels of its evaluation, so that its decisions are those of the table.

    It is never compiled: compiled blocks do not call the hooks of ``analyze``.
    """
    return accelerate(load_classifier(folder, device)[0], speed.model_copy(update={"compile": False}), device)


def predict_test_of_teachers(
    teachers: Teachers, recipe: Recipe, dataset: Dataset, folder: Path, precision: Precision
) -> list[TeacherLogits]:
    """Return each teacher's logits for the test images of a run."""
    return predict_test(teachers, teacher_folders(folder, len(recipe.all_teachers)), recipe.data, dataset, precision)
