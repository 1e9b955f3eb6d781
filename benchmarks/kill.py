"""What a peer's training script loses when it is killed: timm's ``train.py``, killed once and resumed.

    python benchmarks/kill.py path/to/pytorch-image-models/train.py

The script trains a tiny transformer on a folder of digits, once in peace and once with a SIGKILL in the middle of its
fourth epoch and ``--resume``; then weights, log and best result of the two are held side by side. What deitkit does in
the same test is measured by ``tests/chaos/chaos.py``.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

EPOCHS, KILLED_IN = 6, 4
IMAGES = {"train": 300, "validation": 100}


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


def command(script: Path, data: Path, out: Path, name: str) -> list[str]:
    """Return a short training whose outcome hangs on every random draw."""
    options = (
        f"--data-dir {data} --output {out} --experiment {name} --model test_vit --num-classes 10 --epochs {EPOCHS}"
    )
    options += " --batch-size 30 --opt adamw --lr 1e-3 --warmup-epochs 0 --device cpu --workers 0 --seed 0 --mixup 0.8"
    options += " --reprob 0.25 --drop-path 0.1 --checkpoint-hist 2"
    return [sys.executable, str(script), *options.split()]


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the epochs that a run has logged."""
    file = folder / "summary.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def run_killed(call: list[str], folder: Path, log: Path) -> None:
    """Begin a run, kill it in the middle of an epoch, and resume it until it ends."""
    with log.open("w") as text, subprocess.Popen(call, stdout=text, stderr=text) as process:
        times = [time.monotonic()]
        while len(rows(folder)) < KILLED_IN - 1:
            if process.poll() is not None:
                raise SystemExit(f"the script ended before it could be killed: {log.read_text()[-2000:]}")
            if len(rows(folder)) == len(times):
                times.append(time.monotonic())
            time.sleep(0.05)
        time.sleep((times[-1] - times[0]) / len(times) / 2)
        os.kill(process.pid, signal.SIGKILL)
    with log.open("a") as text:
        subprocess.run([*call, "--resume", str(folder / "last.pth.tar")], stdout=text, stderr=text, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="timm's train.py")
    script = parser.parse_args().script
    with tempfile.TemporaryDirectory() as place:
        data, out = Path(place) / "data", Path(place) / "out"
        write_digits(data)
        for name in ("peace", "again"):
            log = Path(place) / f"{name}.log"
            with log.open("w") as text:
                if subprocess.run(command(script, data, out, name), stdout=text, stderr=text, check=False).returncode:
                    raise SystemExit(f"the script failed: {log.read_text()[-2000:]}")
        run_killed(command(script, data, out, "killed"), out / "killed", Path(place) / "killed.log")
        weights = {
            name: torch.load(out / name / "last.pth.tar", weights_only=False, map_location="cpu")["state_dict"]
            for name in ("peace", "again", "killed")
        }
        for name in ("again", "killed"):
            gaps = [float((weights["peace"][key] - value).abs().max()) for key, value in weights[name].items()]
            equal = "equal bit for bit" if max(gaps) == 0 else f"differ by up to {max(gaps):.3g}"
            print(f"{name}: weights {equal}; epochs logged: {[row['epoch'] for row in rows(out / name)]}")
            last = [rows(out / run)[-1]["eval_top1"] for run in (name, "peace")]
            print(f"{name}: last top-1 {last[0]}, in peace {last[1]}")


if __name__ == "__main__":
    main()
