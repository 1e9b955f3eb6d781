"""What each model of a run costs to use on this machine: its file, and its time for an image."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deitkit.comparison.finished_run import load_as_trained, students_of
from deitkit.errors import is_out_of_memory
from deitkit.evaluation.speed import seconds_per_batch
from deitkit.models.classifier import Classifier
from deitkit.models.saved import read_card
from deitkit.recipe.schema import Recipe
from deitkit.run.layout import teacher_folders
from deitkit.run.results import Cost, Results
from deitkit.system.device import Precision

BATCH_SIZES = (8, 32, 128)  # beside single images
LONGEST_SECONDS = 1.0  # of one batch, by the time for single images
REPEATS = 3


def add_costs(results: Results, recipe: Recipe, folder: Path, precision: Precision) -> Results:
    """Measure the teachers, the baseline and the students of a run in turn, and add the costs to cards and rows.

    Models of one architecture are measured once. Rows of one student share its cost; a student that finished under no
    seed has none.

    Args:
        results: Of the run.
        recipe: Of the run.
        folder: Of the run, with the weights of all models.
        precision: Of the device that is measured.
    """
    students = {
        name: home for seed in reversed(results.seeds) for name, home in students_of(folder, results, seed).items()
    }
    teachers = teacher_folders(folder, len(results.teachers))
    costs = measure_costs([*students.values(), *teachers], recipe, results, precision)
    cards = tuple(
        card.model_copy(update={"cost": costs[home]}) for card, home in zip(results.teachers, teachers, strict=True)
    )
    rows = tuple(
        row.model_copy(update={"cost": costs[students[row.folder_name]]}) if row.folder_name in students else row
        for row in results.rows
    )
    together = results.teacher
    if together is not None:
        together = together.model_copy(update={"cost": _sum([card.cost for card in cards if card.cost is not None])})
    return results.model_copy(update={"rows": rows, "teachers": cards, "teacher": together})


def measure_costs(homes: list[Path], recipe: Recipe, results: Results, precision: Precision) -> dict[Path, Cost]:
    """Return the cost of the model in each folder, by folder."""
    kinds = {home: _architecture(home) for home in homes}
    one_of_each = {kind: home for home, kind in reversed(kinds.items())}
    device = precision.device
    classifiers = {kind: load_as_trained(home, recipe.speed, device).eval() for kind, home in one_of_each.items()}
    shape = (results.dataset.channels, *results.dataset.image_px)
    seconds = _times(classifiers, shape, precision)
    return {home: _cost(home / "model.safetensors", seconds[kind]) for home, kind in kinds.items()}


def _architecture(home: Path) -> str:
    """Return all of a card that decides its model's speed."""
    card = read_card(home)
    fields = ("kind", "config", "architecture", "image_px", "channels", "only_readout")
    return json.dumps([getattr(card, name) for name in fields] + [len(card.class_names)])


def _times(
    classifiers: Mapping[str, Classifier], shape: tuple[int, ...], precision: Precision
) -> dict[str, dict[int, float]]:
    """Return each model's seconds for a batch, by the size of the batch."""
    single = seconds_per_batch(classifiers, _grey(1, shape, precision), precision, REPEATS)
    found = {kind: {1: seconds} for kind, seconds in single.items()}
    for size in BATCH_SIZES:
        quick = {kind: one for kind, one in classifiers.items() if size * single[kind] <= LONGEST_SECONDS}
        try:
            view = _grey(size, shape, precision)
            for kind, seconds in seconds_per_batch(quick, view, precision, REPEATS).items():
                found[kind][size] = seconds
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
    return found


def _grey(count: int, shape: tuple[int, ...], precision: Precision) -> Tensor:
    return torch.full((count, *shape), 0.5, device=precision.device)


def _cost(file: Path, seconds: Mapping[int, float]) -> Cost:
    per_image = {size: 1000 * taken / size for size, taken in seconds.items()}
    best = min(per_image, key=lambda size: per_image[size])
    return Cost(
        file_bytes=file.stat().st_size,
        milliseconds=per_image[1],
        batch_size=best,
        milliseconds_in_batch=per_image[best],
    )


def _sum(costs: list[Cost]) -> Cost:
    """Return the cost of several models that answer together."""
    return Cost(
        file_bytes=sum(cost.file_bytes for cost in costs),
        milliseconds=sum(cost.milliseconds for cost in costs),
        batch_size=costs[0].batch_size,
        milliseconds_in_batch=sum(cost.milliseconds_in_batch for cost in costs),
    )
