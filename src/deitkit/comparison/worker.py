"""What every process of a run but the first does: it helps to train, reads no options and writes no files."""

import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeAlias

from deitkit.comparison.images import cache_last
from deitkit.comparison.seed_run import predict_students
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import CheckpointError, DataError, DeitkitError, Interrupted
from deitkit.models.accelerate import forget_compiled, release
from deitkit.recipe.schema import DataRecipe
from deitkit.run.layout import teacher_folders
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision
from deitkit.system.ranks import Ranks
from deitkit.teachers.build import build_teacher
from deitkit.teachers.frozen import Teachers
from deitkit.teachers.images import load_teacher_images
from deitkit.teachers.prepare import is_prepared, prepare_teachers, teacher_cohort, teacher_student
from deitkit.training.build import build_cohort, build_students, needs_teacher
from deitkit.training.fit import help_to_the_end
from deitkit.training.shared import SharedTraining, images_hash


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


Train: TypeAlias = Callable[[Ranks, Stop], None]


def run_worker(ranks: Ranks) -> None:
    """Help with every training that the first process announces.

    A request to stop ends the training; this process then waits until the first one has saved it, since torchrun ends
    all processes as soon as one has failed.

    Raises:
        SystemExit: The first process has ended, with this exit code.
    """
    stop, model = Stop(), None
    while True:
        training = SharedTraining.model_validate(ranks.receive())
        if training.recipe.model != model:  # of another variant
            forget_compiled()
            model = training.recipe.model
        with suppress(Interrupted):
            _help(training, ranks, stop)


def _help(training: SharedTraining, ranks: Ranks, stop: Stop) -> None:
    prepare, refusal = _prepare_teacher if training.seed is None else _prepare_students, ""
    try:
        train = prepare(training)
    except DeitkitError as error:
        refusal = f"on {socket.gethostname()}: {error}"
    if not ranks.agreed_refusal(refusal):  # which the first process reports, and then ends the run
        train(ranks, stop)


def _prepare_teacher(training: SharedTraining) -> Train:
    """Build what trains a teacher; raise DeitkitError if this process cannot."""
    recipe, precision = training.recipe, Precision.of(training.recipe)
    dataset, images = load_same_images(training)
    require_prepared(training)
    classifier, _ = build_teacher(recipe, dataset, training.folder.name, precision)
    student = teacher_student(training.folder.name, classifier, recipe.teacher, precision)
    return lambda ranks, stop: help_to_the_end(teacher_cohort(student, recipe, images, precision, ranks), stop)


def _prepare_students(training: SharedTraining) -> Train:
    """Build what trains some students of a seed; raise DeitkitError if this process cannot."""
    recipe, seed, precision = training.recipe, training.seed, Precision.of(training.recipe)
    assert seed is not None
    dataset, _ = load_same_images(training)
    require_prepared(training)
    teachers: Teachers | None = None
    if needs_teacher(recipe):
        teachers, _ = prepare_teachers(recipe, dataset, folder=training.folder, precision=precision, watcher=Watcher())
    students = build_students(recipe, dataset, seed, precision, names=training.names)

    def train(ranks: Ranks, stop: Stop) -> None:
        cohort = build_cohort(students, recipe, dataset, teacher=teachers, seed=seed, precision=precision, ranks=ranks)
        help_to_the_end(cohort, stop)
        predict_students(students, dataset, precision, ranks)
        for student in students:
            release(student.classifier)

    return train


def load_same_images(training: SharedTraining) -> tuple[Dataset, Dataset]:
    """Return the images of the run, and those of this training: for a teacher's own these may be more.

    Raises:
        DataError: The latter are not those of the first process.
    """
    recipe = training.recipe
    dataset = _load(recipe.data, recipe.has_random_crops)
    images = load_teacher_images(recipe, dataset) if training.seed is None else dataset
    if images_hash(images) != training.images:
        place = "" if recipe.data.root is None else f" in data.root={recipe.data.root}"
        raise DataError(
            f"data.name={recipe.data.name}{place} has other images or labels than for the first process: let all "
            "machines read the same files, with the same version of Pillow"
        )
    return dataset, images


def require_prepared(training: SharedTraining) -> None:
    """Raise CheckpointError if the run folder, with the teachers that the first process prepared, is not here."""
    recipe, students = training.recipe, training.seed is not None
    teachers = len(recipe.all_teachers) if students and needs_teacher(recipe) else 0
    if not training.folder.is_dir() or not all(map(is_prepared, teacher_folders(training.folder, teachers))):
        raise CheckpointError(
            f"the folder {training.folder} of the first process is not here, or without its teacher: name one with "
            "--out that all machines see under the same path"
        )


@cache_last
def _load(recipe: DataRecipe, random_crops: bool) -> Dataset:
    """Load the images of a recipe, which the first process has read, and so cached, before."""
    return load_dataset(recipe, random_crops=random_crops)
