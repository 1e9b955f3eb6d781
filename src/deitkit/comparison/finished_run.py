"""The students and teachers of a finished run, loaded as they were trained."""

from pathlib import Path
from typing import Any

import torch

from deitkit.data.dataset import Dataset
from deitkit.errors import CheckpointError
from deitkit.models.accelerate import accelerate
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier
from deitkit.recipe.schema import Recipe, SpeedRecipe
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision
from deitkit.teachers.prepare import prepare_teachers, teacher_folders


def teachers_of(
    folder: Path, recipe: Recipe, dataset: Dataset, precision: Precision, watcher: Watcher
) -> list[Classifier]:
    """Load the teachers of a run, as they taught.

    Raises:
        CheckpointError: One of them is not in the run folder.
    """
    for home in teacher_folders(recipe, folder / "teacher"):
        if not (home / "card.json").exists():
            raise CheckpointError(f"{home} holds no card.json: copy the teacher's folder back into its run")
    teachers, _ = prepare_teachers(recipe, dataset, folder=folder / "teacher", precision=precision, watcher=watcher)
    return teachers.classifiers


def students_of(folder: Path, results: dict[str, Any], seed: int) -> dict[str, Path]:
    """Return the folders of the students that reached the end of their training under a seed; ``+ema`` for averages.

    A row whose model the run does not hold, such as that of a model before it was fine-tuned, has none.

    Args:
        folder: Of the run.
        results: Its ``results.json``.
        seed: Of the run.
    """
    place = results["seeds"].index(seed)
    homes = {student_name(row): folder / f"seed-{seed}" / student_name(row) for row in results["rows"]}
    stopped = {student_name(row) for row in results["rows"] if row["top1"][place:] and row["top1"][place] is None}
    return {name: home for name, home in homes.items() if name not in stopped and (home / "model.json").exists()}


def load_as_trained(folder: Path, speed: SpeedRecipe, device: torch.device) -> Classifier:
    """Load a classifier with the kernels that it was measured with, so that it decides as in the table.

    Only compiled it is not: compiled blocks would not call the hooks that look into them.
    """
    return accelerate(load_classifier(folder, device)[0], speed.model_copy(update={"compile": False}), device)


def student_name(row: dict[str, Any]) -> str:
    """Return the name of a row's student, which is that of its folder."""
    return f"{row['method']}+ema" if row["weights"] == "ema" else str(row["method"])
