"""Inference speed, in images per second, of a recipe's student or of the models of the catalogue."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deitkit.bench.measure import count_flops, machine_limit
from deitkit.bench.training_speed import view_of_recipe, without_weights
from deitkit.distillation.methods import METHODS
from deitkit.errors import is_out_of_memory
from deitkit.models.accelerate import accelerate
from deitkit.models.catalogue import CATALOGUE, CLASSES, SOURCES
from deitkit.models.classifier import IMAGENET_NORMALISATION, Classifier
from deitkit.models.onnx_file import is_onnx
from deitkit.models.saved import load_classifier, model_folder
from deitkit.models.vit import create_student
from deitkit.recipe.schema import Recipe
from deitkit.system.device import Precision, choose_device, describe_machine
from deitkit.system.timer import time_in_turn


def bench_infer(recipe: Recipe, *, repeats: int, steps: int) -> dict[str, Any]:
    """Measure the inference speed of the student of the recipe's first method, on random images and weights."""
    recipe = without_weights(recipe)
    precision = Precision.of(recipe)
    channels, side = view_of_recipe(recipe.data)
    method = METHODS[recipe.methods[0]]
    student = create_student(
        recipe.model, image_px=(side, side), channels=channels, classes=CLASSES, tokens=method.tokens, seed=0
    )
    mean, std = IMAGENET_NORMALISATION
    classifier = Classifier(student, mean=mean[:channels], std=std[:channels])
    accelerate(classifier, recipe.speed, precision.device).eval()
    result = _time_model(classifier, side, recipe.train.batch_size, precision, repeats, steps)
    limit = machine_limit(precision)
    return {
        "machine": describe_machine(precision),
        "model": recipe.model.model_dump(mode="json"),
        "method": method.name,
        "image_px": side,
        **result,
        "limit_gflop_per_second": limit / 1e9,
        "share_of_limit": result["gflop_per_second"] * 1e9 / limit,
    }


def bench_saved(path: Path, recipe: Recipe, *, repeats: int, steps: int) -> dict[str, Any]:
    """Measure the inference speed of a saved model, or of an ONNX file, on random images.

    Args:
        path: A model folder, a run folder (its winner) or an ONNX file.
        recipe: Device, precision and batch size.
        repeats: Number of measurements; the median is reported.
        steps: Steps in each measurement.
    """
    device = torch.device("cpu") if is_onnx(path) else choose_device(recipe.device)
    precision = Precision.choose("fp32" if is_onnx(path) else recipe.train.precision, device)
    classifier, card = load_classifier(model_folder(path), device)
    accelerate(classifier, recipe.speed, device).eval()
    side = card.side
    view = torch.rand(recipe.train.batch_size, card.channels, side, side, device=device)
    return {
        "machine": describe_machine(precision),
        "model": {"name": path.name},
        "image_px": side,
        **_speed(classifier, view, precision, repeats, steps),
    }


def bench_catalogue(recipe: Recipe, *, table: str, repeats: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the speed of each model of a table at its own resolution, or a ``problem`` if it does not fit in memory.

    Args:
        recipe: Device, precision and batch size.
        table: ``paper`` for the models with a published speed, ``zoo`` for the whole catalogue.
        repeats: Number of measurements; the median is reported.
        steps: Steps in each measurement.
    """
    precision = Precision.of(recipe)
    mean, std = IMAGENET_NORMALISATION
    for model in CATALOGUE:
        if table == "paper" and model.images_per_second is None:
            continue
        entry = {
            "row": model.row, "image_px": model.image_px, "published_images_per_second": model.images_per_second
        }  # fmt: skip
        try:
            classifier = Classifier(model.build(), mean=mean, std=std)
            accelerate(classifier, recipe.speed, precision.device).eval()
            measured = _time_model(classifier, model.image_px, recipe.train.batch_size, precision, repeats, steps)
            yield entry | measured
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            yield entry | {"problem": f"does not fit in memory at batch {recipe.train.batch_size}"}
        gc.collect()
        if precision.device.type == "cuda":
            torch.cuda.empty_cache()


def _time_model(
    classifier: Classifier, side: int, batch_size: int, precision: Precision, repeats: int, steps: int
) -> dict[str, Any]:
    view = torch.rand(batch_size, classifier.mean.shape[1], side, side, device=precision.device)
    speed = _speed(classifier, view, precision, repeats, steps)
    flops = count_flops(classifier.model, (view.shape[1], side, side), backward=False)
    return {
        **speed,
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "gflop_per_image": flops / 1e9,
        "gflop_per_second": flops * speed["images_per_second"] / 1e9,
    }


def _speed(classifier: Classifier, view: Tensor, precision: Precision, repeats: int, steps: int) -> dict[str, Any]:
    device, batch_size = precision.device, len(view)

    @torch.inference_mode()
    def classify() -> None:
        with precision.autocast():
            classifier(view)

    taken = time_in_turn({"classify": classify}, device=device, repeats=repeats, calls=steps, warm_up=2)["classify"]
    return {
        "batch_size": batch_size,
        "images_per_second": batch_size / taken.median,
        "images_per_second_range": [batch_size / taken.slowest, batch_size / taken.fastest],
    }


def catalogue_rows() -> list[dict[str, Any]]:
    """Return every model of the catalogue as plain values, with counted parameters and operations.

    A multiply-add counts as one, of matrix products, convolutions and attention, for one image. Students' last block
    leaves the patches out (see ``DeiT``), so they have fewer than is usually stated.
    """
    rows = []
    for model in CATALOGUE:
        with torch.device("meta"):
            built = model.build().eval()
        flops = count_flops(built, (3, model.image_px, model.image_px), backward=False)
        rows.append(
            {
                "model": model.row,
                "image_px": model.image_px,
                "parameters": sum(parameter.numel() for parameter in built.parameters()),
                "published_parameters": model.millions and f"{model.millions} M",
                "multiply_adds": flops // 2,
                "published_top1": model.top1,
                "published_images_per_second": model.images_per_second,
                "sources": {name: SOURCES[name] for name in model.sources},
                "recipe": model.recipe_fields(),
                "teacher": model.teacher,
            }
        )
    return rows
