"""What a run began with beyond its recipe: machine, images, initial weights, and the user's code."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deitkit import __version__
from deitkit.comparison.images import describe_images
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import SIGNALS, find_method, is_shipped
from deitkit.errors import CheckpointError
from deitkit.models.registered import OWN, build_function
from deitkit.models.weights.initialise import weights_file
from deitkit.models.weights.pretrained import initial_weights_path
from deitkit.models.weights.read import file_sha256
from deitkit.models.zoo import create_classifier
from deitkit.recipe.schema import DistillationRecipe, Recipe
from deitkit.run.folder import read_environment
from deitkit.run.provenance import code_sha256
from deitkit.system.device import Precision, describe_machine
from deitkit.system.files import write_json
from deitkit.system.ranks import current_ranks

LIBRARIES = ("torch", "torchvision", "timm", "deitkit")  # whose code belongs to a version, not to a user


def machine_of(precision: Precision) -> dict[str, Any]:
    """Return all of the machine that decides figures to the bit."""
    count = current_ranks().count  # several predict other parts of the images at once than one, and so may round
    return describe_machine(precision) | ({"processes": count} if count > 1 else {})


def write_environment(recipe: Recipe, dataset: Dataset, folder: Path, precision: Precision) -> None:
    """Write ``environment.json`` into a run folder; what it held of the user's code and of weights stays."""
    before = read_environment(folder).get("ingredients", {})
    ingredients = before | _of_teachers(recipe, dataset) | _of_students(recipe, dataset) | _initial(recipe)
    images = {"streamed": dataset.streamed, **describe_images(dataset)}
    _write(folder, precision, **images, ingredients=ingredients)


def write_environment_of_teachers(recipe: Recipe, dataset: Dataset, folder: Path, precision: Precision) -> None:
    """Write ``environment.json`` of a run that only trains teachers, on the images with labels."""
    all_images = describe_images(dataset)["all_images"]
    ingredients = _of_teachers(recipe, dataset)
    _write(folder, precision, streamed=dataset.streamed, all_images=all_images, ingredients=ingredients)


def _write(folder: Path, precision: Precision, **more: Any) -> None:
    environment = machine_of(precision) | {"deitkit": __version__, "code": code_sha256()} | more
    write_json(folder / "environment.json", environment)


def require_same_teachers(recipe: Recipe, dataset: Dataset, folder: Path) -> None:
    """Raise CheckpointError if a run folder began with another version of an architecture of its teachers."""
    _require_same(_of_teachers(recipe, dataset), folder)


def require_same_code(recipe: Recipe, dataset: Dataset, folder: Path) -> None:
    """Raise CheckpointError if a run folder began with another version of an architecture or a method of the user's."""
    _require_same(_of_teachers(recipe, dataset) | _of_students(recipe, dataset), folder)


def require_same_ingredients(recipe: Recipe, dataset: Dataset, *folders: Path) -> None:
    """Raise CheckpointError if a run folder began with other initial weights, or another version of the user's code."""
    ingredients = _of_teachers(recipe, dataset) | _of_students(recipe, dataset) | _initial(recipe)
    for folder in folders:
        _require_same(ingredients, folder)


def _require_same(ingredients: dict[str, str], folder: Path) -> None:
    before = read_environment(folder).get("ingredients", {})
    for name, sha256 in ingredients.items():
        if before.get(name, sha256) != sha256:
            raise CheckpointError(
                f"{folder} was begun with another version of {name} than is here now, and rows are compared on equal "
                "terms: restore it, or name a new folder"
            )


def _initial(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of the students' initial weights; empty for random ones."""
    start, checkpoint = (
        initial_weights_path(recipe.model),
        None if recipe.baseline is None else recipe.baseline.checkpoint,
    )
    found = {} if start is None else {"the initial weights": file_sha256(weights_file(start))}
    return found | ({} if checkpoint is None else {"the weights of the baseline": file_sha256(checkpoint)})


def _of_teachers(recipe: Recipe, dataset: Dataset) -> dict[str, str]:
    """Return a SHA-256 of each registered architecture of a teacher."""
    return _of_architectures([teacher.name for teacher in recipe.all_teachers], dataset)


def _of_students(recipe: Recipe, dataset: Dataset) -> dict[str, str]:
    """Return a SHA-256 of each method of the user's, and of a registered baseline."""
    found = _of_architectures([] if recipe.baseline is None else [recipe.baseline.name], dataset)
    for name in recipe.methods:
        method = find_method(name)
        if not is_shipped(method):
            settings = DistillationRecipe()  # the recipe's own are compared elsewhere
            terms = [(term.head, term.signal, term.weight(settings)) for term in method.terms]
            losses = [_source(SIGNALS[term.signal].loss) for term in method.terms]
            found[f"the method {name}"] = _sha256(json.dumps([method.tokens, terms]), *losses)
    return found


def _of_architectures(names: Sequence[str], dataset: Dataset) -> dict[str, str]:
    return {name: _sha256(*_sources(name, dataset)) for name in names if name.startswith(OWN)}


def _sources(name: str, dataset: Dataset) -> Iterator[str]:
    """Yield the code of a registered architecture: of its function, and of every class of the user's in it."""
    with torch.random.fork_rng(devices=[]):
        model = create_classifier(name, classes=dataset.classes, channels=dataset.channels).model
    kinds = dict.fromkeys(type(module) for module in model.modules())
    yield _source(build_function(name.removeprefix(OWN)))
    yield from (_source(kind) for kind in kinds if kind.__module__.partition(".")[0] not in LIBRARIES)


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # of a notebook's class, or of an object that can be called
        return ""


def _sha256(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
