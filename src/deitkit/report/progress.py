"""How far the trainings of a run are, also while it runs, and how they stand beside another run at the same epochs."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from deitkit.errors import CheckpointError
from deitkit.report.figures import (
    COLOURS,
    Curve,
    add_curve,
    add_legend,
    curve_axes,
    curve_labels,
    curves_of,
    mean,
    write_figure,
)
from deitkit.run.folder import LOCK, UNITS
from deitkit.run.layout import seed_folder
from deitkit.run.metrics import EpochMetrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECENT = 3  # epochs whose speed tells how long the others will take


@dataclass(frozen=True)
class TrainingProgress:
    """How far one training is.

    Attributes:
        student: Its name: a method, ``teacher``, or the CNN baseline; of a variant ``VARIANT: STUDENT``.
        seed: Of the training; the fold of a cross-validation.
        epoch: The last that is finished, from 1.
        epochs: Of the whole training, as far as recorded.
        train_loss: Mean over the steps of ``epoch``.
        validation: Accuracy on the validation images after ``epoch``, as a fraction.
        reference: That of the same student of the reference after the same epoch, the mean over its seeds.
        seconds_left: To train, at the speed of the last epochs, with the students beside it; None unless it runs.
        has_stopped: Whether no process trains it any more before its last epoch.
    """

    student: str
    seed: int
    epoch: int
    epochs: int | None
    train_loss: float | None
    validation: float | None
    reference: float | None = None
    seconds_left: float | None = None
    has_stopped: bool = False

    @property
    def is_done(self) -> bool:
        """Whether its last epoch is finished."""
        return self.epoch == self.epochs

    @property
    def difference(self) -> float | None:
        """What it is above the reference, as a fraction."""
        return None if self.validation is None or self.reference is None else self.validation - self.reference


def read_trainings(folder: Path) -> list[EpochMetrics]:
    """Return the metrics of all trainings in a run folder, finished or not: of teachers, students, variants and folds.

    The fold of a cross-validation stands as the seed, and a student of a variant as ``VARIANT: STUDENT``.

    Raises:
        CheckpointError: The folder does not exist, or a file in it is malformed.
    """
    lines = {(line.seed, line.student, line.epoch): line for line, _ in _read_trainings(folder)}
    if not lines and not (folder / "recipe.yaml").exists():
        raise CheckpointError(f"'{folder}' is not a run folder: name the one that `deitkit compare` printed")
    return list(lines.values())


def running_trainings(folder: Path) -> set[tuple[int, str]]:
    """Return seed and student, named as in ``read_trainings``, of the trainings whose run or unit still goes on.

    Call it before ``read_trainings``: of a training that ends in between, the metrics are then complete.
    """
    return {(line.seed, line.student) for line, is_running in _read_trainings(folder) if is_running}


def _read_trainings(folder: Path, is_running: bool = False) -> Iterator[tuple[EpochMetrics, bool]]:
    """Yield the metrics in a run folder, each with whether its training runs, as that of a fold does with its run."""
    is_running = is_running or is_in_use(folder) or is_in_use(folder / UNITS)
    for home in (*sorted(folder.glob("teacher*")), folder, *sorted(folder.glob("seed-*/*"))):
        lines = read_metrics(home)
        students = {(line.seed, line.student) for line in lines}
        running = {one for one in students if is_running or is_in_use(seed_folder(folder, one[0]) / one[1])}
        yield from ((line, (line.seed, line.student) in running) for line in lines)
    folds = [home for home in (folder / "folds").glob("*") if home.name.isdecimal()]
    for home in sorted(folds, key=lambda home: int(home.name)):
        for line, runs in _read_trainings(home, is_running):
            yield line.model_copy(update={"seed": int(home.name)}), runs
    for home in sorted((folder / "variants").glob("*")):
        for line, runs in _read_trainings(home, is_running):
            yield line.model_copy(update={"student": f"{home.name}: {line.student}"}), runs


def is_in_use(folder: Path) -> bool:
    """Return whether a process holds the lock of a run folder, a student's folder or the units of a run.

    The operating system releases it when the process ends, however it ends. Where the lock cannot be tried, as in a
    folder of another user, the process may still run.
    """
    lock = folder / LOCK
    try:
        if lock.exists():  # trying creates it
            with FileLock(lock, timeout=0):
                pass
    except (Timeout, OSError):
        return True
    return False


def progress_of(
    metrics: Sequence[EpochMetrics],
    reference: Sequence[EpochMetrics] = (),
    running: Collection[tuple[int, str]] = (),
) -> list[TrainingProgress]:
    """Return how far each training is, in the order in which they appear.

    Args:
        metrics: Of a run, see ``read_trainings``.
        reference: Of the run to stand beside.
        running: Seed and student of the trainings that go on, see ``running_trainings``.
    """
    trainings: dict[tuple[int, str], list[EpochMetrics]] = {}
    for line in metrics:
        trainings.setdefault((line.seed, line.student), []).append(line)
    beside = {curve.student: curve for curve in curves_of(reference, lambda line: line.main_accuracy)}
    in_order = {key: sorted(lines, key=lambda line: line.epoch) for key, lines in trainings.items()}
    return [_progress(lines, beside, key in running) for key, lines in in_order.items()]


def _progress(lines: Sequence[EpochMetrics], beside: dict[str, Curve], is_running: bool) -> TrainingProgress:
    last = lines[-1]
    curve = beside.get(last.student)
    at_epoch = [] if curve is None else [values[last.epoch] for values in curve.seeds.values() if last.epoch in values]
    reference = mean(at_epoch) if at_epoch else None
    taken = [seconds for line in lines[-RECENT:] if (seconds := _epoch_seconds(line)) is not None]
    left = None if last.epochs is None or not taken else (last.epochs - last.epoch) * mean(taken)
    return TrainingProgress(
        last.student,
        last.seed,
        last.epoch,
        last.epochs,
        last.train_loss,
        last.main_accuracy,
        reference,
        left if is_running else None,
        has_stopped=not is_running and last.epochs is not None and last.epoch < last.epochs,
    )


def _epoch_seconds(line: EpochMetrics) -> float | None:
    """Return how long an epoch took with all the students of the cohort."""
    if line.seconds is None or line.images_per_second is None or not line.cohort_images_per_second:
        return None
    return line.seconds * line.images_per_second / line.cohort_images_per_second


def write_progress(
    metrics: Sequence[EpochMetrics], title: str, path: Path, reference: Sequence[EpochMetrics] = (), beside: str = ""
) -> bool:
    """Draw validation accuracy by epoch as a PNG: solid those of a run, dotted the same students of the reference.

    Args:
        metrics: Of the run.
        title: Of the figure.
        path: Of the PNG.
        reference: Of the other run.
        beside: Its name, for the legend.

    Returns:
        Whether there was an accuracy to draw.

    Raises:
        CheckpointError: The file cannot be written.
    """
    curves = curves_of(metrics, lambda line: line.main_accuracy)
    others = curves_of(reference, lambda line: line.main_accuracy)
    if curves:
        write_figure(lambda: _draw(curves, title, others, beside), path)
    return bool(curves)


def _draw(curves: Sequence[Curve], title: str, others: Sequence[Curve], beside: str) -> "Figure":
    finals = [curve.over_seeds(mean)[-1] for curve in curves]
    labels = curve_labels(curves, [f"{100 * final:.1f}" for final in finals])
    figure, axes = curve_axes(title, labels)
    places = {curve.student: index for index, curve in enumerate(curves)}
    dotted: dict[str, Any] = {"label": "_", "linestyle": ":", "linewidth": 1.4}
    for other in others:
        if other.student in places:
            colour = COLOURS[places[other.student] % len(COLOURS)]
            axes.plot(other.epochs, [100 * value for value in other.over_seeds(mean)], color=colour, **dotted)
    for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        add_curve(axes, curve, index, label)
        for values in curve.seeds.values():
            if len(values) > len(curve.epochs):  # ahead of another seed, where the mean ends
                accuracies = [100 * value for value in values.values()]
                axes.plot(list(values), accuracies, label="_", color=COLOURS[index % len(COLOURS)], linewidth=0.8)
    if others:
        axes.set_xlabel(f"epoch (dotted: {beside})", parse_math=False)
    add_legend(axes, finals)
    return figure
