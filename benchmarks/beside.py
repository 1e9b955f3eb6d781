"""How threads wait: training, Muon, the teacher and evaluation alone, beside a busy process, beside another training.

Torch's threads turn in a loop at each barrier. Beside another process they turn on a core that somebody else needs, and
how long they do so before they sleep decides how much work is left. Each setting has a process of its own, a second one
for its neighbour, and turns alternate. A busy process keeps one core.

    python benchmarks/beside.py                      # real CIFAR-10 (from $DEITKIT_DATA)
    python benchmarks/beside.py --synthetic --tasks train muon
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deitkit.system.process import WAIT_SETTINGS, configure_process

if sys.argv[-2:-1] == ["--serve"]:
    chosen = [name for name in WAIT_SETTINGS if name in os.environ]
    configure_process()
    if not chosen:
        del os.environ["GOMP_SPINCOUNT"]  # as torch has it

import torch
from rich.console import Console
from rich.table import Table

from deitkit.bench.training_speed import Bench, Stepper
from deitkit.data.dataset import Split
from deitkit.evaluation.predict import predict
from deitkit.recipe.load import load_recipe
from deitkit.training.optim import build_optimizers

SETTINGS = {
    "as torch has it": {},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
CONDITIONS = ("alone", "beside a busy process", "beside another training")
CALLS = {"muon": 8, "teacher": 2, "evaluate": 2}  # in a turn, for each training step in one of training
PEER = "timm"  # of peers.py; with torch's own setting


def build_task(name: str, options: argparse.Namespace) -> tuple[Callable[[], Any], int]:
    """Return what a turn repeats, and how many images one call is."""
    recipe = load_recipe(
        "cifar10",
        [f"train.batch_size={options.batch_size}", f"model.patch_px={options.patch_px}", "methods=[token-hard]"],
    )
    bench = Bench(recipe, options.synthetic)
    cohort = bench.cohort(bench.students(("token-hard",)))
    (student,) = cohort.students
    if name == "train":
        return Stepper(cohort), options.batch_size
    images, labels = next(cohort.batches.epoch(0))
    view, _ = cohort.make_view(images, labels, 0)
    if name == "teacher":
        return lambda: cohort.teacher_forward(view), options.batch_size
    if name == "evaluate":
        split = Split(images, labels)
        return lambda: predict(student.classifier, split, bench.precision), options.batch_size
    for parameter in student.classifier.parameters():
        parameter.grad = torch.randn_like(parameter)
    (muon, *_) = build_optimizers(student.classifier.model, recipe.train)
    return muon.step, options.batch_size


def serve(name: str, options: argparse.Namespace) -> None:
    """Do as many calls as each line asks for, and answer with images/s."""
    call, images = build_task(name, options)
    for _ in range(options.warm_up):
        call()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            call()
        seconds = time.perf_counter() - started
        print(json.dumps({"images_per_second": int(line) * images / seconds}), flush=True)


class Worker:
    """A process that does one task under one setting."""

    def __init__(self, task: str, setting: dict[str, str], options: argparse.Namespace, argv: list[str]) -> None:
        self.batch_size = options.batch_size
        settings = {name: value for name, value in os.environ.items() if name not in WAIT_SETTINGS} | setting
        script, argv = __file__, [*argv, "--serve", task]
        if task == PEER:
            script = str(Path(__file__).with_name("peers.py"))
            argv = ["--patch-px", str(options.patch_px), "--batch-size", str(options.batch_size), "--serve", PEER]
            argv += ["--workers", "0", *(["--synthetic"] if options.synthetic else [])]
        command = [sys.executable, script, *argv]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)

    def ask(self, calls: int) -> None:
        """Begin a turn."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        self.calls = calls

    def answer(self) -> float:
        """Wait for the end of a turn and return its images/s."""
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        if "seconds" in answer:  # of peers.py
            return self.calls * self.batch_size / float(answer["seconds"])
        return float(answer.get("images_per_second", 0.0))

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(task: str, settings: dict[str, dict[str, str]], options: argparse.Namespace, argv: list[str]) -> Any:
    """Return images/s of a task by setting and condition, one value a round."""
    calls = options.calls * CALLS.get(task, 1)
    with ExitStack() as stack:
        pairs = {name: [Worker(task, setting, options, argv) for _ in range(2)] for name, setting in settings.items()}
        for worker in (worker for pair in pairs.values() for worker in pair):
            stack.callback(worker.stop)
        for worker in (worker for pair in pairs.values() for worker in pair):
            worker.answer()  # it is ready
        speeds: dict[str, dict[str, list[float]]] = {name: {where: [] for where in CONDITIONS} for name in settings}
        for _ in range(options.rounds):
            for where in CONDITIONS:
                for name, (worker, neighbour) in pairs.items():
                    speeds[name][where].append(turn(worker, neighbour, where, calls))
    return speeds


def turn(worker: Worker, neighbour: Worker, where: str, calls: int) -> float:
    """Measure one turn; beside another training it is the mean of the two."""
    if where == CONDITIONS[1]:
        with busy_process():
            worker.ask(calls)
            return worker.answer()
    worker.ask(calls)
    if where == CONDITIONS[0]:
        return worker.answer()
    neighbour.ask(calls)
    return (worker.answer() + neighbour.answer()) / 2


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table a task."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.serve:
        serve(options.serve, options)
        return
    result: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "rounds": options.rounds, "tasks": {}}
    for task in options.tasks:
        settings = {"as torch has it": {}} if task == PEER else SETTINGS
        result["tasks"][task] = measure(task, settings, options, argv)
        show(task, result["tasks"][task])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(task: str, speeds: dict[str, dict[str, list[float]]]) -> None:
    """Print medians with the slowest and the fastest turn."""
    table = Table(f"{task}: images/s", *CONDITIONS)
    for name, by_condition in speeds.items():
        cells = [f"{statistics.median(s):,.1f} ({min(s):,.1f} to {max(s):,.1f})" for s in by_condition.values()]
        table.add_row(name, *cells)
    Console(width=140).print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    tasks = ("train", "muon", "teacher", "evaluate", PEER)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--synthetic", action="store_true", help="random images")
    parser.add_argument("--patch-px", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each setting in each condition")
    parser.add_argument("--calls", type=int, default=2, help="training steps in a turn, and more of what takes less")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every turn here too")
    parser.add_argument("--serve", choices=tasks, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
