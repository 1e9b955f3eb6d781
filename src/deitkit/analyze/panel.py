"""Who is asked under a seed, and the one pass over the test images in which all of them answer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from deitkit.analyze.tokens import recorded_similarity
from deitkit.checkpoint import load_classifier
from deitkit.data.sources import Dataset
from deitkit.data.split import Split
from deitkit.device import Precision
from deitkit.errors import CheckpointError
from deitkit.evaluate import predict_all
from deitkit.models.classifier import Classifier
from deitkit.models.vit import TOKENS, DeiT, Output
from deitkit.recipe import Recipe, SpeedRecipe
from deitkit.runs import Watcher
from deitkit.speed import accelerate
from deitkit.teachers import prepare_teachers, teacher_folders


@dataclass(frozen=True)
class Told(Split):
    """A split that tells how many of its images have been asked for."""

    tell: Callable[[int], None]

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Yield all images in order, so many at a time."""
        done = 0
        for images in super().batches(size):
            yield images
            done += len(images)
            self.tell(done)


def teachers_of(
    folder: Path, recipe: Recipe, dataset: Dataset, precision: Precision, watcher: Watcher
) -> list[Classifier]:
    """Load the teachers of a run, as they taught.

    Raises:
        CheckpointError: One of them is not in the run folder.
    """
    for home in teacher_folders(recipe, folder / "teacher"):
        if not (home / "card.json").exists():
            raise CheckpointError(f"{home} holds no card.json: copy the teacher's folder back into its run")
    teachers, _ = prepare_teachers(recipe, dataset, folder=folder / "teacher", precision=precision, watcher=watcher)
    return teachers.classifiers


def students_of(folder: Path, results: dict[str, Any], seed: int) -> dict[str, Path]:
    """Return the folders of the students that reached the end of their training under a seed; ``+ema`` for averages.

    A row whose model the run does not hold, such as that of a model before it was fine-tuned, has none.

    Args:
        folder: Of the run.
        results: Its ``results.json``.
        seed: Of the run.
    """
    place = results["seeds"].index(seed)
    homes = {student_name(row): folder / f"seed-{seed}" / student_name(row) for row in results["rows"]}
    stopped = {student_name(row) for row in results["rows"] if row["top1"][place:] and row["top1"][place] is None}
    return {name: home for name, home in homes.items() if name not in stopped and (home / "model.json").exists()}


def load_as_trained(folder: Path, speed: SpeedRecipe, device: torch.device) -> Classifier:
    """Load a classifier with the kernels that it was measured with, so that it decides as in the table.

    Only compiled it is not: compiled blocks would not call the hooks that look into them.
    """
    return accelerate(load_classifier(folder, device)[0], speed.model_copy(update={"compile": False}), device)


def student_name(row: dict[str, Any]) -> str:
    """Return the name of a row's student, which is that of its folder."""
    return f"{row['method']}+ema" if row["weights"] == "ema" else str(row["method"])


def has_both_tokens(classifier: Classifier) -> bool:
    """Return whether it is a student with a class and a distillation token."""
    return isinstance(classifier.model, DeiT) and classifier.model.config["tokens"] == list(TOKENS)


def ask(
    panel: Mapping[str, Classifier], split: Split, precision: Precision, tell: Callable[[int], None]
) -> tuple[dict[str, Output], dict[str, Float[Tensor, "layers n"]]]:
    """Ask every classifier about every image, each image decoded once.

    Args:
        panel: Classifiers by name.
        split: Images.
        precision: Of the forward passes.
        tell: Called with the number of images done, after every batch.

    Returns:
        The heads' logits by name; and, of those with both tokens, the cosine of the tokens by layer and image.
    """
    with ExitStack() as stack:
        meters = {
            name: stack.enter_context(recorded_similarity(classifier))
            for name, classifier in panel.items()
            if has_both_tokens(classifier)
        }
        outputs = predict_all(list(panel.values()), Told(split.images, split.labels, tell), precision)
    similarities = {
        name: torch.stack([torch.cat(batches).cpu() for batches in layers]) for name, layers in meters.items()
    }
    return dict(zip(panel, outputs, strict=True)), similarities
