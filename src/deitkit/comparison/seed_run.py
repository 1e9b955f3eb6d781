"""One seed of a comparison: the cohorts of its unfinished students, and the files of the finished ones.

A student learns the same alone as in a cohort, so a comparison may grow: only missing students are trained. Its files
are in its own folder, `seed-N/STUDENT/`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from deitkit.comparison.cohort_states import PREDICTIONS, STATE, PlannedCohort, holds, plan_cohorts, write_own_metrics
from deitkit.comparison.environment import machine_of
from deitkit.comparison.rows import StudentPredictions
from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import sketch
from deitkit.errors import CheckpointError
from deitkit.evaluation.predict import predict_all
from deitkit.evaluation.readouts import readout_scores
from deitkit.evaluation.seen_images import card_of_data, images_before
from deitkit.models.accelerate import release
from deitkit.models.classifier import Classifier
from deitkit.models.saved import read_card, save_classifier
from deitkit.models.weights.initialise import card_of, weights_file
from deitkit.models.weights.pretrained import initial_weights_path
from deitkit.models.weights.read import require_whole
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import locked, unreadable
from deitkit.run.layout import BASELINE, seed_folder
from deitkit.run.metrics import EpochMetrics, read_metrics, write_metrics
from deitkit.run.observer import Watcher
from deitkit.run.state import drop_state, load_tree, save_tree
from deitkit.system.device import Precision
from deitkit.system.ranks import Ranks
from deitkit.teachers.frozen import Teachers
from deitkit.teachers.logit_cache import open_logit_cache
from deitkit.training.build import (
    baseline_architecture,
    baseline_origin,
    build_cohort,
    build_students,
    describe_initial_weights,
    student_names,
)
from deitkit.training.fit import train_to_end
from deitkit.training.shared import announce, ranks_that_share
from deitkit.training.student import Student

LOCK_SECONDS = 180.0  # until a machine that was lost has lost its locks, too
Scores: TypeAlias = dict[str, dict[str, dict[str, dict[str, Tensor]]]]  # student, weights, split, readout


@dataclass(frozen=True)
class SeedRun:
    """One seed of a comparison.

    Attributes:
        recipe: Of the comparison.
        dataset: Its images.
        teachers: None if no student needs one.
        precision: Of the forward passes, and the device.
        seed: One of the recipe's.
        folder: The run folder.
        watcher: Receives progress, and may request a stop.
    """

    recipe: Recipe
    dataset: Dataset
    teachers: Teachers | None
    precision: Precision
    seed: int
    folder: Path
    watcher: Watcher

    @property
    def home(self) -> Path:
        """The folder of its students."""
        return seed_folder(self.folder, self.seed)


def run_seed(run: SeedRun, part: Sequence[str] | None = None) -> None:
    """Train the students of a seed that are not finished, save them, and predict the test images once.

    Args:
        run: The seed.
        part: Only these students, while other processes may train others: states and metrics stay in their folders.

    Raises:
        CheckpointError: Another process trains one of them.
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    home, everyone, say = run.home, student_names(run.recipe), run.watcher.say
    names = everyone if part is None else part
    _report_finished(home, names, everyone, say)
    patience = 0.0 if part is None else LOCK_SECONDS

    def plan() -> list[PlannedCohort]:
        with locked(home, patience, say):
            return plan_cohorts(home, names, everyone, say, patience, apart=part is not None)

    cohorts = plan()
    while cohorts:
        planned = cohorts.pop(0)
        with ExitStack() as stack:
            for name in planned.names:
                stack.enter_context(locked(home / name, patience, say))
            if holds(planned, home):
                _train_cohort(run, planned, _move_metrics(run, planned, apart=part is not None))
                continue
        cohorts = plan()  # another process trained one of them while this one waited for it


def _train_cohort(run: SeedRun, planned: PlannedCohort, metrics_home: Path) -> None:
    """Train some students of a seed together, and keep what they learnt."""
    recipe, dataset, teachers, precision, seed = run.recipe, run.dataset, run.teachers, run.precision, run.seed
    students = build_students(recipe, dataset, seed, precision, names=planned.names)
    ranks = ranks_that_share(students, sum(step_images(recipe, dataset).values()), precision.device, run.watcher.say)
    logit_cache = None
    if teachers is not None and any(teacher.cache for teacher in recipe.all_teachers):
        if ranks.count > 1:
            run.watcher.say("teacher.cache is not used by several processes: the teacher answers at every step")
        else:
            logit_cache = open_logit_cache(recipe, dataset, teachers, seed, precision)
    announce(ranks, recipe, dataset, run.folder, seed=seed, names=[student.name for student in students])
    cohort = build_cohort(
        students,
        recipe,
        dataset,
        teacher=teachers,
        seed=seed,
        precision=precision,
        ranks=ranks,
        logit_cache=logit_cache,
    )
    train_to_end(
        cohort,
        title=f"seed {seed}",
        checkpoint=planned.state,
        folder=metrics_home,
        watcher=run.watcher,
        log_folder=seed_folder(run.folder / "tensorboard", seed),
        save_seconds=recipe.speed.save_seconds,
    )
    scores = predict_students(students, dataset, precision, ranks)
    # Where a student's folder has the metrics of all, its own come last, which replace those of the others.
    in_order = sorted(students, key=lambda student: run.home / student.name == metrics_home)
    _keep(run, in_order, scores, read_metrics(metrics_home))
    for student in students:
        release(student.classifier)
    for state in (planned.state, *(run.home / name / STATE for name in planned.names)):
        drop_state(state)


def step_images(recipe: Recipe, dataset: Dataset) -> dict[str, int]:
    """Return the images of a step of the students, by the fields that set their numbers."""
    sizes = {"train.batch_size": recipe.train.batch_size}
    unlabelled = dataset.unlabelled_in_step(recipe.unlabelled_in_step)
    return sizes | ({"train.unlabelled_batch_size": unlabelled} if unlabelled else {})


def _report_finished(home: Path, names: Sequence[str], everyone: Sequence[str], say: Callable[[str], None]) -> None:
    """Report which students are finished before others train, and which are left out of the table.

    Raises:
        CheckpointError: A finished student's model is missing or damaged.
    """
    finished = sorted(path.parent.name for path in home.glob(f"*/{PREDICTIONS}"))
    there = [name for name in finished if name in names]
    for name in there:
        try:
            read_card(home / name)
            require_whole(home / name / "model.safetensors")
        except CheckpointError as error:
            raise unreadable(home / name, error) from None
    missing = [name for name in names if name not in finished]
    left_out = [name for name in finished if name not in everyone]
    if there and missing:
        say(f"{home.name}: {', '.join(there)} finished before; training {', '.join(missing)}")
    if left_out:
        say(f"{home.name}: {', '.join(left_out)} not a method of the recipe: left out of the table, its folder stays")


def predict_students(students: Sequence[Student], dataset: Dataset, precision: Precision, ranks: Ranks) -> Scores:
    """Return the scores of each student's last and averaged weights for the validation and the test images.

    All processes that share the steps must call this.
    """
    weights = {student.name: _weights(student) for student in students}
    scores: Scores = {name: {which: {} for which in classifiers} for name, classifiers in weights.items()}
    for split in ("validation", "test"):
        everyone = [(name, which, classifier) for name, some in weights.items() for which, classifier in some.items()]
        classifiers = [classifier for _, _, classifier in everyone]
        outputs = predict_all(classifiers, getattr(dataset, split), precision, ranks=ranks)
        for (name, which, _), output in zip(everyone, outputs, strict=True):
            scores[name][which][split] = readout_scores(output)
    return scores


def _keep(run: SeedRun, students: Sequence[Student], scores: Scores, metrics: Sequence[EpochMetrics]) -> None:
    """Write each student's weights, metrics and predictions; the predictions mark it as finished."""
    for student in students:
        home = run.home / student.name
        card = _student_card(run.recipe, run.dataset, student, run.seed)
        save_classifier(home, student.classifier, card)
        if student.average is not None:
            save_classifier(home.with_name(f"{student.name}+ema"), student.average.classifier, card)
        write_own_metrics(home, metrics, run.seed)
        predictions = StudentPredictions(
            status=student.stopped,
            parameters=sum(parameter.numel() for parameter in student.classifier.model.parameters()),
            scores=scores[student.name],
            machine=machine_of(run.precision),
        )
        save_tree(home / PREDICTIONS, vars(predictions))


def _move_metrics(run: SeedRun, planned: PlannedCohort, *, apart: bool) -> Path:
    """Put the metrics of students that continue where this training adds its own; return that folder.

    They may be among those of the run, in the students' folders, or in the folder in which the state is.
    """
    of_run, own = read_metrics(run.folder), planned.state.parent
    if not apart:
        set_aside = [line for name in planned.names for line in read_metrics(run.home / name)]
        if set_aside:
            write_metrics(of_run + set_aside, run.folder)
        return run.folder
    earlier = [line for line in of_run if line.seed == run.seed and line.student in planned.names]
    if earlier:
        write_metrics(earlier + read_metrics(own), own)
    return own


def load_predictions(
    folder: Path, seeds: Sequence[int], names: Sequence[str]
) -> dict[int, dict[str, StudentPredictions]]:
    """Return the predictions of finished students by seed and name."""
    return {
        seed: {name: StudentPredictions(**load_tree(seed_folder(folder, seed) / name / PREDICTIONS)) for name in names}
        for seed in seeds
    }


def gather_metrics(folder: Path, seeds: Sequence[int], names: Sequence[str]) -> None:
    """Write the metrics of finished students as those of the run, in the order of one cohort a seed.

    Those of a seed that left the comparison unfinished move into its students' folders.
    """
    of_run = read_metrics(folder)
    for seed, name in dict.fromkeys((line.seed, line.student) for line in of_run if line.seed not in seeds):
        home = seed_folder(folder, seed) / name
        if not (home / PREDICTIONS).exists():
            write_own_metrics(home, [*read_metrics(home), *of_run], seed)
    lines = [line for seed in seeds for name in names for line in read_metrics(seed_folder(folder, seed) / name)]
    lines.sort(key=lambda line: (seeds.index(line.seed), line.epoch, names.index(line.student)))
    write_metrics(lines, folder)


def _weights(student: Student) -> dict[str, Classifier]:
    """Return the classifiers with the last weights, and with their average if there is one."""
    average = {"ema": student.average.classifier} if student.average is not None else {}
    return {"last": student.classifier, **average}


def _student_card(recipe: Recipe, dataset: Dataset, student: Student, seed: int) -> dict[str, Any]:
    learns_unlabelled = student.method.teacher_signal and recipe.unlabelled_in_step
    unlabelled = dataset.unlabelled if learns_unlabelled else None
    card = {
        "method": student.name,
        "seed": seed,
        "recipe": recipe.name,
        "precision": recipe.train.precision,
        **card_of_data(recipe.data, dataset),
        "trained_on": sketch(torch.cat([split.hashes for split in (dataset.train, unlabelled) if split])),
    }
    if unlabelled is not None:
        card["labelled_share"] = len(dataset.train) / (len(dataset.train) + len(unlabelled))
    if student.name == BASELINE:
        card["architecture"], before = baseline_architecture(recipe), baseline_origin(recipe)
    else:
        card["initial"], start = describe_initial_weights(recipe), initial_weights_path(recipe.model)
        before = None if start is None else card_of(weights_file(start))
    return card | images_before(dataset, [] if before is None else [before])
