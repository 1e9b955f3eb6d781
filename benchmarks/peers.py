"""deitkit beside its peers: images/s of training a DeiT with token-hard distillation, the same work for everyone.

Everyone trains the same student from the same teacher on the same images, in batches of the same size, in the same
precision, under the same augmentation: pad 4 and crop, flip, RandAugment 2,9, erasing 0.25. Each has a process of its
own, and turns alternate, so that whatever slows the machine for a while slows everyone. RandAugment is torchvision's
for all peers: timm's has other operations, and fails under Pillow 13 (timm 1.0.31). Loaders of peers get the number of
worker processes that serves them best.

    python benchmarks/peers.py --patch-px 4          # real CIFAR-10 (from $DEITKIT_DATA)
    python benchmarks/peers.py --synthetic --steps 2 # random images
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deitkit.system.process import configure_process

if sys.argv[-2:] == ["--serve", "deitkit"]:  # this process serves deitkit: peers have torch's defaults
    configure_process()

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from deitkit.bench.measure import count_flops, machine_limit
from deitkit.bench.training_speed import Bench, Stepper, step_flops, synthetic_dataset
from deitkit.data.dataset import load_dataset
from deitkit.recipe.load import load_recipe
from deitkit.system.device import Precision
from deitkit.system.timer import wait

WORKER_CHOICES = {"cpu": (0, 1, 2), "cuda": (8, 16)}


class DeitkitPeer:
    """This project: a cohort of one student, as `deitkit compare` trains it."""

    name = "deitkit"

    def __init__(self, options: argparse.Namespace) -> None:
        bench = Bench(_recipe(options), options.synthetic)
        self.device = bench.device
        self.stepper = Stepper(bench.cohort(bench.students(("token-hard",))))
        self.setting = "as shipped"
        self.flops = step_flops(bench)

    def turn(self, steps: int) -> float:
        """Train so many steps and return the seconds."""
        wait(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.stepper()
        wait(self.device)
        return time.perf_counter() - started


class LoaderPeer(ABC):
    """A loop over a loader of PIL images; subclasses say which loader, and what a step is."""

    name = ""

    def __init__(self, options: argparse.Namespace) -> None:
        recipe = _recipe(options)
        dataset = synthetic_dataset(recipe) if options.synthetic else load_dataset(recipe.data)
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        self.device, self.options = torch.device("cuda" if on_gpu else "cpu"), options
        self.precision = Precision.choose("auto", self.device)
        # A turn is within an epoch, since a loader starts its workers again with each.
        count = (1 + max(options.steps, options.warm_up)) * options.batch_size
        self.images = PilImages(dataset.train.images, dataset.train.labels, count)
        self.mean, self.std = dataset.mean, dataset.std
        self.image_px = dataset.image_px[0]
        self.student = timm.create_model(
            f"deit_{options.size}_distilled_patch16_224",
            img_size=self.image_px,
            patch_size=options.patch_px,
            num_classes=dataset.classes,
        ).to(self.device)
        self.student.set_distilled_training(True)
        self.teacher = timm.create_model(options.teacher, num_classes=dataset.classes).to(self.device).eval()
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=1e-3, weight_decay=0.05, fused=True
        )
        self.prepare()
        self.workers = self._best_workers()
        self.setting = f"{self.workers} workers{self.describe()}"
        shape = (dataset.channels, *dataset.image_px)
        self.flops = count_flops(self.student, shape, backward=True) + count_flops(self.teacher, shape, backward=False)

    def prepare(self) -> None:  # noqa: B027 - most need nothing else
        """Set up whatever else the loop needs."""

    def describe(self) -> str:
        """Say what else was set."""
        return ""

    def make_loader(self, workers: int) -> Any:
        """Return the peer's loader."""
        return DataLoader(
            self.images.with_transform(self.transform()),
            batch_size=self.options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )

    def transform(self) -> transforms.Compose:
        """Return the augmentation of one image."""
        return transforms.Compose(
            [
                transforms.RandomCrop(self.image_px, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.RandAugment(2, 9),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
                transforms.RandomErasing(0.25),
            ]
        )

    @abstractmethod
    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""

    def turn(self, steps: int, workers: int | None = None) -> float:
        """Train so many steps and return the seconds; starting the workers and the first batch are not charged."""
        batches = self._batches(self.workers if workers is None else workers)
        assert (1 + steps) * self.options.batch_size <= len(self.images)
        images, labels = next(batches)
        self.train_step(images, labels)
        wait(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.train_step(*next(batches))
        wait(self.device)
        return time.perf_counter() - started

    def _batches(self, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.make_loader(workers):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _best_workers(self) -> int:
        choices = self.options.workers or WORKER_CHOICES[self.device.type]
        if len(choices) == 1:
            return int(choices[0])
        return int(min(choices, key=lambda workers: self.turn(self.options.steps, workers)))

    def autocast(self) -> Any:
        """Return the context of a forward pass in the precision that everyone has."""
        return self.precision.autocast()


class TimmTask(LoaderPeer):
    """timm's own TokenDistillationTask, with its loader."""

    name = "timm TokenDistillationTask"

    def prepare(self) -> None:
        """Build the task; both models compiled where a GPU is."""
        from timm.task import TokenDistillationTask

        self.teacher.to(memory_format=torch.channels_last)
        self.task = TokenDistillationTask(
            self.student,
            self.teacher,
            criterion=nn.CrossEntropyLoss(label_smoothing=0.1),
            distill_type="hard",
            task_loss_weight=0.5,
            device=self.device,
            verbose=False,
        ).train()
        if self.device.type == "cuda":
            self.task.compile()

    def describe(self) -> str:
        """Say what else was set."""
        return ", compiled" if self.device.type == "cuda" else ", channels-last teacher"

    def make_loader(self, workers: int) -> Any:
        """Return timm's loader, which erases and normalises on the GPU where there is one."""
        from timm.data import create_loader

        loader = create_loader(
            self.images.with_transform(None),
            input_size=(3, self.image_px, self.image_px),
            batch_size=self.options.batch_size,
            is_training=True,
            use_prefetcher=self.device.type == "cuda",
            re_prob=0.25,
            re_mode="const",
            hflip=0.5,
            color_jitter=None,
            auto_augment=None,
            mean=self.mean,
            std=self.std,
            num_workers=workers,
            persistent_workers=False,
            device=self.device,
        )
        # Small images are cropped after padding, as the released code does; RandAugment is everyone's.
        steps = loader.dataset.transform.transforms
        steps[0] = transforms.RandomCrop(self.image_px, padding=4)
        steps.insert(2, transforms.RandAugment(2, 9))
        return loader

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.task(images, labels)["loss"]
        loss.backward()
        self.optimizer.step()


class PaperLoop(LoaderPeer):
    """The loop of the paper's released code, as timm's models express it."""

    name = "the paper's loop"

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch: student, teacher without gradient, two cross-entropies."""
        with self.autocast():
            class_logits, distillation_logits = self.student(images)
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            loss = 0.5 * F.cross_entropy(class_logits, labels, label_smoothing=0.1)
            loss = loss + 0.5 * F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        wait(self.device)  # as the released code does after every step


class SeedLoop(PaperLoop):
    """A plain loop in the seed's style: float32, and the loss read after every step."""

    name = "a plain loop"

    def prepare(self) -> None:
        """Use the plain optimizer."""
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-3, weight_decay=0.05)

    def autocast(self) -> Any:
        """Return a context that does nothing."""
        return nullcontext()

    def describe(self) -> str:
        """Say what else was set."""
        return ", fp32"


PEERS = {"deitkit": DeitkitPeer, "timm": TimmTask, "paper": PaperLoop, "plain": SeedLoop}


class PilImages:
    """At least ``count`` images as PIL has them, labelled, some of them more than once; transformed when asked for."""

    def __init__(self, images: Tensor, labels: Tensor, count: int, transform: Any = None) -> None:
        self.images, self.labels, self.count, self.transform = images, labels, max(count, len(images)), transform

    def with_transform(self, transform: Any) -> "PilImages":
        """Return the same images under another transform."""
        return PilImages(self.images, self.labels, self.count, transform)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place = index % len(self.images)
        image: Any = Image.fromarray(self.images[place].permute(1, 2, 0).numpy())
        return (self.transform(image) if self.transform else image), int(self.labels[place])


class Remote:
    """A peer in a process of its own: started, asked for turns, and stopped."""

    def __init__(self, key: str, argv: list[str]) -> None:
        self.name = PEERS[key].name
        command = [sys.executable, __file__, *argv, "--serve", key]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def turn(self, steps: int) -> float:
        """Let the peer train so many steps and return the seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"problem": "the process ended without a word"}


def serve(key: str, options: argparse.Namespace) -> None:
    """Be a peer: say what it is, then train as many steps as each line asks for."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        peer = PEERS[key](options)
        peer.turn(options.warm_up)
    except Exception as error:  # a peer that cannot run says why in its row
        say({"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return
    say({"setting": peer.setting, "gflop_per_image": peer.flops / 1e9})
    for line in sys.stdin:
        say({"seconds": peer.turn(int(line))})


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Measure, print the table, and return what was measured."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options)
        return None
    peers = [Remote(key, argv) for key in options.peers]
    ready = [peer for peer in peers if "problem" not in peer.about]
    seconds: dict[str, list[float]] = {peer.name: [] for peer in ready}
    for _ in range(options.rounds):
        for peer in ready:
            seconds[peer.name].append(peer.turn(options.steps) / options.steps)
    for peer in peers:
        peer.stop()
    result = summarise(Bench(_recipe(options), options.synthetic), options, peers, seconds)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def summarise(
    bench: Bench, options: argparse.Namespace, peers: list[Remote], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Turn seconds into rows."""
    limit = machine_limit(bench.precision)
    speed = {name: options.batch_size / statistics.median(taken) for name, taken in seconds.items()}
    rows = [
        {
            "name": peer.name,
            **peer.about,
            "images_per_second": speed[peer.name],
            "range": [options.batch_size / max(seconds[peer.name]), options.batch_size / min(seconds[peer.name])],
            "share_of_limit": speed[peer.name] * peer.about["gflop_per_image"] * 1e9 / limit,
            "deitkit_is_faster_by": speed["deitkit"] / speed[peer.name] if "deitkit" in speed else None,
        }
        for peer in peers
        if peer.name in speed
    ]
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    return (
        bench.describe()
        | versions
        | {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "limit_gflop_per_second": limit / 1e9,
            "rounds": options.rounds,
            "steps": options.steps,
            "rows": rows,
            "problems": {peer.name: peer.about["problem"] for peer in peers if "problem" in peer.about},
        }
    )


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    machine = result["machine"]
    table = Table(
        "who", "images/s", "slowest to fastest", "GFLOP/image", "of the limit", "deitkit / it", "setting",
        title=f"DeiT {result['image_px'][0]} px, batch {result['batch_size']}, {machine['device']} "
        f"({machine['processor']}, {machine['threads']} threads), {machine['precision']}, torch {machine['torch']}",
    )  # fmt: skip
    for row in result["rows"]:
        low, high = row["range"]
        ratio = row["deitkit_is_faster_by"]
        table.add_row(
            row["name"], f"{row['images_per_second']:,.1f}", f"{low:,.1f} to {high:,.1f}",
            f"{row['gflop_per_image']:.2f}", f"{100 * row['share_of_limit']:.1f} %", f"{ratio:.2f}" if ratio else "",
            row["setting"],
        )  # fmt: skip
    for name, problem in result["problems"].items():
        table.add_row(name, "", "", "", "", "", f"could not run: {problem}")
    console = Console()
    console.print(table)
    limit = f"{result['limit_gflop_per_second']:,.0f} GFLOP/s"
    console.print(f"the limit is a large matrix product's {limit} in the same precision, measured in the same run")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="data set, as in a recipe's data.name")
    parser.add_argument("--synthetic", action="store_true", help="random images instead")
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="tiny", help="of the student")
    parser.add_argument("--image-px", type=int, default=32)
    parser.add_argument("--patch-px", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--teacher", default="resnet18", help="timm's name; random weights")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--workers", nargs="+", type=int, help="worker processes to try for the peers' loaders")
    parser.add_argument("--rounds", type=int, default=5, help="turns of everyone; the median counts")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of everyone before the first turn")
    parser.add_argument("--threads", type=int, help="of torch; by default torch's own choice")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--serve", choices=tuple(PEERS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _recipe(options: argparse.Namespace) -> Any:
    return load_recipe(
        None,
        [
            f"data.name={options.data}", f"data.image_px={options.image_px}", f"model.name=deit_{options.size}",
            f"model.patch_px={options.patch_px}", f"train.batch_size={options.batch_size}", "methods=[token-hard]",
            f"teacher.name=timm/{options.teacher}", "augment.randaugment='2,9'", "augment.erase=0.25",
            f"device={options.device}",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
