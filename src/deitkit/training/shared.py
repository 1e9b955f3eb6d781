"""Sharing a training among the processes of a run: when they can, and what the first tells the others."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

from deitkit.errors import RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.system.ranks import ALONE, Ranks, current_ranks
from deitkit.training.cohort import can_be_shared
from deitkit.training.student import Student


class SharedTraining(BaseModel):
    """The training that a process is to help with, as a message.

    Attributes:
        recipe: Of the comparison; of several teachers with this one alone.
        folder: The run folder, or that of the teacher; on a disk that all processes see.
        seed: Of the students; None for a teacher.
        names: Of the students.
    """

    recipe: Recipe
    folder: Path
    seed: int | None
    names: list[str] = []


def ranks_that_share(
    students: Sequence[Student], sizes: Mapping[str, int], device: torch.device, say: Callable[[str], None]
) -> Ranks:
    """Return the processes that train some students together: all of the run, or this one alone, and say so.

    Args:
        students: Of a cohort.
        sizes: Images of a step, by the fields of the recipe that set their numbers.
        device: Of the students.
        say: Receives how a step is shared, where there are several processes.

    Raises:
        RecipeError: A step has too few images for every process.
    """
    ranks = current_ranks()
    if ranks.count == 1:
        return ALONE
    names = ", ".join(student.name for student in students)
    if not can_be_shared(students, device):
        say(f"{names}: BatchNorm is taken over whole batches, so on a CPU one process of {ranks.count} trains alone")
        return ALONE
    for field, size in sizes.items():
        if size < 2 * ranks.count:
            raise RecipeError(
                f"{field}={size} is too small for {ranks.count} processes, each of which takes two images or more: "
                f"set at least {2 * ranks.count}, or start fewer"
            )
    say(f"{names}: {ranks.count} processes share every batch of {sum(sizes.values())} images")
    return ranks
