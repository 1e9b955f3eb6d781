"""The images on which a teacher trains."""

from pathlib import Path

from deitkit.data.dataset import Dataset, load_labelled
from deitkit.data.listing import ProgressCallback
from deitkit.errors import TeacherError
from deitkit.recipe.schema import Recipe, TeacherRecipe
from deitkit.system.files import write_text

STREAMED = "streamed.txt"  # whether its images are streamed, while it trains


def load_teacher_images(
    recipe: Recipe, dataset: Dataset, folder: Path | None = None, progress: ProgressCallback | None = None
) -> Dataset:
    """Return the images on which a recipe's teacher trains: those of the run, or more.

    Args:
        recipe: With one teacher.
        dataset: Of the run.
        folder: Of the teacher; it remembers whether the images were streamed, so that a resumed training cuts its
            crops from the same pixels, however much memory is free then. None if nothing trains.
        progress: Called while images are read.

    Raises:
        TeacherError: They are fewer than a batch.
    """
    if recipe.teacher.all_images and recipe.data.train_images is not None:
        every_image = recipe.data.model_copy(update={"train_images": None, "channels": dataset.channels})
        mark = None if folder is None else folder / STREAMED
        if every_image.streaming == "auto" and mark is not None and mark.exists():
            every_image = every_image.model_copy(update={"streaming": mark.read_text(encoding="utf-8") == "true"})
        dataset = load_labelled(every_image, progress, random_crops=recipe.has_random_crops)
        if mark is not None:
            write_text(mark, "true" if dataset.streamed else "false")
    require_batch(recipe.teacher, len(dataset.train))
    return dataset


def require_batch(recipe: TeacherRecipe, count: int) -> None:
    """Raise TeacherError if a step of a teacher's training has more images than there are."""
    size = recipe.train.batch_size
    if size > count:
        raise TeacherError(f"teacher.train.batch_size={size} exceeds the {count} training images: use at most {count}")
