"""Contradictions between fields of a recipe that are each valid; ``schema`` refuses a recipe that has any."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deitkit.recipe.schema import AugmentRecipe, Recipe, TeacherRecipe, TrainRecipe

BASE = "base"  # name of the recipe itself among its variants
VARIANT_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,63}")


def contradictions(recipe: "Recipe") -> Iterator[str]:
    """Yield contradictions between fields that are each valid."""
    yield from _repetitions(recipe)
    yield from _data(recipe)
    yield from _train_px(recipe)
    yield from _folds(recipe)
    if recipe.model.pretrained is not None and recipe.model.checkpoint is not None:
        yield "model.pretrained and model.checkpoint exclude each other: give one"
    schedule = recipe.train.schedule_epochs
    if schedule is not None and schedule < recipe.train.epochs:
        yield f"train.schedule_epochs={schedule} is less than train.epochs={recipe.train.epochs}: raise it or drop it"
    if recipe.teachers and recipe.teacher != type(recipe.teacher)():
        yield "teacher and teachers exclude each other: list every teacher in teachers"
    teachers = recipe.named_teachers
    for name, teacher in teachers.items():
        yield from _teacher(name, teacher)
    models = teachers | ({} if recipe.baseline is None else {"baseline": recipe.baseline})
    for name, model in models.items():
        if model.pretrained and model.checkpoint is not None:
            yield f"{name}.pretrained and {name}.checkpoint exclude each other: give one"
    augments = {"augment": recipe.augment} | {f"{name}.augment": one.augment for name, one in teachers.items()}
    for name, augment in augments.items():
        yield from _policies(name, augment)
    trainings = {"train": recipe.train} | {f"{name}.train": one.train for name, one in teachers.items()}
    for name, training in trainings.items():
        yield from _training(name, training)
        if recipe.data.sampling == "balanced" and training.class_weight == "balanced":
            yield (
                f"data.sampling=balanced and {name}.class_weight=balanced together count rare classes twice: keep one"
            )
    baseline, epochs = recipe.baseline, recipe.train.epochs
    if baseline is not None and baseline.warmup_epochs > epochs:
        yield f"baseline.warmup_epochs={baseline.warmup_epochs:g} exceeds train.epochs={epochs}: lower it"
    for name in recipe.variants:
        if not VARIANT_NAME.fullmatch(name) or name == BASE:
            yield (f"variants: '{name}' names a folder: use lower-case letters, digits, - and _, and not '{BASE}'")


def _repetitions(recipe: "Recipe") -> Iterator[str]:
    if len(set(recipe.seeds)) != len(recipe.seeds):
        yield f"seeds={list(recipe.seeds)} contains a seed twice: give each once"
    if len(set(recipe.methods)) != len(recipe.methods):
        yield f"methods={list(recipe.methods)} contains a method twice: give each once"


def _data(recipe: "Recipe") -> Iterator[str]:
    data = recipe.data
    if data.unlabelled == "rest" and data.train_images is None:
        yield "data.unlabelled=rest is what data.train_images leaves out: set data.train_images too"
    if data.unlabelled is None and recipe.train.unlabelled_batch_size is not None:
        yield "train.unlabelled_batch_size has no effect without data.unlabelled: set that, or drop it"
    if data.unlabelled is None and data.streaming == "unlabelled":
        yield "data.streaming=unlabelled has no effect without data.unlabelled: set that, or drop it"
    resized = data.image_px is not None
    without_effect = "has no effect on images that are not resized: set data.image_px, or drop it"
    if data.eval_crop < 1 and not resized:
        yield f"data.eval_crop={data.eval_crop:g} {without_effect}"
    if data.fit != "crop" and not resized:
        yield f"data.fit={data.fit} {without_effect}"


def _folds(recipe: "Recipe") -> Iterator[str]:
    folds, fold = recipe.data.folds, recipe.data.fold
    if fold is not None and (folds is None or fold > folds):
        remedy = "set data.folds too" if folds is None else f"choose 1 to {folds}"
        yield f"data.fold={fold} is none of data.folds={folds}: {remedy}"
    if recipe.is_cross_validation and recipe.variants:
        yield "data.folds and variants exclude each other: run the variants that matter with data.folds, one by one"
    if recipe.is_cross_validation and len(recipe.seeds) > 1:
        yield f"data.folds={folds} trains once for each fold, but seeds={list(recipe.seeds)}: give one seed"


def _teacher(name: str, teacher: "TeacherRecipe") -> Iterator[str]:
    if (teacher.mean is None) != (teacher.std is None):
        yield f"{name}.mean and {name}.std belong together: give both or neither"
    if any(std <= 0 for std in teacher.std or ()):
        yield f"{name}.std={list(teacher.std or ())} must be positive"
    for field, values in (("mean", teacher.mean), ("std", teacher.std)):
        if any(abs(value) > 1 for value in values or ()):
            yield f"{name}.{field}={list(values or ())} is of values from 0 to 255, not from 0 to 1: divide it by 255"


def _policies(name: str, augment: "AugmentRecipe") -> Iterator[str]:
    policies = ("randaugment", "autoaugment", "three_augment")
    chosen = [f"{name}.{policy}={getattr(augment, policy)}" for policy in policies if getattr(augment, policy)]
    if len(chosen) > 1:
        yield f"{' and '.join(chosen)} exclude each other: keep one"


def _training(name: str, training: "TrainRecipe") -> Iterator[str]:
    if training.warmup_epochs > training.epochs:
        yield f"{name}.warmup_epochs={training.warmup_epochs:g} exceeds {name}.epochs={training.epochs}: lower it"
    least, peak = training.min_learning_rate, training.learning_rate
    if least > peak and training.learning_rate_per is None:
        yield f"{name}.min_learning_rate={least:g} exceeds {name}.learning_rate={peak:g}: lower it"
    if training.repeats > training.batch_size:
        yield f"{name}.repeats={training.repeats} exceeds {name}.batch_size={training.batch_size}: lower it"


def _train_px(recipe: "Recipe") -> Iterator[str]:
    image_px, train_px = recipe.data.image_px, recipe.data.train_px
    if train_px is None:
        return
    if image_px is None:
        yield f"data.train_px={train_px} has no effect on images that are not resized: set data.image_px, or drop it"
    elif train_px < image_px:
        yield f"data.train_px={train_px} is less than data.image_px={image_px}: use at least {image_px}, or drop it"
    elif not recipe.has_random_crops:
        yield f"data.train_px={train_px} has no effect without augment.crop=random-resized: set that, or drop it"
