"""Sharing a training among the processes of a run: when they can, and what the first tells the others."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

from deitkit.data.cache import sha256
from deitkit.data.dataset import Dataset, as_read
from deitkit.errors import DataError, RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.system.ranks import ALONE, Ranks, current_ranks
from deitkit.training.micro_batches import has_batch_norm
from deitkit.training.student import Student


class SharedTraining(BaseModel):
    """The training that a process is to help with, as a message.

    Attributes:
        recipe: Of the comparison; of several teachers with this one alone.
        folder: The run folder, or that of the teacher; on a disk that all processes see.
        seed: Of the students; None for a teacher.
        names: Of the students.
        images: ``images_hash`` of those on which the first process trains.
    """

    recipe: Recipe
    folder: Path
    seed: int | None
    names: list[str] = []
    images: str


def announce(
    ranks: Ranks, recipe: Recipe, dataset: Dataset, folder: Path, *, seed: int | None = None, names: Sequence[str] = ()
) -> None:
    """Tell the other processes which training begins, as the attributes of ``SharedTraining`` say.

    Raises:
        DataError: Another process does not see the same images, or the run folder.
    """
    if ranks.count == 1:
        return
    shared = recipe.model_copy(update={"data": as_read(recipe.data, dataset)})
    training = SharedTraining(
        recipe=shared, folder=folder.resolve(), seed=seed, names=list(names), images=images_hash(dataset)
    )
    ranks.broadcast(training.model_dump(mode="json"))
    refusal = ranks.agreed_refusal()
    if refusal:
        raise DataError(refusal)


def images_hash(dataset: Dataset) -> str:
    """Return a SHA-256 over the pixels and labels of all splits, the same however the images are read."""
    splits = (dataset.train, dataset.validation, dataset.test, dataset.unlabelled)
    there = [split for split in splits if split is not None]
    return sha256(*(split.hashes for split in there), *(split.labels.cpu() for split in there))


def require_parts(sizes: Mapping[str, int], device: torch.device) -> None:
    """Raise RecipeError if the processes of the run cannot share a step, before anything trains.

    Args:
        sizes: Images of a step, by the fields of the recipe that set their numbers.
        device: Of the step.
    """
    count = current_ranks().count
    if count > 1 and device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device={device.type} is for one process: {count} share CPUs or CUDA devices")
    for field, size in sizes.items():
        if count > 1 and size < 2 * count:
            raise RecipeError(
                f"{field}={size} is too small for {count} processes, each of which takes two images or more: set at "
                f"least {2 * count}, or start fewer"
            )


def can_be_shared(students: Sequence[Student], device: torch.device) -> bool:
    """Return whether processes can share the steps of students: BatchNorm needs a GPU to be taken over all of them."""
    return device.type == "cuda" or not any(has_batch_norm(student.classifier.model) for student in students)


def ranks_that_share(
    students: Sequence[Student], images: int, device: torch.device, say: Callable[[str], None]
) -> Ranks:
    """Return the processes that train some students together: all of the run, or this one alone, and say so.

    Args:
        students: Of a cohort.
        images: Of a step.
        device: Of the students.
        say: Receives how a step is shared, where there are several processes.
    """
    ranks = current_ranks()
    if ranks.count == 1:
        return ALONE
    names = ", ".join(student.name for student in students)
    if not can_be_shared(students, device):
        say(f"{names}: BatchNorm is taken over whole batches, so on a CPU one process of {ranks.count} trains alone")
        return ALONE
    say(f"{names}: {ranks.count} processes share every batch of {images} images")
    return ranks
