"""How far the trainings of a run are, also while it runs, and how they stand beside another run at the same epochs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deitkit.errors import CheckpointError
from deitkit.report.figures import COLOURS, Curve, add_curve, add_legend, curve_axes, curves_of, mean, write_figure
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
        seconds_left: To train, at the speed of the last epochs, with the students beside it; None after the run.
        has_stopped: Whether the run ended before its last epoch.
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
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is not a run folder: name the one that `deitkit compare` printed")
    lines = {(line.seed, line.student, line.epoch): line for line in _read_trainings(folder)}
    return list(lines.values())


def _read_trainings(folder: Path) -> Iterator[EpochMetrics]:
    for home in (*sorted(folder.glob("teacher*")), folder, *sorted(folder.glob("seed-*/*"))):
        yield from read_metrics(home)
    folds = [home for home in (folder / "folds").glob("*") if home.name.isdecimal()]
    for home in sorted(folds, key=lambda home: int(home.name)):
        yield from (line.model_copy(update={"seed": int(home.name)}) for line in _read_trainings(home))
    for home in sorted((folder / "variants").glob("*")):
        for line in _read_trainings(home):
            yield line.model_copy(update={"student": f"{home.name}: {line.student}"})


def progress_of(
    metrics: Sequence[EpochMetrics], reference: Sequence[EpochMetrics] = (), *, is_over: bool = False
) -> list[TrainingProgress]:
    """Return how far each training is, in the order in which they appear.

    Args:
        metrics: Of a run, see ``read_trainings``.
        reference: Of the run to stand beside.
        is_over: Whether the run has ended, so that no training goes on.
    """
    trainings: dict[tuple[int, str], list[EpochMetrics]] = {}
    for line in metrics:
        trainings.setdefault((line.seed, line.student), []).append(line)
    beside = {curve.student: curve for curve in curves_of(reference, lambda line: line.main_accuracy)}
    in_order = (sorted(lines, key=lambda line: line.epoch) for lines in trainings.values())
    return [_progress(lines, beside, is_over) for lines in in_order]


def _progress(lines: Sequence[EpochMetrics], beside: dict[str, Curve], is_over: bool) -> TrainingProgress:
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
        None if is_over else left,
        has_stopped=is_over and last.epoch != last.epochs,
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
    figure, axes = curve_axes(title)
    places = {curve.student: index for index, curve in enumerate(curves)}
    for other in others:
        if other.student in places:
            axes.plot(
                other.epochs,
                [100 * value for value in other.over_seeds(mean)],
                label="_",
                color=COLOURS[places[other.student] % len(COLOURS)],
                linestyle=":",
                linewidth=1.4,
            )
    for index, curve in enumerate(curves):
        add_curve(axes, curve, index, f"{curve.student}  {100 * curve.over_seeds(mean)[-1]:.1f}")
    if others:
        axes.set_xlabel(f"epoch (dotted: {beside})", parse_math=False)
    add_legend(axes, [curve.over_seeds(mean)[-1] for curve in curves])
    return figure
