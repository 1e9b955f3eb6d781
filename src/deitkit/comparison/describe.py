"""What is said of a comparison before anything trains: its images, what was left out, and its students."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import copies_in_validation
from deitkit.models.accelerate import lacks_compiler
from deitkit.models.vit import size_in_words
from deitkit.recipe.schema import Recipe
from deitkit.run.layout import seed_of
from deitkit.system.device import Precision
from deitkit.system.words import counted
from deitkit.training.build import needs_teacher
from deitkit.training.optim import peak_learning_rate

MOST_PATCHES, USUAL_PATCHES = 600, 256  # of an image: 576 at 384 px, 196 at 224 px in the paper
DARK = 0.125  # of 1: 12 bits in files of 16 reach 0.063


def describe_device(recipe: Recipe, precision: Precision) -> Iterator[str]:
    """Yield the device with the precision, and what it lacks to be faster."""
    yield f"device {precision.device}, precision {precision.name}"
    missing = lacks_compiler(precision.device)
    if precision.device.type == "cuda" and recipe.speed.compile == "auto" and missing is not None:
        yield f"students train without compiled blocks, which are faster but need {missing}"


def describe_data(dataset: Dataset) -> Iterator[str]:
    """Yield the splits and their classes, what was assumed or left out, and duplicates across splits."""
    counts = dataset.train.labels.bincount(minlength=dataset.classes)
    fewest, most = int(counts.argmin()), int(counts.argmax())
    classes = f"{counted(dataset.classes, 'class')} of {counted(int(counts[fewest]), 'training image')}"
    if int(counts[fewest]) != int(counts[most]):
        names = dataset.class_names[fewest], dataset.class_names[most]
        classes = (
            f"{dataset.classes} classes of {int(counts[fewest]):,} ('{names[0]}') to {int(counts[most]):,} "
            f"('{names[1]}') training images"
        )
    yield (
        f"data {dataset.name}: {len(dataset.train):,} training, {len(dataset.validation):,} validation, "
        f"{len(dataset.test):,} test images of {dataset.image_px[0]} x {dataset.image_px[1]} px; {classes}"
    )
    if dataset.unlabelled is not None:
        yield f"{counted(len(dataset.unlabelled), 'image')} without labels, for the teacher to label"
    yield from dataset.remarks
    if dataset.skipped:
        files = counted(len(dataset.skipped), "file")
        yield f"left out: {files} that cannot be decoded, first {dataset.skipped[0]}"
    if all(mean + 3 * deviation < DARK for mean, deviation in zip(dataset.mean, dataset.std, strict=True)):
        yield (
            f"the training images are nearly black (mean {max(dataset.mean):.2g} of 1): if their files have 16 or 32 "
            "bits and use a part of them, scale them to the whole range, since they become 8 bits"
        )
    for duplicates in (dataset.duplicates, dataset.near_duplicates):
        if duplicates.count:
            yield duplicates.sentence()
    yield from copies_in_validation(dataset.train.hashes, dataset.validation.hashes, dataset.test.hashes)


def seeds_left_out(folder: Path, recipe: Recipe) -> Iterator[str]:
    """Yield a line if a run folder holds students of seeds that the recipe does not name, as without ``--seeds``."""
    begun = sorted(seed_of(home) for home in folder.glob("seed-*") if re.fullmatch(r"seed-\d+", home.name))
    missing = [str(seed) for seed in begun if seed not in recipe.seeds]
    if missing:
        seeds = f"seed {missing[0]} is" if len(missing) == 1 else f"seeds {', '.join(missing)} are"
        yield (
            f"{seeds} not in the recipe: left out of the table, and the folders kept; name them with --seeds or "
            "seeds=[...] to include them"
        )


def describe_students(recipe: Recipe, dataset: Dataset, parameters: Mapping[str, int]) -> Iterator[str]:
    """Yield the students' architecture and steps, and a learning rate that follows from the batch size.

    Args:
        recipe: Of the comparison.
        dataset: Its training images.
        parameters: Of each student, by name.
    """
    yield from _crops(recipe, dataset)
    model, train = recipe.model, recipe.train
    counts = sorted({f"{count / 1e6:.2f}" for name, count in parameters.items() if name in recipe.methods})
    steps = train.steps_per_epoch(len(dataset.train))
    yield (
        f"students: {size_in_words(model)}, patches of {model.patch_px} px, {' or '.join(counts)} M parameters; "
        f"{counted(train.epochs, 'epoch')} of {counted(steps, 'step')}"
    )
    yield from _many_patches(model.patch_px, *dataset.image_px)
    if dataset.unlabelled is not None and not (recipe.unlabelled_in_step and needs_teacher(recipe)):
        yield "the images without labels are not used: no method has a teacher, or their weight is 0"
    elif dataset.unlabelled is not None:
        count = dataset.unlabelled_in_step(recipe.unlabelled_in_step)
        yield f"a step has {train.batch_size} images with labels and {count} without"
    if train.learning_rate_per is not None:
        yield (
            f"learning rate {peak_learning_rate(train, train):g}: {train.learning_rate:g} for "
            f"{train.learning_rate_per} images, {train.batch_size} in a step"
        )


def _many_patches(patch_px: int, height: int, width: int) -> Iterator[str]:
    """Yield a line if images have more patches than any recipe of the paper, with a size that makes usual numbers."""
    sizes = (px for px in range(patch_px, min(height, width)) if not (height % px or width % px))
    counts = {px: height // px * (width // px) for px in sizes}
    usual = next((px for px, count in counts.items() if count <= USUAL_PATCHES), None)
    if counts.get(patch_px, 0) > MOST_PATCHES and usual is not None:
        yield (
            f"{counts[patch_px]:,} patches of {patch_px} px for each image make training slow: model.patch_px={usual} "
            f"makes {counts[usual]}"
        )


def _crops(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield what random crops are cut from, and whether most files are smaller than the students' images."""
    source = dataset.train.crop_source
    if source is None or dataset.train.scale_of_crops(recipe.augment) is None:
        return
    kept = "" if source.images is None else f"copies of {source.images.shape[2]} x {source.images.shape[3]} px"
    yield f"random-resized crops are cut from {kept or 'the files'}"
    median = int(source.sizes.min(dim=1).values.median())
    if recipe.data.image_px is not None and median < recipe.data.image_px:
        yield (
            f"most training images are smaller than data.image_px={recipe.data.image_px} (median of the shorter side "
            f"{median} px): enlarging shows nothing more; a smaller data.image_px trains faster"
        )
