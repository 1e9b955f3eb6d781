"""The models that the page shows side by side, and what they say of an image. Nothing here knows of the page."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from deitkit.analyze.pictures import tinted
from deitkit.analyze.tokens import attention_maps, student_of
from deitkit.comparison.finished_run import students_of
from deitkit.data.dataset import load_test_examples
from deitkit.data.decode import SUFFIXES
from deitkit.errors import CheckpointError, DataError, DeitkitError
from deitkit.evaluation.classify import classify_pixels, decode_for
from deitkit.evaluation.seen_images import data_recipe_of, load_divided
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import DataRecipe
from deitkit.run.layout import teacher_folders
from deitkit.run.reported import default_readout
from deitkit.run.results import Results, Row, TeacherCard, read_results, require_single
from deitkit.system.device import Precision, choose_device
from deitkit.system.words import counted

MAP_PX = 240  # least side of a picture; a student's image may have 8 px


@dataclass(frozen=True)
class ShownModel:
    """A model with what its column says.

    Attributes:
        name: Unique on the page, such as ``winner: hard/class``.
        about: Its accuracy and cost, in a few words.
        classifier: In evaluation mode.
        card: Of the model.
        readout: Of its answers; None for that of its card, else the default one.
    """

    name: str
    about: str
    classifier: Classifier
    card: ModelCard
    readout: str | None = None

    @property
    def has_attention(self) -> bool:
        """Whether it has tokens whose attention can be drawn."""
        model = self.classifier.model
        return isinstance(model, DeiT) and bool(model.config["tokens"])

    def view(self, file: Path) -> UInt8[np.ndarray, "channels height width"]:
        """Decode an image as the model takes it.

        Raises:
            DataError: It cannot be decoded.
        """
        self.card.require_side()  # it is refused, and not the image
        try:
            return decode_for(self.card, file)
        except Exception:  # Pillow raises many types, with the name of a temporary file
            kinds = ", ".join(sorted(suffix.removeprefix(".") for suffix in SUFFIXES))
            raise DataError(
                f"This file is damaged, far too large or no image: use one of {kinds}, or save it as PNG"
            ) from None

    def answer(self, file: Path, precision: Precision) -> dict[str, float]:
        """Return the probability of each class; of classes of one name each with its number (ImageNet has two cranes).

        Raises:
            DataError: The image cannot be decoded.
        """
        counts = Counter(self.card.class_names)
        names = [name if counts[name] == 1 else f"{name} ({place})" for place, name in enumerate(self.card.class_names)]
        card = self.card.model_copy(update={"class_names": tuple(names)})
        pixels = [torch.from_numpy(self.view(file).copy())]
        (found,) = classify_pixels(self.classifier, card, precision, pixels, self.readout, len(names))
        return dict(found["classes"])

    def attention(self, file: Path) -> Iterator[tuple[Image.Image, str]]:
        """Yield what the student sees, then what each of its tokens attends to in it, with titles.

        Raises:
            DataError: The image cannot be decoded.
        """
        assert self.has_attention
        image = torch.from_numpy(self.view(file).copy()).float() / 255
        side = student_of(self.classifier).config["image_px"]
        yield _enlarged(image.expand(3, -1, -1).permute(1, 2, 0).numpy()), "what the student sees"
        if image.shape[-1] != side:
            image = torch.nn.functional.interpolate(image[None], (side, side), mode="bicubic").clamp(0, 1)[0]
        maps = attention_maps(self.classifier, image[None].to(self.classifier.mean.device))
        for title, attention in maps.items():
            yield _enlarged(tinted(image, attention)), title


def _enlarged(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray((255 * pixels).round().astype(np.uint8))
    times = max(1, -(-MAP_PX // image.width))
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Demo:
    """All that the page shows.

    Attributes:
        title: Of the page.
        summary: The run's advice and verdict; empty for a model without a run.
        models: The winner first, then the teachers, then the other students.
        precision: Of their forward passes.
        data: Where examples are from; None if that is unknown.
    """

    title: str
    summary: str
    models: Sequence[ShownModel]
    precision: Precision
    data: DataRecipe | None

    def examples(self, count: int, say: Callable[[str], None]) -> list[tuple[UInt8[np.ndarray, "height width 3"], str]]:
        """Return some test images with their classes; none, and a sentence, where the data cannot be read."""
        if not count:
            return []
        if self.data is None:
            say("no example images: the model's card names no data set; give one with --data")
            return []
        try:
            return load_divided(lambda data: load_test_examples(data, count), self.data)
        except DeitkitError as error:
            say(f"no example images: {error}")
            return []


def load_demo(path: Path, data: str | None = None, root: Path | None = None) -> Demo:
    """Load a run (its winner, teachers and other students) or a single model.

    Args:
        path: A run folder, a model folder, or an ONNX file of deitkit.
        data: Data set of the examples; by default that of the training.
        root: Folder of named data sets.

    Raises:
        CheckpointError: There is no model, or the run has no single winner.
    """
    device = choose_device("auto")
    precision = Precision.choose("auto", device)
    if not (path / "results.json").exists():
        classifier, card = load_classifier(path, device)
        shown = ShownModel(path.name or str(path), f"{card.parameters:,} parameters", classifier, card)
        named = data or card.dataset
        recipe = None if named is None else data_recipe_of(card, named, root)
        recipe = None if recipe is None else recipe.model_copy(update={"download": False})
        return Demo(shown.name, "", [shown], precision, recipe)
    results = read_results(path)
    require_single(results, path, "show")
    found = [*_of_run(path, results, device)]
    if not found:
        raise CheckpointError(f"{path} contains no student that finished its training: name another run")
    recipe = data_recipe_of(found[0].card, data, root) if data is not None else load_recipe(f"{path}/recipe.yaml").data
    recipe = recipe.model_copy(update={"root": root or recipe.root, "download": False})  # examples are not worth one
    summary = " ".join(filter(None, (results.advice, results.verdict)))
    return Demo(f"{results.recipe['name']}: {results.dataset.name}", summary, found, precision, recipe)


def _of_run(folder: Path, results: Results, device: torch.device) -> Iterator[ShownModel]:
    """Yield the models of a run that are in its folder; students that did not win by their default readout."""
    winner = results.row(results.winner)
    homes: dict[Path, tuple[str, Row | TeacherCard, str | None]] = {}
    if winner is not None:
        homes[folder / "winner"] = (f"winner: {winner.row}", winner, winner.readout)
    teachers = teacher_folders(folder, len(results.teachers))
    for number, (home, teacher) in enumerate(zip(teachers, results.teachers, strict=True), 1):
        title = "teacher" if len(results.teachers) == 1 else f"teacher {number}"
        homes[home] = (f"{title}: {teacher.name}", teacher, None)
    by_student: dict[str, list[Row]] = {}
    for row in results.rows:
        by_student.setdefault(row.folder_name, []).append(row)
    for student, home in students_of(folder, results, results.seeds[0]).items():
        if winner is None or student != winner.folder_name:
            rows = by_student[student]
            default = default_readout([row.readout for row in rows])
            row = next(row for row in rows if row.readout == default)
            homes[home] = (row.row, row, default)
    for home, (name, recorded, readout) in homes.items():
        if (home / "model.json").exists():
            classifier, card = load_classifier(home, device)
            yield ShownModel(name, _about(recorded, results, card.seed), classifier, card, readout)


def _about(recorded: Row | TeacherCard, results: Results, seed: int | None) -> str:
    """Describe a model by its label, its accuracy and its time: of a student the accuracy under its own seed."""
    label, of = "", ""
    if isinstance(recorded, TeacherCard):
        top1 = recorded.test_top1
    else:
        label, by_seed = recorded.label, dict(zip(results.seeds, recorded.top1, strict=False))
        top1 = None if seed is None else by_seed.get(seed)
        if top1 is None:
            top1, of = recorded.top1_mean, f" (mean of {counted(len(results.seeds), 'seed')})"
    accuracy = "" if top1 is None else f"{100 * top1:.1f} % of the test images right{of}"
    time = "" if recorded.cost is None else f"{recorded.cost.milliseconds:.1f} ms for an image"
    return ", ".join(filter(None, (label, accuracy, time)))
