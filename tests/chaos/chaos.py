"""Kill a small comparison again and again, spoil what it wrote, and see whether it ends as if nothing had happened.

    python tests/chaos/chaos.py --kills 50 --faults 10 --unit-kills 20

A run is begun, ended at random moments and resumed until it is done; then its weights, metrics, results and tables are
compared with those of an undisturbed run. Then the next one, until all kills and faults are spent. Runs are
forks of this process, so that a kill costs no new start of Python; whatever ends them, they end as the command would.
"""

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from deitkit.cli.main import main

RECIPE = (
    "compare", "digits", "data.test_images=200", "data.train_images=96", "model.width=16", "model.depth=2",
    "model.heads=2", "train.epochs=12", "train.batch_size=16", "train.ema_decay=0.9", "train.warmup_epochs=1",
    "model.drop_path=0.1", "methods=[none, token-hard, dist]", "teacher.cache=true", "teacher.all_images=false",
    "teacher.train.batch_size=16", "teacher.train.epochs=6", "teacher.min_top1=null", "teacher.allow_weak=true",
    "seeds=[0, 1]", "speed.save_seconds=0.5",
)  # fmt: skip
DISK_MIB = 24
GRACE_S = 60  # in which a run that was asked to stop has to stop
USER_MISTAKE = 2
MOST_KILLS = 4


class LostError(AssertionError):
    """Something was lost, or ended as it should not."""


class Chaos:
    """A place where runs are begun, disturbed and compared.

    Args:
        place: An empty folder; a small file system of its own where one can be mounted.
        seed: Of the moments and faults.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.random = random.Random(seed)
        self.log = place / "log.txt"
        self.done: Counter[str] = Counter()
        self.rounds = 0
        began = time.monotonic()
        self.finish(self.launch(place / "peace"))
        self.duration = time.monotonic() - began

    def launch(self, folder: Path, *more: str, limit: int | None = None) -> int:
        """Begin the command, with more options if any, in a fork, and return its process."""
        resume = ("--resume",) if (folder / "recipe.yaml").exists() else ()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            with self.log.open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.argv = ["deitkit", *RECIPE, "--out", str(folder), *resume, *more]
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def finish(self, process: int) -> None:
        """Wait for a run, which must come to its end."""
        code = self.wait(process)
        if code != 0:
            raise LostError(f"a run ended with code {code}:\n{self.log.read_text()[-3000:]}")

    def wait(self, process: int) -> int:
        """Wait for a process, and return its exit code; negative if a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def moment(self) -> float:
        """Return a random while, shorter than a run."""
        return self.random.uniform(0.05, 0.6) * self.duration

    def signal(self, folder: Path, number: int) -> bool:
        """Begin or resume a run and send it a signal at a random moment; return whether it was still at work."""
        process = self.launch(folder)
        time.sleep(self.moment())
        os.kill(process, number)
        asked = time.monotonic()
        code = self.wait(process)
        if time.monotonic() - asked > GRACE_S:
            raise LostError(f"signal {number} took {time.monotonic() - asked:.0f} s to end a run")
        if code == 0 or (code == -number and number != signal.SIGKILL):
            return False  # it had ended, or not begun: before that a signal does what it does to any process
        expected = -number if number == signal.SIGKILL else 128 + number
        if code != expected:
            raise LostError(f"signal {number} ended a run with code {code}:\n{self.log.read_text()[-3000:]}")
        return True

    def kill(self, folder: Path) -> bool:
        """SIGKILL."""
        return self.signal(folder, signal.SIGKILL)

    def terminate(self, folder: Path) -> bool:
        """SIGTERM, as schedulers send it."""
        return self.signal(folder, signal.SIGTERM)

    def interrupt(self, folder: Path) -> bool:
        """Ctrl-C."""
        return self.signal(folder, signal.SIGINT)

    def newest_state(self, folder: Path) -> Path | None:
        """Return the state that a run would go on from."""
        return next(folder.rglob("checkpoint.safetensors"), None)

    def flip_a_bit(self, folder: Path) -> bool:
        """Spoil one bit of the newest state."""
        state = self.newest_state(folder)
        if state is None:
            return False
        data = bytearray(state.read_bytes())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        state.write_bytes(data)
        return True

    def truncate(self, folder: Path) -> bool:
        """Cut the newest state off somewhere, as a disk does that lost its last writes."""
        state = self.newest_state(folder)
        if state is None:
            return False
        os.truncate(state, self.random.randrange(state.stat().st_size))
        return True

    def lose_power(self, folder: Path) -> bool:
        """Take the newest state away and leave a half-written temporary file, as if its rename had not been synced."""
        state = self.newest_state(folder)
        if state is None:
            return False
        half = state.read_bytes()[: state.stat().st_size // 2]
        state.with_name(f".{'0123456789abcdef' * 2}.tmp").write_bytes(half)
        state.unlink()
        return True

    def fill_the_disk(self, folder: Path) -> bool:
        """Let a run find its disk full; where no small disk could be mounted, let its larger files be refused."""
        filler = self.place / "filler"
        process = self.launch(folder, limit=None if os.path.ismount(self.place) else 20_000)
        time.sleep(self.moment())
        if os.path.ismount(self.place):
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 12))
                except OSError:
                    pass
        code = self.wait(process)
        filler.unlink(missing_ok=True)
        if code not in (0, USER_MISTAKE):
            raise LostError(f"a full disk ended a run with code {code}:\n{self.log.read_text()[-3000:]}")
        return code == USER_MISTAKE

    def run_twice(self, folder: Path) -> bool:
        """Begin a second run in the folder of one that is at work; it must wait, or be refused."""
        first = self.launch(folder)
        time.sleep(self.moment())
        if not (folder / "recipe.yaml").exists():
            os.kill(first, signal.SIGKILL)
            self.wait(first)
            return False
        said = len(self.log.read_text())
        second = self.launch(folder)
        until, sign = time.monotonic() + self.duration, "another deitkit process is using"
        while sign not in self.log.read_text()[said:] and time.monotonic() < until:
            time.sleep(0.1)
        for process in (second, first):
            os.kill(process, signal.SIGKILL)
        self.wait(second)
        if self.wait(first) == 0:
            return False
        if sign not in self.log.read_text()[said:]:
            raise LostError("a second run in the same folder did not wait")
        return True

    def survive(self, disturbances: list[str]) -> None:
        """Disturb one run until it is done or nothing is left to disturb it with, and compare it with peace."""
        folder = self.place / f"chaos-{self.rounds}"
        self.rounds += 1
        while disturbances and not (folder / "report.html").exists():
            what = disturbances.pop()
            disturb: Callable[[Path], bool] = getattr(self, what)
            if disturb(folder):
                self.done[what] += 1
            else:  # it came too early or too late: once more, in its turn
                disturbances.insert(0, what)
                if what not in ENDING:
                    self.kill_uncounted(folder)
        self.finish(self.launch(folder))
        compare_runs(self.place / "peace", folder)
        shutil.rmtree(folder)

    def kill_uncounted(self, folder: Path) -> None:
        """Bring a run further, so that there is something to spoil."""
        self.done["kill"] += self.kill(folder)


ENDING = ("kill", "terminate", "interrupt", "fill_the_disk", "run_twice")
FAULTS = ("flip_a_bit", "truncate", "lose_power", "fill_the_disk", "run_twice", "terminate", "interrupt")


UNREPEATABLE = ("created", "shares", "cost", "batch_size", "advice")  # clocks, and what follows from them


def kill_units(chaos: Chaos, kills: int) -> None:
    """Run units side by side and kill their processes at random moments, until all kills are spent."""
    while kills:
        folder = chaos.place / "units-run"
        process = chaos.launch(folder, "--on", "local:2")
        driver = psutil.Process(process)
        killed: Counter[str] = Counter()  # a unit that is lost soon and often is given up
        while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
            time.sleep(chaos.random.uniform(3, 9))
            with suppress(psutil.NoSuchProcess):
                units = [child for child in driver.children() if "--out" in child.cmdline()]
                units = [child for child in units if killed[" ".join(child.cmdline())] < MOST_KILLS]
                if kills and units:
                    unit = chaos.random.choice(units)
                    killed[" ".join(unit.cmdline())] += 1
                    unit.kill()
                    chaos.done["kill of a unit"] += 1
                    kills -= 1
        chaos.finish(process)
        shutil.rmtree(folder / "units")
        compare_runs(chaos.place / "peace", folder)
        shutil.rmtree(folder)
        chaos.rounds += 1
        print(f"{chaos.done['kill of a unit']} kills of units survived, {kills} to come", flush=True)


def timeless(value: Any) -> Any:
    """Leave out what differs between two equal runs: times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k not in UNREPEATABLE}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def compare_runs(peace: Path, other: Path) -> None:
    """Raise LostError unless two runs hold the same, but for times: files, weights, metrics, results, tables."""
    names, others = (
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (peace, other)
    )
    names, others = (
        {n for n in some if "tfevents" not in n and not n.endswith((".tmp", ".lock"))} for some in (names, others)
    )
    if names != others:
        raise LostError(f"files differ: {sorted(names ^ others)}")
    for name in sorted(names):
        first, second = (peace / name).read_bytes(), (other / name).read_bytes()
        if name.endswith((".safetensors", ".yaml", ".png")) and not name.startswith(("curves", "cost")):
            same = first == second
        elif name.endswith(".json"):
            same = timeless(json.loads(first)) == timeless(json.loads(second))
        elif name.endswith(".jsonl"):
            same = [timeless(json.loads(x)) for x in first.splitlines()] == [
                timeless(json.loads(x)) for x in second.splitlines()
            ]
        elif name == "table.csv":
            same = _rows(peace / name) == _rows(other / name)
        else:
            continue
        if not same:
            more = f":\n{first.decode()}\n{second.decode()}" if name == "environment.json" else ""
            raise LostError(f"{name} differs from that of the undisturbed run{more}")


def _rows(path: Path) -> Any:
    with path.open(newline="", encoding="utf-8") as file:
        return [timeless(dict(row)) for row in csv.DictReader(file)]


def mount(place: Path) -> bool:
    """Make a folder a small disk of its own; return whether this process may."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def wreak(kills: int, faults: int, unit_kills: int, seed: int) -> None:
    """Spend kills and faults, and say what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        mounted = mount(place)
        try:
            began = time.monotonic()
            chaos = Chaos(place, seed)
            names = list(FAULTS) if faults >= len(FAULTS) else chaos.random.sample(FAULTS, faults)
            names += chaos.random.choices(FAULTS, k=faults - len(names))
            disturbances = ["kill"] * kills + names
            chaos.random.shuffle(disturbances)
            while disturbances:
                chaos.survive(disturbances)
                print(f"{sum(chaos.done.values())} disturbances survived, {len(disturbances)} to come", flush=True)
            kill_units(chaos, unit_kills)
            told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(chaos.done.items()))
            disk = f"a disk of {DISK_MIB} MiB" if mounted else "file sizes limited, since no disk could be mounted"
            print(f"seed {seed}, {disk}: {told}; {chaos.rounds} runs ended like the undisturbed run, bit for bit")
            print(f"the undisturbed run took {chaos.duration:.1f} s, all of it {time.monotonic() - began:.0f} s")
        finally:
            if mounted:
                subprocess.run(["umount", str(place)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--unit-kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wreak(options.kills, options.faults, options.unit_kills, options.seed)
