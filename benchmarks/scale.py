"""What it costs to share a training among processes, and to run units as tasks of a Ray cluster.

    torchrun --nproc-per-node=2 benchmarks/scale.py steps
    python benchmarks/scale.py units

The first times the messages of a step of a DeiT-Ti (its gradient, and whether to stop) between processes on one
machine, and the whole step beside that of one process with the same part of a batch. The second times a unit that does
nothing, as a process of this machine and as a task of a Ray cluster of this machine.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deitkit.bench.training_speed import Stepper, synthetic_dataset
from deitkit.comparison.pools import LocalPool, Pool, RayPool
from deitkit.recipe.load import load_recipe
from deitkit.system.device import Precision, choose_device
from deitkit.system.ranks import ALONE, Ranks, join_ranks, leave_ranks
from deitkit.system.timer import wait
from deitkit.training.build import build_cohort, build_students
from deitkit.training.cuda_graph import WARM_UP


def milliseconds(function: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Return how long each call takes on the device, after those that warm up (on a GPU the step is then recorded)."""
    for _ in range(WARM_UP + 1):
        function()
    taken = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def told(taken: list[float]) -> str:
    return f"{statistics.median(taken):.1f} ms ({min(taken):.1f} to {max(taken):.1f})"


def steps(repeats: int) -> None:
    """Time the steps of a lone DeiT-Ti, shared and alone."""
    ranks = join_ranks()
    fields = ["model.name=deit_tiny", "model.patch_px=8", "methods=[none]", "data.image_px=32", "train.batch_size=128"]
    whole = load_recipe(None, fields)
    part = load_recipe(None, [*fields, f"train.batch_size={128 // ranks.count}"])
    device = choose_device("auto")
    precision = Precision.choose("auto", device)

    def stepper(recipe_of: Ranks) -> Stepper:
        recipe = part if recipe_of.count == 1 else whole
        dataset = synthetic_dataset(recipe)
        students = build_students(recipe, dataset, 0, precision)
        for student in students:
            student.classifier.train()
        cohort = build_cohort(students, recipe, dataset, teacher=None, seed=0, precision=precision, ranks=recipe_of)
        return Stepper(cohort)

    shared, alone = stepper(ranks), stepper(ALONE)
    together = milliseconds(shared, repeats, device)
    by_itself = milliseconds(alone, repeats, device)
    (student,) = shared.cohort.students
    terms = {"labels": torch.zeros((), device=device)}
    messages = milliseconds(lambda: (student.sum_over_ranks(terms), ranks.any(False)), repeats, device)
    flags = milliseconds(lambda: ranks.any(False), repeats, device)
    if ranks.rank == 0:
        parameters = sum(each.numel() for each in student.classifier.model.parameters())
        print(f"{ranks.count} processes, {torch.get_num_threads()} threads each, {precision.name}, {repeats} repeats")
        print(f"a step of 128 images, shared: {told(together)}; of {128 // ranks.count}, alone: {told(by_itself)}")
        print(
            f"messages: a gradient of {4 * parameters / 1e6:.1f} MB and a flag {told(messages)}; a flag {told(flags)}"
        )
    leave_ranks()


def units(repeats: int) -> None:
    """Time units that do nothing."""

    def run(pool: Pool, folder: Path) -> float:
        started = time.perf_counter()
        handle = pool.start(["-c", "pass"], folder / "log", 2)
        while pool.exit_code(handle) is None:
            time.sleep(0.01)
        return 1000 * (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as name:
        local = LocalPool(2, 1)
        here = [run(local, Path(name)) for _ in range(repeats)]
        started = time.perf_counter()
        cluster = RayPool(None, 1)
        begun = time.perf_counter() - started
        first, *there = [run(cluster, Path(name)) for _ in range(repeats + 1)]
        cluster.close()
    print(f"a process: {told(here)}; Ray's task: {told(there)}, the first {first:.0f} ms; Ray starts in {begun:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "units"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    steps(options.repeats) if options.what == "steps" else units(options.repeats)
