"""A run folder while it is written: its recipe, its metrics, its checkpoints; and who watches.

The layout is in docs/design.md. Nothing here knows what a teacher or a method is.
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter

from deitkit.checkpoint import load_state, save_state
from deitkit.cohort import Cohort, Progress
from deitkit.errors import CheckpointError, Interrupted
from deitkit.files import write_text
from deitkit.recipe import Recipe
from deitkit.recipe_file import changed_fields, dump_recipe
from deitkit.report import read_metrics

LOCK = ".lock"
# At the end of an epoch a state is smaller and a resumed run repeats nothing: worth saving sooner than in its middle.
EPOCH_END_SHARE = 0.2

# Fields that say where or how fast, not what, so that a run may go on on another machine; and those of the gate, so
# that a teacher that it refused need not be trained again.
# Variants, methods and seeds are free too: a run may go on with more of them, or fewer; each has its own folder.
FREE_TO_CHANGE = {
    "device",
    "speed",
    "data.root",
    "data.download",
    "data.streaming",
    "data.workers",
    "teacher.cache",
    "teacher.allow_weak",
    "teacher.min_top1",
    "teacher.also.allow_weak",
    "teacher.also.min_top1",
    "variants",
    "methods",
}


@runtime_checkable
class Watcher(Protocol):
    """Whoever watches a run: a terminal, or nobody."""

    def say(self, text: str) -> None:
        """A stage of the run has begun or ended."""

    def reading(self, what: str, done: int, total: int) -> None:
        """Some of the data has been read."""

    def step(self, title: str, progress: Progress) -> None:
        """A step has been done."""

    def epoch(self, title: str, records: list[dict[str, Any]]) -> None:
        """An epoch has been done."""

    def patient(self) -> AbstractContextManager[None]:
        """While inside, a request to stop waits until ``should_stop`` is asked; outside it may end the run at once."""

    def should_stop(self) -> bool:
        """Whether the user asked to stop."""


class Silent:
    """A watcher that shows nothing and never stops."""

    def say(self, text: str) -> None:
        pass

    def reading(self, what: str, done: int, total: int) -> None:
        pass

    def step(self, title: str, progress: Progress) -> None:
        pass

    def epoch(self, title: str, records: list[dict[str, Any]]) -> None:
        pass

    def patient(self) -> AbstractContextManager[None]:
        return nullcontext()

    def should_stop(self) -> bool:
        return False


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process; where it wrote nothing it leaves nothing behind.

    The operating system gives the lock up when the process ends, however it ends.

    Raises:
        CheckpointError: Another process has it, or it cannot be written.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"another deitkit is at work in {folder}: wait for it to end, or name another folder with --out"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CheckpointError(f"cannot write into {folder}: {reason}; name another folder with --out") from error
    try:
        yield
    finally:
        lock.release()
        if all(path.name == LOCK for path in folder.iterdir()):
            (folder / LOCK).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()


def check_run(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Check that a run folder is new, or may go on under this recipe; ``begin_run`` then occupies it.

    It may go on with other methods, and with other seeds than the first: what is missing is trained, what is no longer
    named leaves the table.

    Raises:
        CheckpointError: A folder in use without ``resume``, a recipe that changed, or a path that is no folder.
    """
    path = folder / "recipe.yaml"
    in_use = folder.exists() and (not folder.is_dir() or any(file.name != LOCK for file in folder.iterdir()))
    if in_use and not path.exists():
        raise CheckpointError(f"--out {folder} holds other files: name a new or empty folder")
    if in_use and not resume:
        raise CheckpointError(
            f"--out {folder} holds a run already: add --resume to go on with it, or name a new folder"
        )
    if in_use:
        changed = _changes(yaml.safe_load(path.read_text(encoding="utf-8")), recipe.model_dump(mode="json"))
        if changed:
            raise CheckpointError(f"{folder} was begun with another recipe ({'; '.join(changed)}): name a new folder")


def begin_run(folder: Path, recipe: Recipe) -> None:
    """Write the recipe, after which the folder holds a run; CheckpointError if it cannot be written."""
    write_text(folder / "recipe.yaml", dump_recipe(recipe))


def _changes(old: Any, new: Any) -> list[str]:
    def free(key: str) -> bool:
        return any(key == field or key.startswith(f"{field}.") for field in FREE_TO_CHANGE)

    changes = [(key, was, now) for key, was, now in changed_fields(old, new) if not free(key)]
    # The first seed is that of the teachers' training.
    changes = [change for change in changes if change[0] != "seeds" or list(change[1])[:1] != list(change[2])[:1]]
    return [f"{key} was {was}, now {now}" for key, was, now in changes]


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

    with watcher.patient(), ExitStack() as stack:
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
