"""A run folder while it is written: its recipe, its metrics, its checkpoints; and who watches.

The layout is in docs/design.md. Nothing here knows what a teacher or a method is.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

# Fields that say where or how fast, not what, so that a run may go on on another machine; and those of the gate, so
# that a teacher that it refused need not be trained again.
# Variants are free too: a run may go on with more of them, and each one's own folder refuses a change.
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

    return [f"{key} was {was}, now {now}" for key, was, now in changed_fields(old, new) if not free(key)]


def train_to_end(
    cohort: Cohort, *, title: str, checkpoint: Path, metrics: Path, watcher: Watcher, log_folder: Path
) -> None:
    """Train a cohort, from its checkpoint if there is one; save it after every epoch and when the user stops it.

    Args:
        cohort: Freshly built.
        title: For whoever watches.
        checkpoint: Where its state lies between two epochs.
        metrics: One line per student and epoch is appended here.
        watcher: Is told of every step, and asked whether to stop.
        log_folder: Of TensorBoard.

    Raises:
        Interrupted: The watcher asked to stop; the state is saved.
    """
    state = load_state(checkpoint, watcher.say)
    if state is not None:
        cohort.load_state_dict(state)
        watcher.say(f"{title}: goes on at epoch {cohort.epoch + 1}, step {cohort.step + 1}")
    kept = [
        record
        for record in read_metrics(metrics.parent)
        if record["seed"] != cohort.seed or record["epoch"] <= cohort.epoch
    ]
    lines = [json.dumps(record) for record in kept]
    on_step: Callable[[Progress], None] = lambda progress: watcher.step(title, progress)  # noqa: E731
    with watcher.patient(), SummaryWriter(log_folder, purge_step=cohort.epoch + 1) as board:
        try:
            for records in cohort.fit(on_step, watcher.should_stop):
                lines += [json.dumps(record) for record in records]
                write_text(metrics, "\n".join(lines) + "\n")
                _to_board(board, records)
                watcher.epoch(title, records)
                # The iterator has not begun the next epoch yet; what is saved is the state that it will begin from.
                save_state(checkpoint, cohort.state_dict())
                if watcher.should_stop():
                    raise Interrupted
        except Interrupted:
            if cohort.step > 0:
                save_state(checkpoint, cohort.state_dict())
            raise


def _to_board(board: SummaryWriter, records: list[dict[str, Any]]) -> None:
    for record in records:
        name, epoch = record["student"], record["epoch"]
        board.add_scalar(f"{name}/train_loss", record["train_loss"], epoch)
        board.add_scalar(f"{name}/learning_rate", record["learning_rate"], epoch)
        for readout, accuracy in record["validation"].items():
            board.add_scalar(f"{name}/validation/{readout}", accuracy, epoch)
