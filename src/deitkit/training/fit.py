"""Training a cohort to its end in a run folder: states by the clock, metrics, TensorBoard, interrupts."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from deitkit.errors import Interrupted
from deitkit.run.metrics import read_metrics
from deitkit.run.observer import Progress, Watcher
from deitkit.run.state import load_state, save_state
from deitkit.system.files import write_text
from deitkit.training.cohort import Cohort

# At the end of an epoch a state is smaller and a resumed run repeats nothing: worth saving sooner than in its middle.
EPOCH_END_SHARE = 0.2


class StateSaver:
    """Saves the state of a cohort by the clock: a killed run loses little, and training seldom waits for the disk.

    Args:
        cohort: Whose state.
        path: Of the newest state.
        seconds: At most so long apart, but for the time of a step; at the end of an epoch a fifth of it is enough.
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
        """Save unless nothing was trained since."""
        if self._place() != self._saved:
            save_state(self.path, self.cohort.state_dict())
            self._saved = self._place()
        self._saved_at = time.monotonic()


def train_to_end(
    cohort: Cohort,
    *,
    title: str,
    checkpoint: Path,
    metrics: Path,
    watcher: Watcher,
    log_folder: Path,
    save_seconds: float,
) -> None:
    """Train a cohort, from its checkpoint if there is one; save it by the clock and when the user stops it.

    Args:
        cohort: Freshly built.
        title: For whoever watches.
        checkpoint: Where its state lies.
        metrics: One line per student and epoch is appended here.
        watcher: Is told of every step, and asked whether to stop.
        log_folder: Of TensorBoard; each student has a folder of its own in it.
        save_seconds: The longest time between two states, see ``StateSaver``.

    Raises:
        Interrupted: The watcher asked to stop; the state is saved.
    """
    state = load_state(checkpoint, watcher.say)
    if state is not None:
        cohort.load_state_dict(state)
        watcher.say(f"{title}: goes on at epoch {cohort.epoch + 1}, step {cohort.step + 1}")
    names = {student.name for student in cohort.students}
    kept = [
        record
        for record in read_metrics(metrics.parent)
        if record["seed"] != cohort.seed or record["student"] not in names or record["epoch"] <= cohort.epoch
    ]
    lines = [json.dumps(record) for record in kept]
    saver = StateSaver(cohort, checkpoint, save_seconds)

    def on_step(progress: Progress) -> None:
        watcher.step(title, progress)
        saver.save_if_due()

    with watcher.defer_interrupts(), ExitStack() as stack:
        boards = {
            name: stack.enter_context(SummaryWriter(log_folder / name, purge_step=cohort.epoch + 1)) for name in names
        }
        try:
            for records in cohort.fit(on_step, watcher.should_stop):
                lines += [json.dumps(record) for record in records]
                write_text(metrics, "\n".join(lines) + "\n")
                for record in records:
                    _to_board(boards[record["student"]], record)
                watcher.epoch(title, records)
                # The iterator has not begun the next epoch yet; what is saved is the state that it will begin from.
                saver.save_if_due()
                if watcher.should_stop():
                    raise Interrupted
        except Interrupted:
            saver.save()
            raise
        saver.save()  # what follows, the gate or predictions, may fail, and must not cost the training


def _to_board(board: SummaryWriter, record: dict[str, Any]) -> None:
    epoch = record["epoch"]
    board.add_scalar("train_loss", record["train_loss"], epoch)
    board.add_scalar("learning_rate", record["learning_rate"], epoch)
    for readout, accuracy in record["validation"].items():
        board.add_scalar(f"validation/{readout}", accuracy, epoch)
