"""The public Python API: what the command line does, as functions that return objects.

    import deitkit

    result = deitkit.compare("own-images", data="folder:photos", train={"epochs": 40})
    print(result)
    result.winner.predict("x.jpg")

Mistakes raise ``deitkit.errors.DeitkitError``, with the sentence that the command line prints.
"""

import json
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from deitkit.cli.console import as_text, console
from deitkit.cli.progress import Terminal
from deitkit.cli.signals import Forwarding
from deitkit.comparison.finetune import start_from
from deitkit.comparison.run import run_recipe
from deitkit.data import dataset
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import METHODS, Method, find_method
from deitkit.errors import DataError, RecipeError, reason_of
from deitkit.evaluation.apply import Evaluation, evaluate_model
from deitkit.evaluation.classify import BATCH_SIZE, Classification, Prediction, classify_pixels, decode_for, forks
from deitkit.models.accelerate import compiler_settings_kept
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.registered import register_model
from deitkit.models.saved import load_classifier, model_folder, read_card
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.load import load_recipe as read_recipe
from deitkit.recipe.schema import Recipe
from deitkit.recipe.section import from_home
from deitkit.report.table import rich_table
from deitkit.run.folder import choose_run_folder, locked
from deitkit.run.observer import Watcher
from deitkit.run.results import Results, Row
from deitkit.system.device import choose_device

__all__ = [
    "METHODS", "Comparison", "Model", "compare", "finetune", "load_dataset", "load_model", "load_recipe",
    "register_model", "train",
]  # fmt: skip


_TRAINING = threading.Lock()


class Model:
    """A trained classifier in its folder: a student, a teacher, or the winner of a run.

    Attributes:
        folder: Holds ``model.safetensors`` and ``model.json``.
        card: What ``model.json`` records: ``class_names``, ``mean``, ``std``, ``input_px``, ...
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # the working directory may change
        self.card = read_card(self.folder)

    def __repr__(self) -> str:
        return f"<deitkit model {self.folder}: {self.card.parameters:,} parameters, {len(self.class_names)} classes>"

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the logits."""
        return list(self.card.class_names)

    def predict(
        self,
        images: str | Path | Image.Image | Iterable[str | Path | Image.Image],
        *,
        top: int = 3,
        readout: str | None = None,
    ) -> list[Prediction]:
        """Classify image files, all images in a folder and its subfolders, or images of Pillow.

        Args:
            images: A file, a folder, an image, or several of them.
            top: How many classes to return for each image.
            readout: ``class``, ``distillation``, ``joint`` or ``joint-logits``; by default the one that it won by.

        Returns:
            For each image ``image``, ``readout`` and ``classes``: names with probabilities, the likeliest first, in the
            order of the images; one that is named twice is in it twice. A file that cannot be decoded has no classes,
            and ``error`` (a DataError if none can); an image of Pillow is named by its place. From 256 files on, forked
            processes decode them; where Python starts processes otherwise, each would run the caller's script again.
        """
        several = list(images) if isinstance(images, Iterable) and not isinstance(images, str) else [images]
        if not several:
            raise DataError("images is empty: give at least one file, folder or image of Pillow")
        given = [_image(image, self.card) for image in several]
        paths = [image for image in given if isinstance(image, Path)]
        opened = [image for image in given if isinstance(image, Tensor)]
        classification = Classification(self._loaded, paths, readout=readout, top=top, workers=None if forks() else 0)
        found = dict(zip(classification.files, classification, strict=True)) if paths else {}
        of_opened = iter(
            answer
            for start in range(0, len(opened), BATCH_SIZE)
            for answer in classify_pixels(
                *self._loaded, classification.precision, opened[start : start + BATCH_SIZE], readout, top
            )
        )
        answers: list[Prediction] = []
        for place, image in enumerate(given):
            if isinstance(image, Path):
                answers += [found[file] for file in classification.named[image]]
            else:
                answers.append(Prediction(image=f"images[{place}]", **next(of_opened)))
        return answers

    @cached_property
    def _loaded(self) -> tuple[Classifier, ModelCard]:
        """The classifier, which stays in memory for the next call."""
        return load_classifier(self.folder, choose_device("auto"))

    def evaluate(self, data: str, *, root: str | Path | None = None, everything: bool = False) -> Evaluation:
        """Measure it on the test images of a data set, divided as for its training.

        Args:
            data: A named data set, ``folder:PATH``, ``csv:FILE`` or ``parquet:PATH``.
            root: Folder of named data sets.
            everything: Measure on all its images, such as new ones; these may be of some of the model's classes.

        Returns:
            ``model``, ``dataset``, ``n`` (test images), ``drawn_from`` (of how many, without a test split; else None),
            ``trained_on`` (the estimated share of these that it learned from, 0 to 1; None if its card does not tell),
            ``remarks`` (sentences) and ``readouts``, each with ``readout``, ``top1``, ``top1_ci95`` (Wilson's 95 %
            interval) and ``top5`` (None for at most five classes), as fractions.

        Raises:
            DataError: The data set is missing or malformed, or has other classes.
        """
        if not isinstance(data, str):
            raise DataError(
                f"data is of the type {type(data).__name__}: name a data set, as 'cifar10' or 'folder:PATH'"
            )
        given = None if root is None else _path("root", root)
        return evaluate_model(self.folder, data, given, everything=everything)


class Comparison:
    """A finished comparison.

    Attributes:
        folder: The run folder, with tables, curves, ``report.html`` and every student.
        results: All that ``results.json`` holds.
    """

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder = folder.absolute()
        self.results = results

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the table: a method and a readout each, such as ``row.method``, ``row.top1_mean``."""
        return self.results.rows

    @property
    def advice(self) -> str:
        """Whether the winner should replace the CNN; empty where there is none."""
        return self.results.advice

    @property
    def verdict(self) -> str:
        """Which student wins and by how much, in a sentence or two."""
        return self.results.verdict

    @cached_property
    def winner(self) -> Model | None:
        """The winning student; None where none reached its end, and of an ablation, which has no winner."""
        return Model(self.folder / "winner") if self.results.winner is not None else None

    def __str__(self) -> str:
        return as_text(rich_table(self.results))

    def __repr__(self) -> str:
        return f"<deitkit comparison {self.folder}: {self.verdict}>"

    def _repr_markdown_(self) -> str:
        return (self.folder / "table.md").read_text(encoding="utf-8")


def load_recipe(source: str | Path | Recipe | None = None, **fields: Any) -> Recipe:
    """Return a recipe: a shipped one by name, a YAML file, or the defaults; with fields changed.

    Args:
        source: A name, a path or a recipe.
        fields: By name: ``epochs`` of ``train`` is ``train={"epochs": 40}``, or ``**{"train.epochs": 40}``; a section
            that has a name takes it alone, ``data="cifar10"``.

    Raises:
        RecipeError: All mistakes in it, in one sentence.
    """
    named = source if source is None or isinstance(source, Recipe) else str(source)
    return read_recipe(named, list(_overrides(fields)))


def _overrides(fields: dict[str, Any]) -> Iterator[str]:
    """Yield fields as the command line takes them, ``key=value``; JSON is YAML."""
    for key, value in fields.items():
        if isinstance(value, dict) and key != "variants" and (value or key != "baseline"):  # one with all its defaults
            yield from _overrides({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            yield f"{key}={json.dumps(value, default=_plain)}"


def _plain(value: Any) -> Any:
    """Return what JSON has for a value that it does not know: a range or an array is a list, a method its name."""
    if isinstance(value, Method):
        return find_method(value).name
    if isinstance(value, torch.nn.Module):
        raise RecipeError(
            f"a {type(value).__name__} of torch is not a value of a recipe: save its state_dict() with safetensors, "
            "and name its architecture and the file, as teacher={'name': 'timm/resnet18', 'checkpoint': 'FILE'}"
        )
    if hasattr(value, "tolist"):  # of NumPy and PyTorch
        return value.tolist()
    return list(value) if isinstance(value, Collection) else str(value)


def _path(argument: str, value: Any) -> Path:
    """Return a path as the user gave it; raise RecipeError if it is something else."""
    if isinstance(value, str | PathLike):
        return from_home(Path(value))
    raise RecipeError(f"{argument}: {type(value).__name__} is not a path: name a file or folder, as text or a Path")


def _image(image: Any, card: ModelCard) -> Path | UInt8[Tensor, "channels height width"]:
    """Return the path of an image, or the pixels of one of Pillow as a model takes them.

    Raises:
        DataError: It is neither, or has pixels that no model takes.
    """
    if isinstance(image, str | PathLike):
        return from_home(Path(image))
    if not isinstance(image, Image.Image):
        raise DataError(
            f"images: {type(image).__name__} is neither a path nor an image of Pillow: give one of these, or several"
        )
    try:
        return torch.from_numpy(decode_for(card, image).copy())
    except Exception as error:  # Pillow raises many types for one of another mode, empty, or closed
        raise DataError(
            f"images: an image of Pillow cannot be read ({reason_of(error)}): convert it to RGB, or leave it out"
        ) from None


def load_dataset(name: str, **fields: Any) -> Dataset:
    """Return a data set, divided and decoded: ``load_dataset("folder:photos", image_px=64)``.

    Args:
        name: A named data set, ``folder:PATH``, ``csv:FILE`` or ``parquet:PATH``.
        fields: Of the recipe's section ``data``.

    Raises:
        DataError: The data set is missing or malformed.
        RecipeError: A field is unknown or has a wrong value.
    """
    return dataset.load_dataset(load_recipe(data={"name": name, **fields}).data)


def load_model(path: str | Path) -> Model:
    """Return a trained model: from its folder, or the winner of a run folder."""
    return Model(model_folder(_path("path", path)))


def compare(
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | Watcher = True,
    **fields: Any,
) -> Comparison:
    """Train students under every method of a recipe, side by side, and return the table and the winner.

    Args:
        recipe: A shipped recipe by name, a YAML file, or a recipe.
        out: The run folder; by default a new one under ``runs/``.
        resume: Continue the run in ``out``, or train the methods and seeds that it lacks.
        progress: Show bars, or lines where the output is a file. Or a watcher, which is told what happens instead, such
            as a subclass of ``deitkit.run.observer.Watcher``. Ctrl-C saves before it stops.
        fields: Of the recipe to change, as for ``load_recipe``.

    Raises:
        DeitkitError: A mistake in the recipe, the data, a checkpoint or a teacher.
        Interrupted: Ctrl-C; ``resume=True`` continues.
    """
    return _run(_named_recipe(recipe, fields), out, resume, progress)


def train(
    recipe: str | Path | Recipe,
    method: str | Method = "token-hard",
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | Watcher = True,
    **fields: Any,
) -> Comparison:
    """Train one student under one method of a recipe: a comparison of one row.

    Args:
        recipe: As for ``compare``, without its methods and its baseline.
        method: A name (see ``deitkit methods``), or a method of one's own that is in ``METHODS``.
        out: As for ``compare``.
        resume: As for ``compare``.
        progress: As for ``compare``.
        fields: As for ``compare``, but ``methods`` and ``baseline``.

    Raises:
        DeitkitError: As for ``compare``; or a field that only a comparison has.
        Interrupted: Ctrl-C; ``resume=True`` continues.
    """
    name = find_method(method if isinstance(method, Method) else str(method)).name
    several = [key for key in fields if key.partition(".")[0] in ("methods", "baseline")]
    if several:
        raise RecipeError(f"{several[0]}: train has one student, under its method; use compare for more")
    chosen = _named_recipe(recipe, fields | {"methods": [name], "baseline": None})
    return _run(chosen, out, resume, progress)


def finetune(
    checkpoint: str | Path,
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | Watcher = True,
    **fields: Any,
) -> Comparison:
    """Fine-tune a trained student at a higher resolution or on other data, with and without a teacher.

    Args:
        checkpoint: A run folder (its winner), a model folder, or a weights file.
        recipe: As for ``compare``; what it leaves open of the architecture is the checkpoint's.
        out: As for ``compare``.
        resume: As for ``compare``.
        progress: As for ``compare``.
        fields: As for ``compare``.

    Raises:
        DeitkitError: As for ``compare``; or the checkpoint does not fit the recipe, or has seen the test images.
        Interrupted: Ctrl-C; ``resume=True`` continues.
    """
    chosen = _named_recipe(recipe, fields)
    return _run(start_from(chosen, _path("checkpoint", checkpoint)), out, resume, progress)


def _named_recipe(recipe: str | Path | Recipe, fields: dict[str, Any]) -> Recipe:
    """Return a recipe to train; raise RecipeError for None, which a variable may be by mistake."""
    if recipe is None:
        raise RecipeError("recipe is None: name a shipped recipe (see `deitkit recipes`) or a YAML file")
    if not isinstance(recipe, str | Path | Recipe):
        raise RecipeError(
            f"recipe is of the type {type(recipe).__name__}: name a shipped recipe or a YAML file, and give fields as "
            "arguments, as in compare('digits', **{'train.epochs': 5})"
        )
    return load_recipe(recipe, **fields)


def _run(recipe: Recipe, out: str | Path | None, resume: bool, progress: bool | Watcher) -> Comparison:
    recipe = resolved(recipe)
    # torch's global generator, which belongs to all threads, draws weights and dropout; the caller's own draws go on as
    # they would have.
    with (
        _TRAINING,
        torch.random.fork_rng(range(torch.cuda.device_count())),
        compiler_settings_kept(),
        _watching(progress) as watcher,
    ):
        folder = choose_run_folder(None if out is None else _path("out", out), recipe, resume)
        with locked(folder):
            return Comparison(folder, run_recipe(recipe, folder, watcher=watcher, resume=resume))


@contextmanager
def _watching(progress: bool | Watcher) -> Iterator[Watcher]:
    """Return the watcher of a run, which handles Ctrl-C; only the main thread of a process may handle signals."""
    shown = progress if isinstance(progress, Watcher) else Watcher()
    if threading.current_thread() is not threading.main_thread():
        yield shown
        return
    with Terminal(console) if progress and shown is not progress else Forwarding(shown) as watcher:
        yield watcher
