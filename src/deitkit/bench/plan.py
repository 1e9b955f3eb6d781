"""What a training will take on several devices: hours, cores that decode, memory, traffic and cost, from one speed."""

import io
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from deitkit.bench.training_speed import Bench, bench_train
from deitkit.data.decode import decode_image
from deitkit.data.sources.choose import list_images_of
from deitkit.data.split import plan_splits
from deitkit.errors import DataError, RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.system.process import usable_cores

IMAGENET_IMAGES = 1_281_167  # of its training split, which hardly anyone has at hand when planning
PHOTO = (375, 500)  # height and width of a typical photograph of ImageNet
PHOTO_BYTES = 110_000
MOST_TRAFFIC = 0.2  # of a step, for which the devices need not wait for long
STATE_BYTES = 20  # of a weight in a state: the weight, two moments, the last good weight, and one average


@dataclass(frozen=True)
class Given:
    """What is known beforehand of the machines; None is measured here, or assumed as said.

    Args:
        devices: That share every step.
        images_per_second: Of one device, all methods together, by `deitkit bench train` there; measured here if None.
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


def plan(recipe: Recipe, given: Given) -> dict[str, Any]:
    """Return what a recipe's training will take, its teachers being trained already.

    Speeds add up over the devices, which was never measured beyond two processes: a lower bound of the time.

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
            raise RecipeError(f"--{option} {value} is no finite number: give one, or leave it out")
    train = recipe.train
    share = -(-train.batch_size // given.devices)
    images = given.images or _training_images(recipe)
    if images < train.batch_size:
        raise RecipeError(f"--images {images} is less than train.batch_size={train.batch_size}: give at least as many")
    views = train.steps_per_epoch(images) * train.batch_size * train.epochs * len(recipe.seeds)
    part = recipe.model_copy(update={"train": train.model_copy(update={"batch_size": share})})
    bench = Bench(part, True)
    models = [student.classifier.model for student in bench.students(recipe.methods)]
    parameters = sum(value.numel() for model in models for value in model.parameters())
    measured = None if given.images_per_second else bench_train(part, synthetic=True, repeats=1, steps=1)
    speed = given.images_per_second or float(measured["images_per_second"] if measured else 0)
    together = speed * given.devices
    image_px = bench.dataset.image_px[0]
    decoded = given.decoded_per_second or decode_rate(image_px)
    needed = together / train.repeats
    gradient_bytes = 4 * parameters
    traffic = 2 * (given.devices - 1) / given.devices * gradient_bytes / (given.link_gb_per_second * 1e9)
    step = train.batch_size / together
    in_memory = images * 3 * image_px**2
    cores = given.cores or usable_cores()
    hours = views / together / 3600
    result = {
        "recipe": recipe.name,
        "devices": given.devices,
        "images": images,
        "views": views,
        "images_per_second": together,
        "speed": "given" if given.images_per_second else "measured here",
        "hours": hours,
        "step_seconds": step,
        "decoded_per_second_and_core": decoded,
        "cores_to_decode": needed / decoded,
        "cores": cores,
        "gib_in_memory": in_memory / 2**30,
        "state_gib": STATE_BYTES * parameters / 2**30,
        "gradient_mb": gradient_bytes / 1e6,
        "traffic_seconds": traffic,
        "cost": None if given.price is None else given.price * given.devices * hours,
    }
    return result | {"bottleneck": _bottleneck(result)}


def _training_images(recipe: Recipe) -> int:
    """Return the number of training images of a data set that is at hand, without decoding any."""
    try:
        listing = list_images_of(recipe.data, None)
    except DataError as error:
        if recipe.data.name == "imagenet":
            return round(IMAGENET_IMAGES * (1 - recipe.data.validation_fraction))
        raise RecipeError(f"{error}; or say how many training images there are with --images") from None
    splits = plan_splits(listing.labels, listing.official_test, listing.class_names, recipe.data, listing.groups)
    return len(splits.train)


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
    return "the devices: decoding and traffic keep up"
