"""What a training will take on several devices: hours, cores that decode, memory, traffic and cost, from one speed."""

import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from deitkit.bench.training_speed import Bench, bench_train
from deitkit.comparison.folds import fold_recipes
from deitkit.data.dataset import plan_listing
from deitkit.data.decode import decode_image
from deitkit.data.selection import crop_source_px
from deitkit.data.sources.choose import list_images_of
from deitkit.errors import DataError, RecipeError
from deitkit.recipe.contradictions import BASE
from deitkit.recipe.load import expand_variants
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.system.process import usable_cores

IMAGENET_IMAGES = 1_281_167  # of its training split, which hardly anyone has at hand when planning
PHOTO = (375, 500)  # height and width of a typical photograph of ImageNet
PHOTO_BYTES = 110_000
MOST_TRAFFIC = 0.2  # of a step, for which the devices need not wait for long
STATE_BYTES = 20  # of a weight in a state: the weight, two moments, the last good weight, and one average

NEEDED = ("cores_to_decode", "gib_in_memory", "state_gib", "gradient_mb", "traffic_seconds", "step_seconds")
NOTHING = "the devices: decoding and traffic keep up"  # but the devices limits it


@dataclass(frozen=True)
class Cluster:
    """What is known beforehand of the machines; None is measured here, or assumed as said.

    Args:
        devices: That share every step.
        images_per_second: Of one device, all students together, by `deitkit bench train` there; measured here if None.
        images: Training images; by default those of the data set.
        decoded_per_second: Images that a core decodes in a second; measured here if None, on a typical photograph.
        cores: Of all machines together.
        price: Of a device for an hour.
        link_gb_per_second: Between the devices.
    """

    devices: int = 1
    images_per_second: float | None = None
    images: int | None = None
    decoded_per_second: float | None = None
    cores: int | None = None
    price: float | None = None
    link_gb_per_second: float = 25.0


def plan(recipe: Recipe, given: Cluster) -> dict[str, Any]:
    """Return what a recipe's training will take, its teachers being trained already.

    Of folds and variants, views, hours and cost are those of all, one after the other; what they need is that of the
    one that needs most, and images and speed are those of the longest. Speeds add up over the devices, which was never
    measured beyond two processes: a lower bound of the time.

    Args:
        recipe: Its students, views and epochs.
        given: The machines.

    Raises:
        RecipeError: The data set is not at hand, and ``images`` is not given.
    """
    numbers = {
        "speed": given.images_per_second, "decode": given.decoded_per_second, "price": given.price,
        "link": given.link_gb_per_second,
    }  # fmt: skip
    for option, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise RecipeError(f"--{option} {value} is not a finite number: give one, or leave it out")
    measured = Measured(given)
    if recipe.is_cross_validation:
        parts = {f"fold {fold}": own for fold, own in fold_recipes(recipe).items()}
    else:
        parts = expand_variants(recipe)
    plans = {name: _plan_part(part, given, measured) for name, part in parts.items()}
    longest = max(plans.values(), key=lambda found: found["hours"])
    hours = {name: found["hours"] for name, found in plans.items()}
    price = None if given.price is None else given.price * given.devices * sum(hours.values())
    limits = [f"{found['bottleneck']} ({name})" for name, found in plans.items() if found["bottleneck"] != NOTHING]
    most = {figure: max(found[figure] for found in plans.values()) for figure in NEEDED}
    return (
        longest
        | most
        | {
            "recipe": recipe.name,
            "views": sum(found["views"] for found in plans.values()),
            "hours": sum(hours.values()),
            "parts": hours if len(hours) > 1 else {},
            "cost": price,
            "bottleneck": limits[0] if limits and len(plans) > 1 else longest["bottleneck"],
            "notes": list(_notes(parts, given)),
        }
    )


def _notes(parts: dict[str, Recipe], given: Cluster) -> Iterator[str]:
    """Yield what a given speed is taken to be."""
    if given.images_per_second is None:
        return
    if any(part.baseline is not None for part in parts.values()):
        yield "the given speed is taken as that of all students with the baseline, as `deitkit bench train` measures it"
    if BASE in parts and len(parts) > 1:
        yield "the given speed is taken for every variant, also for one with another model or other methods"


class Measured:
    """What is measured or counted once, for all parts of a plan that share it; what is given is not measured."""

    def __init__(self, given: Cluster) -> None:
        self.given = given
        self.images = cache(_training_images)
        self.decode_rate = cache(decode_rate)
        self._speeds: dict[str, float] = {}

    def images_per_second(self, part: Recipe) -> float:
        """Return the speed of a device; names, epochs and folds do not influence it."""
        if self.given.images_per_second:
            return self.given.images_per_second
        same = {"name": "", "train": part.train.model_copy(update={"epochs": 1, "schedule_epochs": None})}
        same["data"] = part.data.model_copy(update={"fold": None})
        key = part.model_copy(update=same).model_dump_json()
        if key not in self._speeds:
            found = bench_train(part, synthetic=True, repeats=1, steps=1)
            self._speeds[key] = float(found["images_per_second"])
        return self._speeds[key]


def _plan_part(recipe: Recipe, given: Cluster, measured: Measured) -> dict[str, Any]:
    """Return the plan of one comparison."""
    train = recipe.train
    share = -(-train.batch_size // given.devices)
    images = given.images or measured.images(recipe.data)
    if images < train.batch_size:
        raise RecipeError(f"--images {images} is less than train.batch_size={train.batch_size}: give at least as many")
    views = train.steps_per_epoch(images) * train.batch_size * train.epochs * len(recipe.seeds)
    part = recipe.model_copy(update={"train": train.model_copy(update={"batch_size": share})})
    bench = Bench(part, True)
    models = [student.classifier.model for student in bench.students(recipe.methods)]
    parameters = sum(value.numel() for model in models for value in model.parameters())
    together = measured.images_per_second(part) * given.devices
    image_px = bench.dataset.image_px[0]
    larger_px = crop_source_px(recipe.data) or 0 if recipe.has_random_crops else 0
    decoded = given.decoded_per_second or measured.decode_rate(image_px)
    gradient_bytes = 4 * parameters
    traffic = 2 * (given.devices - 1) / given.devices * gradient_bytes / (given.link_gb_per_second * 1e9)
    result = {
        "devices": given.devices,
        "images": images,
        "views": views,
        "images_per_second": together,
        "speed": "given" if given.images_per_second else "measured here",
        "hours": views / together / 3600,
        "step_seconds": train.batch_size / together,
        "decoded_per_second_and_core": decoded,
        "cores_to_decode": together / train.repeats / decoded,
        "cores": given.cores or usable_cores(),
        "gib_in_memory": images * bench.dataset.channels * (image_px**2 + larger_px**2) / 2**30,
        "state_gib": STATE_BYTES * parameters / 2**30,
        "gradient_mb": gradient_bytes / 1e6,
        "traffic_seconds": traffic,
    }
    return result | {"bottleneck": _bottleneck(result)}


def _training_images(data: DataRecipe) -> int:
    """Return the number of training images of a data set that is at hand, without decoding any."""
    try:
        listing = list_images_of(data, None)
    except DataError as error:
        if data.name == "imagenet":
            return min(round(IMAGENET_IMAGES * (1 - data.validation_fraction)), data.train_images or IMAGENET_IMAGES)
        raise RecipeError(f"{error}; or say how many training images there are with --images") from None
    return len(plan_listing(listing, data).train)


def decode_rate(image_px: int, seconds: float = 1.0) -> float:
    """Return how many typical photographs a core of this machine decodes and resizes in a second."""
    photo = _photo()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decode_image(photo, 3, image_px)
        done += 1
    return done / (time.perf_counter() - started)


def _photo() -> bytes:
    """Return a JPEG file whose size and spectrum are those of a photograph: amplitudes fall as 1 / frequency."""
    height, width = PHOTO
    noise = np.random.default_rng(0).standard_normal((height, width, 3))
    across, down = np.fft.rfftfreq(width)[None, :, None], np.fft.fftfreq(height)[:, None, None]
    falling = 1 / np.maximum(np.hypot(across, down), 1 / height)
    pixels = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) * falling, s=PHOTO, axes=(0, 1))
    image = Image.fromarray((120 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))
    for quality in range(95, 0, -5):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= PHOTO_BYTES:
            break
    return file.getvalue()


def _bottleneck(result: dict[str, Any]) -> str:
    """Say what limits the training, and what to do about it."""
    needed, cores, step = result["cores_to_decode"], result["cores"], result["step_seconds"]
    if needed > cores:
        return (
            f"decoding: {needed:.0f} cores would keep the devices busy, and {cores} are there, so it takes "
            f"{needed / cores:.1f} times as long, unless the images ({result['gib_in_memory']:.0f} GiB) stay in memory"
        )
    if result["traffic_seconds"] > MOST_TRAFFIC * step:
        milliseconds = 1000 * result["traffic_seconds"]
        return (
            f"the link: gradients of {result['gradient_mb']:.0f} MB take {milliseconds:.0f} ms of a step of "
            f"{1000 * step:.0f} ms; larger batches need less, or whole students on a device each (--on)"
        )
    return NOTHING
