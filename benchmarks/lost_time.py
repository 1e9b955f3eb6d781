"""What a kill costs in the middle of an epoch: a DeiT-Ti is killed at random moments until it is done.

    python benchmarks/lost_time.py --kills 10 --save-seconds 20

Trains a student on images of CIFAR-10, once in peace and once with SIGKILL at random moments, each followed by
`--resume`. For each kill it prints how much training had to be done again, and at the end whether the weights, metrics
and predictions of the two runs are equal bit for bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deitkit.comparison.compare import compare
from deitkit.recipe.load import load_recipe
from deitkit.run.observer import StepProgress, Watcher


class Recorder(Watcher):
    """Writes where a run is, and when, after every step."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def say(self, text: str) -> None:
        self.file.write(json.dumps({"said": text}) + "\n")

    def step(self, title: str, progress: StepProgress) -> None:
        step = (progress.epoch - 1) * progress.steps_per_epoch + progress.step
        self.file.write(json.dumps({"step": step, "at": time.monotonic()}) + "\n")


def launch(options: argparse.Namespace, folder: Path, log: Path) -> int:
    """Begin or resume the run in a fork, and return its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        recipe = load_recipe(
            "cifar10",
            [
                "methods=[none]", f"data.train_images={options.images}", "data.test_images=500",
                "data.validation_fraction=0.01", f"train.epochs={options.epochs}", "train.batch_size=64",
                f"speed.save_seconds={options.save_seconds}",
            ],
        )  # fmt: skip
        compare(recipe, folder, watcher=Recorder(log), resume=folder.exists())
        code = 0
    finally:
        os._exit(code)


def steps_of(log: Path) -> list[dict[str, Any]]:
    """Return the steps that were written, without a last line cut short."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [entry for entry in map(json.loads, lines) if "step" in entry]


def wait_for_step(log: Path, count: int) -> None:
    """Wait until the run has written more steps than before."""
    while len(steps_of(log)) <= count:
        time.sleep(0.05)


def main(argv: list[str] | None = None) -> list[float]:
    """Run, print a line a kill, and return the seconds of training that each one cost."""
    options = parse(sys.argv[1:] if argv is None else argv)
    draw = random.Random(options.seed)  # noqa: S311 - moments, no secrets
    with tempfile.TemporaryDirectory() as place:
        peace, killed, log = Path(place, "peace"), Path(place, "killed"), Path(place, "log.jsonl")
        started = time.monotonic()
        if os.waitpid(launch(options, peace, Path(place, "peace.jsonl")), 0)[1] != 0:
            raise SystemExit("the run in peace failed")
        duration = time.monotonic() - started
        costs = []
        while len(costs) < options.kills:
            before = len(steps_of(log))
            process = launch(options, killed, log)
            wait_for_step(log, before)
            first = steps_of(log)[before]["step"]
            if costs:
                costs[-1] = cost(steps_of(log)[:before], first)
                print(f"kill {len(costs)}: {costs[-1]:.1f} s of training done again, from step {first}", flush=True)
            time.sleep(draw.uniform(0.1, 0.25) * duration)
            os.kill(process, signal.SIGKILL)
            if os.WIFEXITED(os.waitpid(process, 0)[1]):
                raise SystemExit(f"the run ended after {len(costs)} kills: raise --epochs or --images")
            costs.append(0.0)
        before = len(steps_of(log))
        process = launch(options, killed, log)
        wait_for_step(log, before)
        costs[-1] = cost(steps_of(log)[:before], steps_of(log)[before]["step"])
        print(f"kill {len(costs)}: {costs[-1]:.1f} s of training done again")
        if os.waitpid(process, 0)[1] != 0:
            raise SystemExit("the last resume failed")
        equal = all(
            path.read_bytes() == (killed / path.relative_to(peace)).read_bytes()
            for path in peace.rglob("*.safetensors")
        )
        print(
            f"at most {max(costs):.1f} s lost with states {options.save_seconds:g} s apart; equal to the bit: {equal}"
        )
        if not equal:
            raise SystemExit(1)
    return costs


def cost(steps: list[dict[str, Any]], first: int) -> float:
    """Return how long the steps took that were done before a kill and are done again after it."""
    newest = steps[-1]
    kept = next(entry for entry in reversed(steps) if entry["step"] == first - 1) if first > 1 else steps[0]
    return float(newest["at"] - kept["at"])


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--save-seconds", type=float, default=10.0)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
