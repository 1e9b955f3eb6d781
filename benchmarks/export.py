"""ONNX and int8 files beside the models that they were made from: differences, sizes, and ms for an image.

    python benchmarks/export.py folder:flowers
    python benchmarks/export.py cifar10 --model runs/cifar10/winner

Models with random weights show differences and speed; accuracies are of use only for a trained one, given with --model.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deitkit.data.dataset import load_dataset
from deitkit.export.export import ExportOptions, export_onnx
from deitkit.export.record import ExportRecord
from deitkit.models.classifier import Classifier
from deitkit.models.saved import save_classifier
from deitkit.models.vit import create_student
from deitkit.models.zoo import create_classifier
from deitkit.recipe.schema import DataRecipe, ModelRecipe
from deitkit.system.process import configure_process

TEST_IMAGES = 256
BOTH = ("class", "distillation")
# Name: model, patch, tokens, stem, side, channels; of CNNs only name and side.
STUDENTS: dict[str, tuple[str, int, tuple[str, ...], str, int, int]] = {
    "micro, 32 px": ("micro", 4, BOTH, "patch", 32, 3),
    "micro, grey, 8 px": ("micro", 2, BOTH, "patch", 8, 1),
    "DeiT-Ti, class token, 32 px": ("deit_tiny", 4, ("class",), "patch", 32, 3),
    "DeiT-Ti, both tokens, 32 px": ("deit_tiny", 4, BOTH, "patch", 32, 3),
    "DeiT-Ti, distillation token, 32 px": ("deit_tiny", 4, ("distillation",), "patch", 32, 3),
    "DeiT-Ti, mean pooling, 32 px": ("deit_tiny", 4, (), "patch", 32, 3),
    "DeiT-Ti, stem of convolutions, 32 px": ("deit_tiny", 4, BOTH, "conv", 32, 3),
    "DeiT-Ti, both tokens, 224 px": ("deit_tiny", 16, BOTH, "patch", 224, 3),
}
CNNS = {"timm/resnet18": 224, "timm/tf_efficientnet_lite0": 224, "timm/regnetx_004": 224}


def main(arguments: Sequence[str] | None = None) -> None:
    """Export each model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="As data.name of a recipe; its test images are real ones for the comparison.")
    parser.add_argument("--model", type=Path, action="append", help="A folder of a trained model, instead of all.")
    options = parser.parse_args(arguments)
    print("| model | form | top-1 % | same answers | largest difference | MB | ms for an image | in a batch of 32 |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="deitkit-export-") as name:
        homes = {str(home): home for home in options.model or ()}
        for number, (title, home) in enumerate((homes or random_models(options.data, Path(name))).items()):
            record = export_onnx(home, Path(name) / f"{number}.onnx", ExportOptions(int8=True, data=options.data))
            print_rows(title, record, is_trained=bool(homes))


def random_models(data: str, folder: Path) -> dict[str, Path]:
    """Save every model with random weights, and return their folders by title."""
    return {title: folder / str(number) for number, title in enumerate(_saved(data, folder))}


def _saved(data: str, folder: Path) -> Iterator[str]:
    class_names = load_dataset(DataRecipe(name=data, image_px=32)).class_names
    number = 0
    for title, (name, patch_px, tokens, stem, side, channels) in STUDENTS.items():
        recipe = ModelRecipe(name=name, patch_px=patch_px, stem=stem)  # type: ignore[arg-type]
        student = create_student(
            recipe, image_px=(side, side), channels=channels, classes=len(class_names), tokens=tokens, seed=0
        )
        _save(folder / str(number), student, class_names, side, channels)
        yield title
        number += 1
    for title, side in CNNS.items():
        torch.manual_seed(0)
        built = create_classifier(title, classes=len(class_names), channels=3, image_px=side)
        _save(folder / str(number), built.model, class_names, side, 3, architecture=title)
        yield f"{title}, {side} px"
        number += 1


def _save(
    home: Path, model: torch.nn.Module, class_names: tuple[str, ...], side: int, channels: int, **card: Any
) -> None:
    for name, values in model.named_parameters():  # heads start near zero, where every file would be right
        if name.startswith(("head", "fc", "classifier")) and values.ndim == 2:
            torch.nn.init.normal_(values, std=1.0)
    classifier = Classifier(model.eval(), mean=(0.5,) * channels, std=(0.25,) * channels)
    described = {"class_names": list(class_names), "channels": channels, "input_px": [side, side]}
    save_classifier(home, classifier, {**described, "split": {"test_images": TEST_IMAGES}, **card})


def print_rows(title: str, record: ExportRecord, *, is_trained: bool) -> None:
    """Print the lines of one model."""
    for row in record.rows:
        is_original = row.file is None
        cells = (
            "" if not is_original else title,
            f"{row.name}, {row.precision}" if is_original else row.name,
            f"{100 * row.top1:.2f}" if is_trained else "",
            "" if is_original else f"{row.same_top1:,} of {record.n:,}",
            "" if is_original else f"{row.largest_difference:.0e}",
            f"{row.file_bytes / 1e6:.2f}",
            f"{row.milliseconds:.2f}",
            f"{row.milliseconds_in_batch:.2f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    configure_process()
    main()
