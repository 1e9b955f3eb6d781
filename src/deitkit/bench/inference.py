"""How many images a second a model classifies: a recipe's student, or every model of the paper's table of speeds."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from deitkit.bench.measure import count_flops, machine_limit, time_in_turn, wait
from deitkit.device import Precision, choose_device, describe_machine
from deitkit.errors import is_out_of_memory
from deitkit.methods import METHODS
from deitkit.models.classifier import Classifier
from deitkit.models.vit import SIZES, DeiT, create_student
from deitkit.recipe import Recipe
from deitkit.speed import accelerate

DEFAULT_PX = 224
CLASSES = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PaperModel:
    """A row of the paper's table of speeds (Touvron et al. 2020, Table 7; the seed report's second table).

    Attributes:
        row: Its name there.
        architecture: timm's name, or a size of ours.
        image_px: The resolution that the speed was published for.
        published: Images/s on one V100 with 16 GB, batches as large as fit.
        tokens: Of ours.
    """

    row: str
    architecture: str
    image_px: int
    published: float
    tokens: tuple[str, ...] = ("class",)


_BOTH = ("class", "distillation")
PAPER_TABLE = (
    PaperModel("Grafit ResNet-50", "resnet50", 224, 1226.1),
    PaperModel("Grafit RegNetY-8GF", "regnety_080", 224, 591.6),
    PaperModel("ResNet-152", "resnet152", 224, 526.3),
    PaperModel("EfficientNet-B7", "tf_efficientnet_b7", 600, 55.1),
    PaperModel("ViT-B/32", "vit_base_patch32_384", 384, 394.5),
    PaperModel("ViT-B/16", "vit_base_patch16_384", 384, 85.9),
    PaperModel("ViT-L/32", "vit_large_patch32_384", 384, 124.1),
    PaperModel("ViT-L/16", "vit_large_patch16_384", 384, 27.3),
    PaperModel("DeiT-B", "deit_base", 224, 292.3),
    PaperModel("DeiT-B 384", "deit_base", 384, 85.9),
    PaperModel("DeiT-B distilled", "deit_base", 224, 290.9, _BOTH),
    PaperModel("DeiT-B distilled 384", "deit_base", 384, 85.9, _BOTH),
)


def bench_infer(recipe: Recipe, *, repeats: int, steps: int) -> dict[str, Any]:
    """Time the classification of random images by the student of the recipe's first method, with random weights."""
    device = choose_device(recipe.device)
    precision = Precision.choose(recipe.train.precision, device)
    side, channels = recipe.data.image_px or DEFAULT_PX, recipe.data.channels or 3
    method = METHODS[recipe.methods[0]]
    student = create_student(
        recipe.model, image_px=(side, side), channels=channels, classes=CLASSES, tokens=method.tokens, seed=0
    )
    classifier = Classifier(student, mean=MEAN[:channels], std=STD[:channels])
    accelerate(classifier, recipe.speed, device).eval()
    result = _time_model(classifier, side, recipe.train.batch_size, precision, repeats, steps)
    limit = machine_limit(precision)
    return {
        "machine": describe_machine(device, precision) | {"threads": torch.get_num_threads()},
        "model": recipe.model.model_dump(mode="json"),
        "method": method.name,
        "image_px": side,
        **result,
        "limit_gflop_per_second": limit / 1e9,
        "share_of_limit": result["gflop_per_second"] * 1e9 / limit,
    }


def bench_paper_table(recipe: Recipe, *, repeats: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the speed of each model of the paper's table at its own resolution; one that does not fit says so."""
    device = choose_device(recipe.device)
    precision = Precision.choose(recipe.train.precision, device)
    for model in PAPER_TABLE:
        entry = {"row": model.row, "image_px": model.image_px, "published_images_per_second": model.published}
        try:
            classifier = Classifier(_build(model), mean=MEAN, std=STD)
            accelerate(classifier, recipe.speed, device).eval()
            measured = _time_model(classifier, model.image_px, recipe.train.batch_size, precision, repeats, steps)
            yield entry | measured
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            yield entry | {"problem": f"does not fit in memory at batch {recipe.train.batch_size}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _build(model: PaperModel) -> nn.Module:
    if model.architecture not in SIZES:
        built: nn.Module = timm.create_model(model.architecture, num_classes=CLASSES)
        return built
    size = SIZES[model.architecture]
    return DeiT(
        image_px=model.image_px,
        patch_px=16,
        channels=3,
        classes=CLASSES,
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        tokens=model.tokens,
    )


def _time_model(
    classifier: Classifier, side: int, batch_size: int, precision: Precision, repeats: int, steps: int
) -> dict[str, Any]:
    device = precision.device
    view = torch.rand(batch_size, classifier.mean.shape[1], side, side, device=device)

    @torch.inference_mode()
    def classify() -> None:
        with precision.autocast():
            classifier(view)

    taken = time_in_turn({"classify": classify}, device=device, repeats=repeats, calls=steps, warm_up=2)["classify"]
    wait(device)
    flops = count_flops(classifier.model, (view.shape[1], side, side), backward=False)
    return {
        "batch_size": batch_size,
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "images_per_second": batch_size / taken.median,
        "images_per_second_range": [batch_size / taken.slowest, batch_size / taken.fastest],
        "gflop_per_image": flops / 1e9,
        "gflop_per_second": flops * batch_size / taken.median / 1e9,
    }
