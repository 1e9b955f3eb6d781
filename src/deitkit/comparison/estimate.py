"""Estimate how long a comparison will train on this machine, from a few steps of its cohorts."""

import gc
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from deitkit.comparison.cohort_states import missing_students, training_has_begun
from deitkit.data.dataset import Dataset
from deitkit.recipe.schema import Recipe
from deitkit.run.layout import seed_folder, teacher_folders
from deitkit.system.device import Precision
from deitkit.system.ranks import ALONE
from deitkit.system.words import duration_text
from deitkit.teachers.build import build_teacher
from deitkit.teachers.frozen import FrozenTeacher, Teachers
from deitkit.teachers.images import load_teacher_images
from deitkit.teachers.prepare import (
    is_prepared,
    is_trained,
    read_teacher,
    teacher_cohort,
    teacher_student,
)
from deitkit.training.build import build_cohort, build_students, needs_teacher, student_names
from deitkit.training.cohort import Cohort

# Views of all students together under which a run takes about a minute, and an estimate would cost a part of it.
LEAST_VIEWS = 100_000
WARM_UP_STEPS, TIMED_STEPS = 1, 2


@dataclass(frozen=True)
class Estimate:
    """Seconds of training that are left; validation and reports come on top.

    Attributes:
        teachers: Of the teachers.
        students: Of all students, over all seeds.
        what: ``training``, or which part of a cross-validation.
    """

    teachers: float
    students: float
    what: str = "training"

    def __str__(self) -> str:
        parts = {"teacher": self.teachers, "students": self.students}
        shares = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in parts.items() if seconds > 0)
        return f"{self.what} will take about {duration_text(self.teachers + self.students)} on this machine ({shares})"


def estimate_training(recipe: Recipe, dataset: Dataset, folder: Path, precision: Precision) -> Estimate | None:
    """Time a few steps of what a run folder lacks, and return how long all of it will take.

    Returns:
        None where the steps' speed is not that of the run: on a GPU, which records its first steps; where the run is
        too short to be worth it; and where a training has begun, whose own progress tells.
    """
    missing = {seed: missing_students(folder, seed, student_names(recipe)) for seed in recipe.seeds}
    count = sum(len(names) for names in missing.values())
    views = count * recipe.train.epochs * len(dataset.train)
    homes = teacher_folders(folder, len(recipe.all_teachers))
    begun = any(training_has_begun(home) for home in (*homes, *(seed_folder(folder, seed) for seed in recipe.seeds)))
    if precision.device.type != "cpu" or count == 0 or views < LEAST_VIEWS or begun:
        return None
    teachers = []
    seconds_of_teachers = 0.0
    for one, home in zip(recipe.all_teachers, homes, strict=True) if needs_teacher(recipe) else ():
        if is_prepared(home):
            teachers.append(read_teacher(home, recipe.speed, precision)[0])
            continue
        alone = recipe.with_teacher(one)
        classifier, card = build_teacher(alone, dataset, home.name, precision)
        if card.fit != "none" and not is_trained(home):
            student = teacher_student("teacher", classifier, one, precision)
            images = load_teacher_images(alone, dataset)
            seconds_of_teachers += _seconds(teacher_cohort(student, alone, images, precision, ALONE), one.train.epochs)
            del images
        teachers.append(FrozenTeacher(classifier))
    students = build_students(recipe, dataset, recipe.seeds[0], precision, names=max(missing.values(), key=len))
    together = Teachers(teachers) if teachers else None
    cohort = build_cohort(students, recipe, dataset, teacher=together, seed=recipe.seeds[0], precision=precision)
    each = _seconds(cohort, recipe.train.epochs)
    del cohort
    gc.collect()  # the cohorts, before the run builds its own
    what = "training" if recipe.data.fold is None else f"fold {recipe.data.fold} of {recipe.data.folds}"
    return Estimate(seconds_of_teachers, each * count / len(students), what)


def _seconds(cohort: Cohort, epochs: int) -> float:
    """Return how long a cohort will train, by its first steps."""
    for student in cohort.students:
        student.classifier.train()
    steps = min(WARM_UP_STEPS + TIMED_STEPS, cohort.batches.steps_per_epoch)
    batches = cohort.batches.epoch(0, 0)
    warm_up = min(WARM_UP_STEPS, steps - 1)
    with closing(cohort.views):
        for _ in range(warm_up):
            cohort.next_step(batches)
        started = time.perf_counter()
        for _ in range(steps - warm_up):
            cohort.next_step(batches)
        seconds = time.perf_counter() - started
    return seconds / (steps - warm_up) * cohort.batches.steps_per_epoch * epochs
