"""Which unfinished students of a seed train together, by the states of earlier trainings in the run folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deitkit.run.folder import locked
from deitkit.run.layout import seed_folder, seed_of
from deitkit.run.metrics import EpochMetrics, read_metrics, write_metrics
from deitkit.run.state import drop_state, has_state, load_state, outline, replace_state

PREDICTIONS, STATE = "predictions.safetensors", "checkpoint.safetensors"


@dataclass(frozen=True)
class PlannedCohort:
    """Students that train in lock-step, and the file of their state."""

    names: tuple[str, ...]
    state: Path


def plan_cohorts(
    home: Path,
    names: Sequence[str],
    everyone: Sequence[str],
    say: Callable[[str], None],
    patience: float,
    *,
    apart: bool,
) -> list[PlannedCohort]:
    """Divide the unfinished students of a seed into cohorts: those of one state continue together, new ones start so.

    A student that shares a state with others, and does not continue with them here, is set aside with a state of its
    own: it has left the comparison, or another process trains it.

    Args:
        home: The seed's folder.
        names: Of the students to train.
        everyone: All students in the comparison.
        say: Receives a line for each student that is set aside since it left the comparison.
        patience: Seconds to wait for a process that trains a student of the same state.
        apart: Whether other processes may train other students of the seed: the state of new ones is in the folder of
            the first of them, instead of the seed's.

    Raises:
        CheckpointError: Another process still trains a student of the same state.
    """
    missing = missing_students(home.parent, seed_of(home), names)
    shared = home / STATE
    if has_state(shared):
        _set_aside_all(home, [] if apart else everyone, say)
    for place in sorted({path.with_name(STATE) for path in home.glob("*/checkpoint*.safetensors")}):
        _divide_state(place, names, say, patience)
    own = [home / name / STATE for name in names if has_state(home / name / STATE)]
    cohorts: list[PlannedCohort] = []
    for place in (shared, *own):
        state = load_state(place, say) or {"students": {}}
        together = tuple(name for name in missing if name in state["students"])
        missing = [name for name in missing if name not in together]
        if together:
            cohorts.append(PlannedCohort(together, place))
        elif place == shared or {*state["students"]} <= {*names}:
            # All in it are finished, or continue from the state of which this is a copy: a process ended between two
            # writes, or before it saved what it trained.
            drop_state(place)
    if missing:
        cohorts.append(PlannedCohort(tuple(missing), home / missing[0] / STATE if apart else shared))
    return cohorts


def _set_aside_all(home: Path, stay: Sequence[str], say: Callable[[str], None]) -> None:
    """Give each unfinished student in the shared state of a seed, other than those that stay, a state of its own."""
    shared = home / STATE
    state = load_state(shared, say) or {"students": {}}
    leaving = [name for name in state["students"] if name not in stay]
    for name in leaving:
        if not (home / name / PREDICTIONS).exists():
            _set_aside(name, state, home, read_metrics(home.parent))
            if stay:
                say(f"{name} is not in the comparison any more: its training so far stays in {home / name}")
    if not stay:
        drop_state(shared)


def missing_students(folder: Path, seed: int, names: Sequence[str]) -> list[str]:
    """Return those of some students of a seed that are not finished."""
    return [name for name in names if not (seed_folder(folder, seed) / name / PREDICTIONS).exists()]


def training_has_begun(home: Path) -> bool:
    """Return whether the folder of a seed or a teacher, or of a student in it, contains the state of a training."""
    return has_state(home / STATE) or any(home.glob("*/checkpoint*.safetensors"))


def holds(planned: PlannedCohort, home: Path) -> bool:
    """Return whether a plan is still right: none of its students was finished or continued by another process since."""
    names = {*planned.names}
    if any((home / name / PREDICTIONS).exists() for name in names):
        return False
    states = {path.with_name(STATE) for path in (*home.glob("checkpoint*"), *home.glob("*/checkpoint*"))}
    held = {path: names & {*(outline(path) or {"students": ()})["students"]} for path in states}
    return all(some == (names if path == planned.state else set()) for path, some in held.items())


def _divide_state(place: Path, names: Sequence[str], say: Callable[[str], None], patience: float) -> None:
    """Give each student in the state of a cohort one of its own, if some, but not all, of them are to be trained."""
    home, owner = place.parent.parent, place.parent.name

    def unfinished(state: dict[str, Any] | None) -> list[str]:
        return [name for name in (state or {"students": ()})["students"] if not (home / name / PREDICTIONS).exists()]

    there = {*unfinished(outline(place))}
    goes_on = {owner} <= there <= {*names}
    is_needed = not there.isdisjoint(names) or (owner in names and not (home / owner / PREDICTIONS).exists())
    if goes_on or not is_needed:
        return
    with locked(place.parent, patience, say):
        # The run's own metrics have what students trained in a seed's cohort, those of a unit's first student the rest.
        state, metrics = load_state(place, say), read_metrics(home.parent) + read_metrics(place.parent)
        for name in sorted(unfinished(state), key=lambda name: name == owner):  # the one in whose folder it lies last
            _set_aside(name, state, home, metrics)
        if owner not in unfinished(state):
            drop_state(place)


def _set_aside(name: str, state: dict[str, Any], home: Path, metrics: Sequence[EpochMetrics]) -> None:
    """Write what a cohort's state and metrics hold of one student as those of a cohort of its own."""
    write_own_metrics(home / name, [*read_metrics(home / name), *metrics], seed_of(home))
    replace_state(home / name / STATE, state | {"students": {name: state["students"][name]}})


def write_own_metrics(home: Path, metrics: Sequence[EpochMetrics], seed: int) -> None:
    """Write the metrics of one student among those of a run into its folder."""
    write_metrics((line for line in metrics if (line.seed, line.student) == (seed, home.name)), home)
