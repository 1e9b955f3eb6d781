"""A run folder while it is written: its recipe, its metrics, its checkpoints; and who watches.

The layout is in docs/design.md. Nothing here knows what a teacher or a method is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from deitkit.errors import CheckpointError, RecipeError
from deitkit.recipe.load import changed_fields, dump_recipe
from deitkit.recipe.schema import Recipe
from deitkit.system.files import write_text

LOCK = ".lock"

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


def folder_name(name: str) -> str:
    """Return a folder name for a recipe's name, which may be a stranger's: never a path to another folder."""
    return re.sub(r"[^\w .-]", "-", name).strip(" .")[:100] or "custom"


def choose_run_folder(out: Path | None, name: str, resume: bool) -> Path:
    """Return ``out``; else a new folder under runs/ for a recipe's name, or to resume the newest of that name.

    Raises:
        RecipeError: There is no run to resume.
    """
    if out is not None:
        return out
    base = Path("runs") / folder_name(name)
    numbered = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    if not resume:
        return next(path for path in numbered if not path.exists())
    existing = [path for path in numbered if (path / "recipe.yaml").exists()]
    if not existing:
        raise RecipeError(f"--resume found no run of recipe '{name}' under runs/: name its folder with --out")
    return max(existing, key=lambda path: (path / "recipe.yaml").stat().st_mtime)


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
