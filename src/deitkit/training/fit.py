"""Training a cohort to its end in a run folder: timed states, metrics, TensorBoard, interrupts."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from deitkit.errors import Interrupted
from deitkit.run.metrics import EpochMetrics, read_metrics, write_metrics
from deitkit.run.observer import StepProgress, Watcher
from deitkit.run.state import load_state, load_tree, save_state
from deitkit.training.cohort import Cohort

# At the end of an epoch a state is smaller and a resumed run repeats nothing, so it is saved sooner than mid-epoch.
EPOCH_END_SHARE = 0.2


class StateSaver:
    """Saves the state of a cohort at time intervals: a killed run loses little, and training seldom waits for the disk.

    Args:
        cohort: The cohort to save.
        path: Of the newest state.
        seconds: Time between two states, up to the time of a step; a fifth of it at the end of an epoch.
    """

    def __init__(self, cohort: Cohort, path: Path, seconds: float) -> None:
        self.cohort = cohort
        self.path = path
        self.seconds = seconds
        self._saved_at = time.monotonic()
        self._saved = self._place()

    def _place(self) -> tuple[int, int]:
        return self.cohort.epoch, self.cohort.step

    def save_if_due(self) -> None:
        """Save if the last state is old enough."""
        due = self.seconds if self.cohort.step > 0 else self.seconds * EPOCH_END_SHARE
        if time.monotonic() - self._saved_at >= due:
            self.save()

    def save(self) -> None:
        """Save, unless nothing was trained since the last state."""
        if self._place() != self._saved:
            save_state(self.path, self.cohort.state_dict())
            self._saved = self._place()
        self._saved_at = time.monotonic()


def train_to_end(
    cohort: Cohort,
    *,
    title: str,
    checkpoint: Path,
    folder: Path,
    watcher: Watcher,
    log_folder: Path,
    save_seconds: float,
) -> None:
    """Train a cohort, from its checkpoint if there is one; save it at time intervals and when the user stops it.

    Args:
        cohort: Newly built.
        title: For the watcher.
        checkpoint: File of the state.
        folder: Of ``metrics.jsonl``, one line per student and epoch.
        watcher: Receives progress, and decides whether to stop.
        log_folder: Of TensorBoard; each student has a subfolder.
        save_seconds: The longest time between two states, see ``StateSaver``.

    Raises:
        Interrupted: The watcher requested a stop; the state is saved.
    """
    _resume(cohort, title, checkpoint, watcher)
    names = {student.name for student in cohort.students}
    lines = [
        line
        for line in read_metrics(folder)
        if line.seed != cohort.seed or line.student not in names or line.epoch <= cohort.epoch
    ]
    saver = StateSaver(cohort, checkpoint, save_seconds)

    def on_step(progress: StepProgress) -> None:
        watcher.step(title, progress)
        saver.save_if_due()

    with watcher.defer_interrupts(), ExitStack() as stack:
        boards = {name: stack.enter_context(_board(log_folder / name, cohort.epoch + 1)) for name in names}
        try:
            for metrics in cohort.fit(on_step, watcher.should_stop):
                lines += metrics
                write_metrics(lines, folder)
                for line in metrics:
                    boards[line.student](line)
                watcher.epoch(title, metrics)
                # The iterator has not started the next epoch yet, so this saves the state that it starts from.
                saver.save_if_due()
                if cohort.ranks.any(watcher.should_stop()):
                    raise Interrupted
        except Interrupted:
            saver.save()
            raise
        saver.save()  # so that a failure of the following gate or predictions does not lose the training


def _resume(cohort: Cohort, title: str, checkpoint: Path, watcher: Watcher) -> None:
    """Restore a cohort, here and in the processes that share its steps, from its checkpoint if there is one."""
    state = load_state(checkpoint, watcher.say)
    cohort.ranks.broadcast(None if state is None else str(checkpoint.resolve()))
    if state is not None:
        cohort.load_state_dict(state)
        at_end = cohort.step == cohort.batches.steps_per_epoch
        place = "its validation" if at_end else f"step {cohort.step + 1}"
        watcher.say(f"{title}: resuming at epoch {cohort.epoch + 1}, {place}")
    cohort.ranks.any(False)  # all have read the state, which may be deleted soon


def help_to_the_end(cohort: Cohort, should_stop: Callable[[], bool]) -> None:
    """Train this process's part of a cohort, which the first process trains with ``train_to_end``.

    Raises:
        Interrupted: A process was asked to stop.
    """
    state = cohort.ranks.receive()
    if state is not None:
        cohort.load_state_dict(load_tree(Path(state)))
    cohort.ranks.any(False)
    for _ in cohort.fit(should_stop=should_stop):
        if cohort.ranks.any(should_stop()):
            raise Interrupted


@contextmanager
def _board(folder: Path, first_epoch: int) -> Iterator[Callable[[EpochMetrics], None]]:
    """Return what adds an epoch to TensorBoard's files of a student; a full disk is reported by what is saved."""
    board = None
    with suppress(OSError):
        board = SummaryWriter(folder, purge_step=first_epoch)

    def add(metrics: EpochMetrics) -> None:
        if board is not None:
            with suppress(OSError):  # which a thread may have met before
                _write_to_board(board, metrics)

    try:
        yield add
    finally:
        if board is not None:
            with suppress(OSError):
                board.close()


def _write_to_board(board: SummaryWriter, metrics: EpochMetrics) -> None:
    board.add_scalar("train_loss", metrics.train_loss, metrics.epoch)
    board.add_scalar("learning_rate", metrics.learning_rate, metrics.epoch)
    for readout, accuracy in (metrics.validation or {}).items():
        board.add_scalar(f"validation/{readout}", accuracy, metrics.epoch)
