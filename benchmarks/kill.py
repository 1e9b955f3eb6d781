"""What a peer's training script loses when it is killed: timm's ``train.py`` or DeiT's ``main.py``, killed and resumed.

    python benchmarks/kill.py path/to/pytorch-image-models/train.py
    python benchmarks/kill.py path/to/deit/main.py       # with timm==0.3.2 "pillow<12"

The script trains a small transformer on a folder of digits, twice in peace and once with a SIGKILL in the middle of
its fourth epoch and ``--resume``; then weights, log and last accuracy of the runs are held side by side. What deitkit
does in the same test is measured by ``tests/chaos/chaos.py``.

The paper's script is of 2020. So that it runs at all beside a current torch, it finds a stand-in for ``torch._six``,
which timm 0.3.2 imports, may call ``torch.cuda.synchronize`` on a CPU, and may unpickle its own checkpoint.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

EPOCHS, KILLED_IN = 6, 4
IMAGES = {"train": 300, "val": 100}
STAND_INS = """
import collections.abc, sys, types
sys.modules["torch._six"] = types.ModuleType("torch._six")
sys.modules["torch._six"].container_abcs = collections.abc
import torch
torch.cuda.synchronize = lambda *device: None
"""


@dataclass(frozen=True)
class Script:
    """How a training script is called, and where it leaves what."""

    options: str  # for a short training whose outcome hangs on every random draw
    accuracies: Callable[[Path], list[float]]  # of the epochs that a run has logged
    checkpoint: str
    weights: str
    stand_ins: str = ""


def timm_accuracies(folder: Path) -> list[float]:
    """Return the top-1 of each epoch in timm's log."""
    file = folder / "summary.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [float(row["eval_top1"]) for row in rows if row["epoch"].isdigit()]  # a resumed run writes the heading again


def deit_accuracies(folder: Path) -> list[float]:
    """Return the top-1 of each epoch in the log of the paper's script."""
    file = folder / "log.txt"
    return [json.loads(line)["test_acc1"] for line in file.read_text().splitlines()] if file.exists() else []


SCRIPTS = {
    "train.py": Script(
        "--data-dir {data} --val-split val --output {out} --experiment {name} --model test_vit --num-classes 10 "
        "--epochs {epochs} --batch-size 30 --opt adamw --lr 1e-3 --warmup-epochs 0 --device cpu --workers 0 --seed 0 "
        "--mixup 0.8 --reprob 0.25 --drop-path 0.1 --checkpoint-hist 2",
        timm_accuracies,
        "last.pth.tar",
        "state_dict",
    ),
    "main.py": Script(
        "--data-set IMNET --data-path {data} --output_dir {out}/{name} --model deit_tiny_patch16_224 --input-size 64 "
        "--epochs {epochs} --batch-size 30 --warmup-epochs 0 --device cpu --num_workers 0 --no-pin-mem --seed 0 "
        "--mixup 0 --cutmix 0 --no-repeated-aug",
        deit_accuracies,
        "checkpoint.pth",
        "model",
        STAND_INS,
    ),
}


def write_digits(folder: Path) -> None:
    """Write handwritten digits as a folder of images."""
    digits = load_digits()
    pictures = iter(zip(digits.images, digits.target, strict=True))
    for part, count in IMAGES.items():
        for number in range(count):
            pixels, label = next(pictures)
            home = folder / part / str(label)
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).convert("RGB").save(home / f"{number}.png")


class Trial:
    """Runs of one script in one place."""

    def __init__(self, path: Path, place: Path) -> None:
        self.script, self.path, self.place = SCRIPTS[path.name], path.resolve(), place
        write_digits(place / "data")
        (place / "stand-ins").mkdir()
        (place / "stand-ins" / "sitecustomize.py").write_text(self.script.stand_ins)
        self.environment = {
            **os.environ, "PYTHONPATH": str(place / "stand-ins"), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        }  # fmt: skip

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """Begin a run, or go on with it; what it says is added to its log."""
        self.home(name).mkdir(parents=True, exist_ok=True)
        options = self.script.options.format(data=self.place / "data", out=self.place / "out", name=name, epochs=EPOCHS)
        command = [sys.executable, str(self.path), *options.split(), *more]
        with (self.place / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.path.parent)

    def finish(self, name: str, *more: str) -> None:
        """Run until the script ends by itself."""
        if self.start(name, *more).wait():
            self.give_up(name)

    def kill(self, name: str) -> None:
        """Begin a run and kill it in the middle of an epoch."""
        process, times = self.start(name), [time.monotonic()]
        while len(self.accuracies(name)) < KILLED_IN - 1:
            if process.poll() is not None:
                self.give_up(name)
            if len(self.accuracies(name)) == len(times):
                times.append(time.monotonic())
            time.sleep(0.05)
        time.sleep((times[-1] - times[0]) / len(times) / 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def home(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.place / "out" / name

    def accuracies(self, name: str) -> list[float]:
        """Return the top-1 of the epochs that a run has logged."""
        return self.script.accuracies(self.home(name))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return what a run ended with; the file is of a script that ran here just now."""
        file = self.home(name) / self.script.checkpoint
        return torch.load(file, weights_only=False, map_location="cpu")[self.script.weights]

    def give_up(self, name: str) -> None:
        """End with what the script said last."""
        raise SystemExit(f"the script failed: {(self.place / f'{name}.log').read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help=" or ".join(SCRIPTS))
    path = parser.parse_args().script
    if path.name not in SCRIPTS:
        raise SystemExit(f"{path} is none of {', '.join(SCRIPTS)}")
    with tempfile.TemporaryDirectory() as place:
        trial = Trial(path, Path(place))
        for name in ("peace", "again"):
            trial.finish(name)
        trial.kill("killed")
        trial.finish("killed", "--resume", str(trial.home("killed") / trial.script.checkpoint))
        peace = trial.weights("peace")
        for name in ("again", "killed"):
            gap = max(float((peace[key] - value).abs().max()) for key, value in trial.weights(name).items())
            accuracies = trial.accuracies(name)
            print(f"{name}: weights {'equal bit for bit' if gap == 0 else f'differ by up to {gap:.3g}'}; ", end="")
            print(f"{len(accuracies)} epochs logged; last top-1 {accuracies[-1]:.1f}, ", end="")
            print(f"in peace {trial.accuracies('peace')[-1]:.1f}")


if __name__ == "__main__":
    main()
