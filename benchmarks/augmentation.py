"""Augmentation alone: deitkit's batched one beside torchvision's per-image pipelines, on the same cores.

Everyone pads by 4 and crops, flips, applies RandAugment 2,9, erases with probability 0.25, and normalises, from uint8
images in memory to a float32 batch. torchvision runs on PIL images as its documentation shows it, in as many worker
processes as serve it best; its v2 transforms run image by image on tensors as well.

    python benchmarks/augmentation.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from deitkit.data.augment.augment import Augment
from deitkit.recipe.schema import AugmentRecipe
from deitkit.system.device import Precision, describe_machine

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class PerImage(Dataset):  # type: ignore[type-arg]
    """Images that are transformed one by one."""

    def __init__(self, images: Tensor, convert: Callable[[Tensor], Any], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.convert, self.transform = images, convert, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.convert(self.images[index]))


def to_pil(image: Tensor) -> Image.Image:
    """Return a tensor as PIL has it."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def pil_pipeline(image_px: int) -> Callable[[Any], Tensor]:
    """Return torchvision's transforms on PIL images."""
    return transforms.Compose(
        [
            transforms.RandomCrop(image_px, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(2, 9),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(0.25),
        ]
    )


def tensor_pipeline(image_px: int) -> Callable[[Any], Tensor]:
    """Return torchvision's v2 transforms on tensors."""
    pipeline: Callable[[Any], Tensor] = v2.Compose(
        [
            v2.RandomCrop(image_px, padding=4),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(0.25),
        ]
    )
    return pipeline


def batched(images: Tensor, batch_size: int) -> Callable[[], float]:
    """Return a turn of deitkit: all images once, in batches; seconds."""
    augment = Augment(AugmentRecipe(randaugment="2,9", erase=0.25), MEAN, STD)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    generator = torch.Generator().manual_seed(0)

    def turn() -> float:
        started = time.perf_counter()
        for batch in images.split(batch_size):
            (augment(batch, generator) - mean) / std
        return time.perf_counter() - started

    return turn


def per_image(dataset: PerImage, batch_size: int, workers: int) -> Callable[[], float]:
    """Return a turn of a per-image pipeline; starting its workers is not charged."""

    def turn() -> float:
        threads = torch.get_num_threads()
        if workers == 0:
            torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)
        if workers:
            for _ in loader:  # starts the workers
                break
        started = time.perf_counter()
        for _ in loader:
            pass
        taken = time.perf_counter() - started
        torch.set_num_threads(threads)
        return taken

    return turn


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="in a turn")
    parser.add_argument("--image-px", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="turns of everyone; the median counts")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="worker processes to try")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args(argv)

    shape = (options.images, 3, options.image_px, options.image_px)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pil = PerImage(images, to_pil, pil_pipeline(options.image_px))
    tensor = PerImage(images, lambda image: image, tensor_pipeline(options.image_px))
    turns = {"deitkit, batched": batched(images, options.batch_size)}
    for workers in options.workers:
        turns[f"torchvision on PIL images, {workers} workers"] = per_image(pil, options.batch_size, workers)
    best = max(options.workers)
    turns[f"torchvision v2 on tensors, {best} workers"] = per_image(tensor, options.batch_size, best)
    for turn in turns.values():
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(options.rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())

    speed = {name: options.images / statistics.median(taken) for name, taken in seconds.items()}
    rows = [
        {
            "name": name,
            "images_per_second": speed[name],
            "range": [options.images / max(taken), options.images / min(taken)],
            "deitkit_is_faster_by": speed["deitkit, batched"] / speed[name],
        }
        for name, taken in seconds.items()
    ]
    cpu = torch.device("cpu")
    result = {
        "machine": describe_machine(Precision(cpu, torch.float32)) | {"threads": torch.get_num_threads()},
        "torchvision": torchvision.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": rows,
    }
    table = Table("who", "images/s", "slowest to fastest", "deitkit / it")
    for row in rows:
        low, high = row["range"]
        table.add_row(
            row["name"], f"{row['images_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}",
            f"{row['deitkit_is_faster_by']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
