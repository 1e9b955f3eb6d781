"""Speed of training steps, of reading data, and of a cohort versus separate trainings; it times the training code."""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deitkit.bench.measure import count_flops, machine_limit, peak_memory_gib, reset_peak_memory
from deitkit.data.dataset import Dataset, Split, load_dataset
from deitkit.data.sources.choose import known_classes, known_shape
from deitkit.errors import RecipeError
from deitkit.models.accelerate import accelerate
from deitkit.models.saved import model_folder, read_card
from deitkit.models.weights.pretrained import resolved
from deitkit.models.zoo import pretrained_px
from deitkit.recipe.schema import DataRecipe, Recipe, TeacherRecipe
from deitkit.system.device import Precision, describe_machine
from deitkit.system.seeding import seeded
from deitkit.system.timer import Timing, time_in_turn, wait
from deitkit.teachers.build import draft_teacher
from deitkit.teachers.frozen import FrozenTeacher, Teachers
from deitkit.teachers.logit_cache import LogitCache, open_logit_cache
from deitkit.training.build import build_cohort, build_students
from deitkit.training.cohort import Cohort
from deitkit.training.cuda_graph import WARM_UP
from deitkit.training.student import Student

SYNTHETIC_PX = 32
SYNTHETIC_CLASSES = 10


class Bench:
    """The parts of a recipe's training, for timing; the teacher is untrained, which does not affect the speed.

    Args:
        recipe: The training to time.
        synthetic: Use random images instead of the recipe's data set.
    """

    def __init__(self, recipe: Recipe, synthetic: bool) -> None:
        self.recipe = recipe = without_weights(recipe)
        self.precision = Precision.of(recipe)
        self.device = self.precision.device
        load = partial(load_dataset, recipe.data, random_crops=recipe.has_random_crops)
        self.dataset = synthetic_dataset(recipe) if synthetic else load()
        self.synthetic = synthetic
        self.teachers = Teachers([self._build_teacher(teacher) for teacher in recipe.all_teachers])

    def _build_teacher(self, recipe: TeacherRecipe) -> FrozenTeacher:
        image_px = recipe.image_px or (pretrained_px(recipe.name) if recipe.pretrained else None)
        blank = recipe.model_copy(update={"pretrained": False, "checkpoint": None, "image_px": image_px})
        with seeded(0, "teacher"):
            classifier, _ = draft_teacher(blank, self.dataset)
        return FrozenTeacher(accelerate(classifier, self.recipe.speed, self.device))

    def students(self, methods: tuple[str, ...]) -> list[Student]:
        """Build students as a comparison does, with the baseline if the recipe has one."""
        recipe = self.recipe.model_copy(update={"methods": methods})
        return build_students(recipe, self.dataset, recipe.seeds[0], self.precision)

    def cohort(self, students: list[Student], logit_cache: LogitCache | None = None) -> Cohort:
        """Build a cohort as a comparison does, in training mode."""
        cohort = build_cohort(
            students,
            self.recipe,
            self.dataset,
            teacher=self.teachers,
            seed=self.recipe.seeds[0],
            precision=self.precision,
            logit_cache=logit_cache,
        )
        for student in students:
            student.classifier.train()
        return cohort

    def describe(self) -> dict[str, Any]:
        """Return the machine, data and models of the figures."""
        recipe, (height, width) = self.recipe, self.dataset.image_px
        return {
            "machine": describe_machine(self.precision),
            "data": "synthetic" if self.synthetic else self.dataset.name,
            "image_px": [height, width],
            "model": recipe.model.model_dump(mode="json"),
            "methods": list(recipe.methods),
            "teacher": " + ".join(teacher.name for teacher in recipe.all_teachers),
            "batch_size": recipe.train.batch_size,
        }


def without_weights(recipe: Recipe) -> Recipe:
    """Return a recipe with the size of its students' initial weights, but without these: the speed is the same."""
    model = resolved(recipe).model.model_copy(update={"pretrained": None, "checkpoint": None})
    return recipe.model_copy(update={"model": model})


class Stepper:
    """Trains a cohort by one step per call, epoch after epoch; or repeats the first epoch without its first step, which
    checks cached logits.
    """

    def __init__(self, cohort: Cohort, first_epoch_only: bool = False) -> None:
        self.cohort = cohort
        self.first_epoch_only = first_epoch_only
        self._batches: Iterator[Any] | None = None

    def __call__(self) -> None:
        cohort = self.cohort
        if self._batches is None:
            cohort.step = 1 if self.first_epoch_only else 0
            self._batches = cohort.batches.epoch(cohort.epoch, cohort.step)
        cohort.next_step(self._batches)
        if cohort.step == cohort.batches.steps_per_epoch:
            cohort.epoch += 0 if self.first_epoch_only else 1
            self._batches = None


def bench_train(recipe: Recipe, *, synthetic: bool, repeats: int, steps: int) -> dict[str, Any]:
    """Time training steps of all methods of a recipe together, and return the parts of the time.

    Images without labels take their time, but only those with labels count as images.

    Args:
        recipe: The training to time.
        synthetic: Use random images.
        repeats: Number of measurements; the median is reported.
        steps: Steps in each measurement.
    """
    bench = Bench(recipe, synthetic)
    reset_peak_memory(bench.device)
    cohort = bench.cohort(bench.students(recipe.methods))
    stepper = Stepper(cohort)
    for _ in range(WARM_UP + 1 if bench.device.type == "cuda" else 1):
        stepper()
    cohort.reset_watches()
    for student in cohort.students:
        student.reset_meters()
    taken = time_in_turn({"step": stepper}, device=bench.device, repeats=repeats, calls=steps)["step"]
    memory = peak_memory_gib(bench.device)  # before anything else uses the device
    flops = step_flops(bench)
    flops_per_second = flops * cohort.images_in_step / taken.median
    limit = machine_limit(bench.precision)
    speed = _images_per_second(taken, recipe.train.batch_size)
    return bench.describe() | {
        **speed,
        "shares": cohort.shares(),
        "gflop_per_image": flops / 1e9,
        "gflop_per_second": flops_per_second / 1e9,
        "limit_gflop_per_second": limit / 1e9,
        "share_of_limit": flops_per_second / limit,
        "peak_memory_gib": memory,
        "repeats": repeats,
        "steps": steps,
    }


def bench_data(recipe: Recipe, *, synthetic: bool, repeats: int, steps: int) -> dict[str, Any]:
    """Time reading and augmentation alone, without a model."""
    bench = Bench(recipe, synthetic)
    cohort = bench.cohort([])
    batches = itertools.chain.from_iterable(cohort.batches.epoch(epoch) for epoch in itertools.count())
    number = itertools.count()
    read = lambda: next(batches)  # noqa: E731
    taken = time_in_turn(
        {"read": read, "read and augment": lambda: cohort.make_view(*next(batches), next(number))},
        device=bench.device,
        repeats=repeats,
        calls=steps,
        warm_up=2,
    )
    size = recipe.train.batch_size
    return bench.describe() | {
        **_images_per_second(taken["read and augment"], size),
        "read_images_per_second": size / taken["read"].median,
        "augment": recipe.augment.model_dump(mode="json"),
        "repeats": repeats,
        "steps": steps,
    }


def bench_cohort(recipe: Recipe, *, synthetic: bool, repeats: int, steps: int) -> dict[str, Any]:
    """Time the recipe's methods in one cohort and separately, on the same views.

    The ratio is the cohort's time over the sum of the separate times; cached logits are read from the disk.
    Peak memory is given for cohorts of 1, 2, ... students. The CNN baseline is left out, which is in every cohort.
    """
    bench = Bench(recipe.model_copy(update={"baseline": None}), synthetic)
    count = len(bench.dataset.train)
    if recipe.train.steps_per_epoch(count) < 2:
        raise RecipeError(
            f"train.batch_size={recipe.train.batch_size}: an epoch of {count} images is one step, but the first is not "
            "timed: lower it, or add --synthetic"
        )
    methods = recipe.methods
    memory = _memory_by_students(bench)
    with tempfile.TemporaryDirectory(prefix="deitkit-bench-") as folder:
        functions = {"cohort": Stepper(bench.cohort(bench.students(methods)))}
        functions |= {name: Stepper(bench.cohort(bench.students((name,)))) for name in methods}
        functions["cohort, cached logits"] = _with_cached_logits(bench, Path(folder))
        warm_up = WARM_UP + 2 if bench.device.type == "cuda" else 1
        taken = time_in_turn(functions, device=bench.device, repeats=repeats, calls=steps, warm_up=warm_up)
    shares = functions["cohort"].cohort.shares()
    alone = sum(taken[name].median for name in methods)
    per_student = (shares["students"] + shares["optimizers"]) / len(methods)
    return bench.describe() | {
        "seconds_per_step": {name: asdict(timing) for name, timing in taken.items()},
        "alone_seconds": alone,
        "ratio": taken["cohort"].median / alone,
        "ratio_cached": taken["cohort, cached logits"].median / alone,
        "teacher_per_student_step": shares["teacher"] / per_student,
        "shares": shares,
        "peak_memory_gib": memory,
        "repeats": repeats,
        "steps": steps,
    }


def _with_cached_logits(bench: Bench, folder: Path) -> Stepper:
    """Return the steps of the cohort on an epoch with cached teacher logits."""
    recipe = bench.recipe
    cache = open_logit_cache(recipe, bench.dataset, bench.teachers, recipe.seeds[0], bench.precision, folder)
    writer = bench.cohort(bench.students(recipe.methods), cache)
    for step, (images, labels) in enumerate(writer.batches.epoch(0)):
        writer.step = step
        view, _ = writer.make_view(images, labels, step, writer.views.unlabelled_images(writer.global_step))
        cache.keep(0, step, writer.recorder.run(writer.teacher_forward, view))
    again = open_logit_cache(recipe, bench.dataset, bench.teachers, recipe.seeds[0], bench.precision, folder)
    cohort = bench.cohort(bench.students(bench.recipe.methods), again)
    assert again.find(0, 0) is not None
    return Stepper(cohort, first_epoch_only=True)


def _memory_by_students(bench: Bench) -> list[float]:
    """Return the peak memory of cohorts of 1, 2, ... students, in GiB."""
    peaks = []
    for count in range(1, len(bench.recipe.methods) + 1):
        reset_peak_memory(bench.device)
        stepper = Stepper(bench.cohort(bench.students(bench.recipe.methods[:count])))
        for _ in range(WARM_UP + 1 if bench.device.type == "cuda" else 1):
            stepper()
        wait(bench.device)
        peaks.append(peak_memory_gib(bench.device))
        del stepper
    return peaks


def _images_per_second(taken: Timing, batch_size: int) -> dict[str, Any]:
    return {
        "images_per_second": batch_size / taken.median,
        "images_per_second_range": [batch_size / taken.slowest, batch_size / taken.fastest],
        "seconds_per_step": taken.median,
    }


def step_flops(bench: Bench) -> int:
    """Return the operations of a step per image: students forward and backward, teachers forward."""
    shape = (bench.dataset.channels, *bench.dataset.image_px)
    students = bench.students(bench.recipe.methods)
    total = sum(count_flops(student.classifier.model, shape, backward=True) for student in students)
    if any(student.method.teacher_signal for student in students):
        for classifier in bench.teachers.classifiers:
            px = classifier.image_px
            total += count_flops(classifier.model, (shape[0], px, px) if px else shape, backward=False)
    return total


def view_of_recipe(data: DataRecipe) -> tuple[int, int]:
    """Return channels and side of a recipe's images: by its fields, else of the data set that it names, else common."""
    shape = known_shape(data.name) if "name" in data.model_fields_set else None
    shape = shape or (3, SYNTHETIC_PX, SYNTHETIC_PX)
    return data.channels or shape[0], data.image_px or shape[1]


def synthetic_dataset(recipe: Recipe) -> Dataset:
    """Return random images, some without labels if the recipe has such; speed does not depend on their content."""
    channels, side = view_of_recipe(recipe.data)
    places = [Path(teacher.name) for teacher in recipe.all_teachers]
    saved = [read_card(model_folder(place)).class_names for place in places if place.is_dir()]
    classes = known_classes(recipe.data.name) or SYNTHETIC_CLASSES
    names = saved[0] if saved else tuple(f"class {number}" for number in range(classes))
    classes = len(names)
    count = max(4 * recipe.train.batch_size, classes)
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        images = torch.randint(0, 256, (size, channels, side, side), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(size) % classes)

    half = (0.5,) * channels
    small = split(classes)
    unlabelled = None
    if recipe.unlabelled_in_step:
        unlabelled = replace(split(recipe.unlabelled_in_step), labels=torch.full((recipe.unlabelled_in_step,), -1))
    return Dataset("synthetic", split(count), small, small, names, half, half, (), "synthetic", unlabelled=unlabelled)
