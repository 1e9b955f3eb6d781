"""Running a comparison as units side by side: teachers first, then all units, then the gathering.

A unit that is lost with its process or its machine starts again, from its last state. A user's mistake ends all.
"""

import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deitkit.comparison.pools import Pool
from deitkit.comparison.seed_run import LOCK_SECONDS
from deitkit.comparison.units import PREPARE, divide, unit_folders
from deitkit.errors import CheckpointError, DeitkitError, Interrupted
from deitkit.recipe.load import dump_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import UNITS, check_run, folder_name, locked
from deitkit.run.observer import Watcher
from deitkit.run.results import Results, read_results
from deitkit.system.files import write_text
from deitkit.system.process import MISTAKE

ATTEMPTS = 5  # of a unit that is lost again and again without a new state
POLL_SECONDS = 0.5
STOP_SECONDS = 300.0  # for units to save their states and end
GATHER = "gather"
LOG_TAIL_BYTES = 8192
TORCHRUN_LINES = 20  # of its report


@dataclass
class _Running:
    """A unit that runs; ``attempt`` counts its starts since it last trained further, ``saved`` is of ``_saved``."""

    unit: str
    handle: Any
    log: Path
    attempt: int
    shown: int  # bytes of the log
    saved: set[int]

    def fresh_lines(self) -> list[str]:
        """Return the whole lines of its output that were not returned before."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as file:
            file.seek(self.shown)
            whole = file.read().rpartition(b"\n")[0]
        self.shown += len(whole) + bool(whole)
        return [line for line in whole.decode(errors="replace").splitlines() if line.strip()]

    @property
    def newest_line(self) -> str:
        """The last whole line of its output."""
        return next(iter(reversed(_lines(self.log))), "")


def run_side_by_side(
    recipe: Recipe, folder: Path, *, pool: Pool, watcher: Watcher, resume: bool = False, devices: int = 1
) -> Results:
    """Run a comparison as units on a pool, and return its results; see ``comparison.run`` for the other arguments.

    Args:
        recipe: Of the comparison.
        folder: The run folder, on a disk that all of the pool see.
        pool: Where the units run.
        watcher: Receives the progress of all units, and may request a stop.
        resume: Continue a run that was stopped.
        devices: Of each unit, which torchrun then starts.

    Raises:
        DeitkitError: A mistake of the user, in the words of the unit that met it.
        CheckpointError: A unit was lost too often.
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    check_run(folder, recipe, resume)
    home = folder / UNITS
    with locked(home, LOCK_SECONDS if resume else 0.0, watcher.say):
        write_text(home / "recipe.yaml", dump_recipe(recipe))
        runner = _Runner(folder, pool, watcher, devices)
        runner.run([PREPARE])
        units = divide(recipe, pool.size, folder)
        if units:
            watcher.say(f"{len(units)} units, up to {min(pool.size, len(units))} side by side: {'; '.join(units)}")
            runner.run(units)
        runner.run([GATHER])
    return read_results(folder)


class _Runner:
    """Starts units on a pool and waits for them."""

    def __init__(self, folder: Path, pool: Pool, watcher: Watcher, devices: int) -> None:
        self.folder = folder
        self.pool = pool
        self.watcher = watcher
        self.devices = devices

    def run(self, units: Sequence[str]) -> None:
        """Run units to their end, as many side by side as the pool has room for."""
        waiting = deque((unit, 1) for unit in units)
        running: list[_Running] = []
        share = min(self.pool.size, len(units))
        with self.watcher.defer_interrupts():
            try:
                while waiting or running:
                    while waiting and len(running) < share:
                        running.append(self._start(*waiting.popleft(), share))
                    time.sleep(POLL_SECONDS)
                    if self.watcher.should_stop():
                        raise Interrupted
                    waiting.extend(self._lost(running))
                    lines = {one.unit: one.newest_line for one in running}
                    self.watcher.units(lines, len(units) - len(running) - len(waiting), len(units))
            except BaseException:
                self._stop(running)
                raise

    def _lost(self, running: list[_Running]) -> Iterator[tuple[str, int]]:
        """Remove the units that have ended, and yield those that were lost, with the number of their next attempt."""
        for one in running:
            self._relay(one)
        for one in [one for one in running if self.pool.exit_code(one.handle) is not None]:
            running.remove(one)
            if not _saved(self.folder, one.unit) <= one.saved:
                one.attempt = 0
            if not self._has_ended_well(one):
                yield one.unit, one.attempt + 1

    def _start(self, unit: str, attempt: int, share: int) -> _Running:
        log = self.folder / UNITS / f"{folder_name(unit.replace('/', '-'))}.log"
        recipe = str(self.folder / UNITS / "recipe.yaml")
        how = ["--resume"] if unit == GATHER else ["--unit", unit]
        command = ["-m", "deitkit", "compare", recipe, "--out", str(self.folder), *how]
        if self.devices > 1 and unit != GATHER:
            command = ["-m", "deitkit.system.torchrun", "--standalone", f"--nproc-per-node={self.devices}", *command]
        self.watcher.say(f"{unit}: started, its output is in {log}")
        shown = log.stat().st_size if log.exists() else 0  # by an earlier attempt
        saved = _saved(self.folder, unit)
        return _Running(unit, self.pool.start(command, log, share), log, attempt, shown, saved)

    def _relay(self, one: _Running) -> None:
        """Say what ``prepare`` says, but for a mistake, which is raised when it has ended."""
        for line in one.fresh_lines() if one.unit == PREPARE else ():
            if not line.startswith("error: "):
                self.watcher.say(line)

    def _has_ended_well(self, one: _Running) -> bool:
        """Return whether a unit is finished; False if it was lost and is to start again."""
        code = self.pool.exit_code(one.handle)
        if code == 1 and self.devices > 1 and _is_mistake_under_torchrun(one.log):
            code = MISTAKE
        self._relay(one)
        if code == 0:
            self.watcher.say(f"{one.unit}: finished")
            return True
        if code == MISTAKE:
            said = [line.removeprefix("error: ") for line in _lines(one.log) if line.startswith("error: ")]
            raise DeitkitError(f"{one.unit}: {said[-1]}" if said else f"{one.unit} failed, see {one.log}")
        said = [line for line in _lines(one.log) if re.search(r"\w", line)]  # torchrun ends with a ruler
        last = "".join(f"; its last line: {line}" for line in said[-1:])
        if one.attempt >= ATTEMPTS:
            raise CheckpointError(f"{one.unit} was lost {ATTEMPTS} times: see the end of {one.log}{last}")
        self.watcher.say(f"{one.unit}: lost (exit code {code}); starting it again from its last state{last}")
        return False

    def _stop(self, running: Sequence[_Running]) -> None:
        """Let all running units save their states and end; one that does not is left to the pool."""
        until = time.monotonic() + STOP_SECONDS
        for one in running:
            self.pool.stop(one.handle)
        while any(self.pool.exit_code(one.handle) is None for one in running) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)


def _is_mistake_under_torchrun(log: Path) -> bool:
    """Return whether torchrun, which always exits with 1, reports at the end of its output that of a user's mistake."""
    return any(re.fullmatch(rf"\s*exitcode\s*:\s*{MISTAKE}\b.*", line) for line in _lines(log)[-TORCHRUN_LINES:])


def _saved(folder: Path, unit: str) -> set[int]:
    """Return when the states and the models of a unit were written, in the time of their disk."""
    times = set()
    for home in unit_folders(folder, unit):
        for file in home.rglob("*.safetensors"):
            with suppress(OSError):  # it was replaced just now
                times.add(file.stat().st_mtime_ns)
    return times


def _lines(log: Path) -> list[str]:
    """Return the last lines of a log."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
