"""Occupying a run folder, and checking that a run may resume in it under its recipe.

The layout is in docs/design.md. Nothing here depends on teachers or methods.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from deitkit.errors import CheckpointError, Interrupted, RecipeError, os_reason
from deitkit.recipe.load import changed_fields, dump_recipe, load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.system.files import delete_left_over, is_temporary, write_text
from deitkit.system.process import TEMPORARY_FAILURE

LOCK = ".lock"
LOCK_POLL_SECONDS = 0.25
UNITS = "units"  # logs of units that run side by side

# Fields that decide where or how fast, not what, so that a run may resume on another machine; and those of the gate, so
# that a refused teacher need not be trained again.
# Variants, methods and seeds are free too: a run may resume with more or fewer of them; each has its own folder. And so
# is where the images of a comparison lie, once its folder has recorded what they are (``MOVABLE``).
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
    "teachers.cache",
    "teachers.allow_weak",
    "teachers.min_top1",
    "variants",
    "methods",
    "published",
}
MOVABLE = ("data.name", "data.unlabelled")


class FolderInUse(CheckpointError):  # noqa: N818 - a fact, which may pass
    """Another process holds the lock of a folder, or a machine that was lost a while ago."""

    exit_code = TEMPORARY_FAILURE


def folder_name(name: str) -> str:
    """Return a folder name for a recipe's name, which may be a stranger's: never a path to another folder."""
    return re.sub(r"[^\w .-]", "-", name).strip(" .")[:100] or "custom"


def choose_run_folder(
    out: Path | None, recipe: Recipe, resume: bool, suffix: str = "", *, restarted: bool = False
) -> Path:
    """Return ``out``; else a new folder under runs/ for a recipe, or to resume the newest that this recipe has begun.

    Args:
        out: Named by the user.
        recipe: Its name is the folder's.
        resume: Whether to continue a run.
        suffix: Added to the name.
        restarted: Whether to continue a run if there is one.

    Raises:
        RecipeError: There is no run of this recipe to resume.
    """
    if out is not None:
        return out
    base = Path("runs") / f"{folder_name(recipe.name)}{suffix}"
    numbered = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    new = next(path for path in numbered if not path.exists())
    if not (resume or restarted):
        return new
    existing = [path for path in numbered if (path / "recipe.yaml").exists()]
    existing.sort(key=lambda path: (path / "recipe.yaml").stat().st_mtime, reverse=True)
    found = next((path for path in existing if not _differs(path, recipe)), None)
    if found is None and not resume:
        return new
    if found is None:
        newest = existing[:1]
        differs = [f"; the newest, {run}, differs ({_differs(run, recipe)})" for run in newest]
        raise RecipeError(
            f"--resume found no run of this recipe named '{recipe.name}' under runs/{''.join(differs)}: name its "
            "folder with --out, or repeat the options that it was started with"
        )
    return found


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """Return the error on the folder of a finished model, student or teacher, that cannot be read."""
    reason = str(error).partition("\n")[0].partition(": ")[0]
    return CheckpointError(
        f"{folder} is finished, but cannot be read ({reason}): put its files back, or delete the folder, and --resume "
        "makes it again"
    )


@contextmanager
def locked(folder: Path, patience: float = 0.0, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Lock a run folder for this process, and delete what killed ones left half-written; remove it if it stays empty.

    The operating system releases the lock when the process ends, however it ends; on a disk of the network, a while
    after its machine was lost.

    Args:
        folder: Created if it does not exist.
        patience: Seconds to wait for another process to release it.
        say: Receives a line before that.

    Raises:
        FolderInUse: Another process holds the lock.
        CheckpointError: The folder cannot be written.
    """
    try:
        is_new = not folder.exists()
        lock = _acquired(folder, patience, say)
    except Timeout:
        raise FolderInUse(
            f"another deitkit process is using {folder}: wait for it to end, or name another folder with --out"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder}: {os_reason(error)}; name another folder with --out"
        ) from error
    try:
        delete_left_over(folder)
        yield
    finally:
        if folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()):  # it may have been moved
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)  # while it is held, since afterwards it may be another's
        lock.release()
        if is_new:
            with suppress(OSError):  # it has files, or is gone
                folder.rmdir()


@contextmanager
def locked_run(folder: Path, patience: float, say: Callable[[str], None]) -> Iterator[None]:
    """Lock a run folder, as ``locked``; a run that stops before it saved anything says so, for there is no folder."""
    try:
        with locked(folder, patience, say):
            yield
    except Interrupted as stop:
        if not folder.exists():
            stop.args = ("stopped before anything was saved: start the same command again",)
        raise


def _acquired(folder: Path, patience: float, say: Callable[[str], None]) -> BaseFileLock:
    """Lock a folder, and create it if it does not exist or if its last user removes it meanwhile."""
    lock, until = FileLock(folder / LOCK), time.monotonic() + patience
    waits = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
            return lock
        except (Timeout, FileNotFoundError):
            if time.monotonic() >= until:
                raise
        if not waits:
            say(f"another deitkit process is using {folder}: waiting up to {patience:.0f} s for it to end")
        waits = True
        time.sleep(LOCK_POLL_SECONDS)


def check_run(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Check that a run folder is new, or may be resumed under this recipe; ``begin_run`` then starts the run.

    Methods may change, and all seeds but the first: what is missing is trained, what is no longer named leaves the
    table.

    Raises:
        CheckpointError: The folder is in use without ``resume``, the recipe changed, or the path is not a folder.
    """
    path = folder / "recipe.yaml"
    in_use = folder.exists() and (
        not folder.is_dir()
        or any(file.name not in (LOCK, UNITS) and not is_temporary(file) for file in folder.iterdir())
    )
    if in_use and not path.exists():
        raise CheckpointError(f"--out {folder} contains other files: name a new or empty folder")
    if in_use and not resume:
        raise CheckpointError(
            f"--out {folder} already contains a run: add --resume to continue it, or name a new folder"
        )
    if in_use:
        # Folds and variants, whose images are those of other folders too, are read where they were.
        changed = _changes_since(folder, recipe, movable="images" in read_environment(folder))
        if changed:
            raise CheckpointError(f"{folder} was started with another recipe ({'; '.join(changed)}): name a new folder")


def read_environment(folder: Path) -> dict[str, Any]:
    """Return what a preparation wrote of a run's machine and images; nothing of a run that has not begun."""
    path = folder / "environment.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError):
        raise CheckpointError(
            f"{path} cannot be read: delete it, and check that the images are those of the run"
        ) from None


def begin_run(folder: Path, recipe: Recipe) -> None:
    """Write the recipe, which makes the folder a run folder; raise CheckpointError if it cannot be written."""
    write_text(folder / "recipe.yaml", dump_recipe(recipe))


def _changes_since(folder: Path, recipe: Recipe, *, movable: bool) -> list[str]:
    """Return the changes to the recipe of a run folder under which the run cannot go on.

    Args:
        folder: Of the run.
        recipe: Of now.
        movable: Whether the same images may lie elsewhere now, which is checked when they are read.
    """
    path = folder / "recipe.yaml"
    try:
        begun = load_recipe(str(path))
    except RecipeError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): correct it, or name a new folder with --out") from None
    return _changes(begun.model_dump(mode="json"), recipe.model_dump(mode="json"), movable=movable)


def _differs(folder: Path, recipe: Recipe) -> str:
    """Return why a run cannot go on under a recipe, in words; empty if it can."""
    try:
        return "; ".join(_changes_since(folder, recipe, movable=False))  # of several runs that on these images
    except CheckpointError as error:
        return str(error)


def _are_places(old: str | None, new: str | None) -> bool:
    """Return whether both are images of one kind in a place of the user's, such as ``folder:PATH``."""
    kinds = {str(source).partition(":")[0] for source in (old, new)}
    return len(kinds) == 1 and all(":" in str(source) for source in (old, new))


def _changes(old: Any, new: Any, *, movable: bool) -> list[str]:
    augments = [new["augment"], new["teacher"]["augment"], *(teacher["augment"] for teacher in new["teachers"])]
    crops = new["data"]["image_px"] is not None and any(augment["crop"] == "random-resized" for augment in augments)

    def free(key: str) -> bool:
        if key == "data.streaming" and crops:
            return False  # which decides what random crops are cut from
        if key.endswith(".cache") and any(one["cache_top"] is not None for one in (new["teacher"], *new["teachers"])):
            return False  # a cache of the largest logits changes the teacher's answers
        return any(key == field or key.startswith(f"{field}.") for field in FREE_TO_CHANGE)

    changes = [(key, was, now) for key, was, now in changed_fields(old, new) if not free(key)]
    if movable:
        changes = [change for change in changes if change[0] not in MOVABLE or not _are_places(*change[1:])]
    # The first seed also seeds the training of the teachers.
    changes = [change for change in changes if change[0] != "seeds" or list(change[1])[:1] != list(change[2])[:1]]
    if bool(old["variants"]) != bool(new["variants"]):  # more or fewer may be: but an ablation is no single comparison
        changes.append(("variants", list(old["variants"]) or "none", list(new["variants"]) or "none"))
    return [f"{key} was {was}, now {now}" for key, was, now in changes]
