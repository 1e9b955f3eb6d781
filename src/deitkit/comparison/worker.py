"""What every process of a run but the first does: it helps to train, reads no options and writes no files."""

import signal
from contextlib import suppress
from types import FrameType

from deitkit.comparison.images import cache_last
from deitkit.comparison.seed_run import predict_students
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import Interrupted
from deitkit.models.accelerate import forget_compiled, release
from deitkit.recipe.schema import DataRecipe
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision
from deitkit.system.ranks import Ranks
from deitkit.teachers.build import build_teacher
from deitkit.teachers.images import load_teacher_images
from deitkit.teachers.prepare import (
    prepare_teachers,
    teacher_cohort,
    teacher_student,
)
from deitkit.training.build import build_cohort, build_students, needs_teacher
from deitkit.training.fit import help_to_the_end
from deitkit.training.shared import SharedTraining


class Stop:
    """Remembers a request to stop (Ctrl-C, SIGTERM), which ends the training of all processes after a step."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __call__(self) -> bool:
        return self.requested


def run_worker(ranks: Ranks) -> None:
    """Help with every training that the first process announces, until it says that the run has ended.

    A request to stop ends the training; this process then waits until the first one has saved it, since torchrun ends
    all processes as soon as one has failed.
    """
    stop, model = Stop(), None
    while (message := ranks.receive()) is not None:
        training = SharedTraining.model_validate(message)
        if training.recipe.model != model:  # of another variant
            forget_compiled()
            model = training.recipe.model
        with suppress(Interrupted):
            _help(training, ranks, stop)


def _help(training: SharedTraining, ranks: Ranks, stop: Stop) -> None:
    precision = Precision.of(training.recipe)
    if training.seed is None:
        _help_with_teacher(training, precision, ranks, stop)
    else:
        _help_with_students(training, training.seed, precision, ranks, stop)


def _help_with_teacher(training: SharedTraining, precision: Precision, ranks: Ranks, stop: Stop) -> None:
    recipe = training.recipe
    images = _load(recipe.data, recipe.has_random_crops)
    classifier, _ = build_teacher(recipe, images, training.folder.name, precision)
    student = teacher_student(training.folder.name, classifier, recipe.teacher, precision)
    images = load_teacher_images(recipe, images)
    help_to_the_end(teacher_cohort(student, recipe, images, precision, ranks), stop)


def _help_with_students(training: SharedTraining, seed: int, precision: Precision, ranks: Ranks, stop: Stop) -> None:
    recipe = training.recipe
    dataset = _load(recipe.data, recipe.has_random_crops)
    teachers = None
    if needs_teacher(recipe):
        teachers, _ = prepare_teachers(recipe, dataset, folder=training.folder, precision=precision, watcher=Watcher())
    students = build_students(recipe, dataset, seed, precision, names=training.names)
    cohort = build_cohort(students, recipe, dataset, teacher=teachers, seed=seed, precision=precision, ranks=ranks)
    help_to_the_end(cohort, stop)
    predict_students(students, dataset, precision, ranks)
    for student in students:
        release(student.classifier)


@cache_last
def _load(recipe: DataRecipe, random_crops: bool) -> Dataset:
    """Load the images of a recipe, which the first process has read, and so cached, before."""
    return load_dataset(recipe, random_crops=random_crops)
