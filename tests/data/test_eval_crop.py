"""Validation and test images are cut as the DeiT code cuts them; training images never are."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from conftest import CPU_FP32
from deitkit.comparison.compare import compare
from deitkit.data.augment.preview import draw_views
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.data.decode import decode_image
from deitkit.data.pixels import evaluation_frame, resize
from deitkit.data.split import Split
from deitkit.errors import RecipeError
from deitkit.evaluation.apply import evaluate_model
from deitkit.evaluation.classify import Classification
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import readout_scores
from deitkit.models.saved import load_classifier
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import AugmentRecipe, DataRecipe
from deitkit.run.observer import Watcher

CROP = 0.8


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(60, 196, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders of PNG files of different sizes."""
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for index in range(12):
                noise(30 + index, 34, 100 * label + index).save(tmp_path / "photos" / part / name / f"{index:02}.png")
    return tmp_path / "photos"


def torchvisions(image: Image.Image, image_px: int, eval_crop: float) -> np.ndarray:
    """Resize and cut as the DeiT code does with its ``eval_crop_ratio``."""
    resized = Resize(int(image_px / eval_crop), InterpolationMode.BICUBIC)(image)
    return np.asarray(CenterCrop(image_px)(resized)).transpose(2, 0, 1)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("image_px", "eval_crop"), [(224, 0.875), (32, 0.875), (20, 0.8), (21, 0.6), (16, 1.0)])
@pytest.mark.parametrize("side", [300, 30])
def test_a_square_is_cut_as_torchvision_cuts_it(side: int, image_px: int, eval_crop: float) -> None:
    image = noise(side, side)
    expected = torchvisions(image, image_px, eval_crop).astype(int)
    cut = decode_image(encoded(image), 3, image_px, eval_crop).astype(int)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    batched = resize(pixels, image_px, train_count=0, eval_crop=eval_crop)[0].int().numpy()
    assert cut.shape == batched.shape == expected.shape
    assert abs(cut - expected).max() <= 1
    assert abs(batched - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 333)])
def test_the_papers_evaluation_of_a_photo(height: int, width: int) -> None:
    assert evaluation_frame(224, 0.875) == (256, 16)
    image = noise(6, 6).resize((width, height), Image.Resampling.BICUBIC)
    resized = Resize(256, InterpolationMode.BICUBIC)(image)
    expected = np.asarray(CenterCrop(224)(resized)).transpose(2, 0, 1).astype(int)
    # torchvision rounds the longer side and the corner to whole pixels, which moves this smooth picture by up to half a
    # pixel, three grey levels.
    assert abs(decode_image(encoded(image), 3, 224, 0.875) - expected).max() <= 3
    assert abs(decode_image(encoded(image), 3, 224) - expected).max() > 20


def load(photos: Path, **fields: Any) -> Dataset:
    return load_dataset(DataRecipe(name=f"folder:{photos}", image_px=20, **fields))


@pytest.mark.parametrize("streaming", [False, True])
def test_only_images_that_are_evaluated_are_cut(photos: Path, streaming: bool) -> None:
    whole, cut = load(photos), load(photos, eval_crop=CROP, streaming=streaming, workers=0)
    assert torch.equal(torch.cat(list(cut.train.batches(5))), whole.train.images)
    assert (cut.mean, cut.std) == (whole.mean, whole.std)
    known = {decode_image(path, 3, 20, CROP).tobytes() for path in photos.rglob("*.png")}
    for split in (cut.validation, cut.test):
        images = torch.cat(list(split.batches(5)))
        assert {image.numpy().tobytes() for image in images} <= known
        assert torch.equal(split.pixels(torch.tensor([1, 0])), images[[1, 0]])
    assert cut.fingerprint != whole.fingerprint
    again = load(photos, eval_crop=CROP, streaming=streaming, workers=0)
    assert again.fingerprint == cut.fingerprint


def test_images_that_come_decoded_are_cut_where_they_are_resized() -> None:
    native, cut = (
        load_dataset(DataRecipe(name="digits", **fields)) for fields in ({}, {"image_px": 8, "eval_crop": CROP})
    )
    assert torch.equal(cut.train.images, native.train.images)
    assert torch.equal(cut.test.images, resize(native.test.images, 10)[..., 1:9, 1:9])


def test_a_model_is_evaluated_and_used_as_its_card_says(
    tiny_recipe: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        f"data.name=folder:{photos}", "data.image_px=16", f"data.eval_crop={CROP}", "data.train_images=null",
        "data.test_images=null", "methods=[hard]", "train.batch_size=8", "teacher.train.batch_size=8",
    )  # fmt: skip
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    for folder in ("seed-0/hard", "teacher"):
        assert json.loads((tmp_path / "run" / folder / "model.json").read_text())["eval_crop"] == CROP
    measured = evaluate_model(tmp_path / "run" / "seed-0" / "hard", f"folder:{photos}")
    assert measured["readouts"][0]["top1"] == results.rows[0].top1[0]

    files = sorted((photos / "test").rglob("*.png"))
    answers = list(Classification(tmp_path / "run" / "winner", files, top=2))
    classifier, _ = load_classifier(tmp_path / "run" / "winner", torch.device("cpu"))
    images = torch.stack([torch.from_numpy(decode_image(file, 3, 16, CROP).copy()) for file in files])
    scores = readout_scores(predict(classifier, Split(images, torch.zeros(len(files)).long()), CPU_FP32))["class"]
    for answer, row in zip(answers, scores.softmax(dim=-1), strict=True):
        assert answer["classes"][0][1] == pytest.approx(row.max().item(), abs=0.01)


def test_without_resizing_it_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.eval_crop=0\.875 has no effect.*set data\.image_px"):
        load_recipe("digits", ["data.eval_crop=0.875"])


def test_the_preview_shows_whole_images_and_the_part_that_is_kept(tmp_path: Path) -> None:
    for name, shape in (("wide", (40, 90)), ("tall", (80, 30))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((*shape, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    recipe = DataRecipe(name=f"folder:{tmp_path / 'photos'}", image_px=16)
    dataset = load_dataset(recipe)
    some = torch.tensor([5, 0, 3])
    originals = dataset.originals(some)
    shown = dataset.train.pixels(some)
    for original, image, label in zip(originals, shown, dataset.train.labels[some], strict=True):
        assert original.shape == ((40, 90, 3) if dataset.class_names[int(label)] == "wide" else (80, 30, 3))
        assert int(original[0, 0, 0]) == int(image[0, 0, 0])
    draw_views(dataset, AugmentRecipe(), 0.1, tmp_path / "with.png", count=3)
    square = load_dataset(DataRecipe(name="digits", image_px=16))
    draw_views(square, AugmentRecipe(), 0.1, tmp_path / "without.png", count=3)
    heights = []
    for name in ("with.png", "without.png"):
        with Image.open(tmp_path / name) as picture:
            heights.append(picture.height)
    assert heights[0] / heights[1] == pytest.approx(5 / 4, abs=0.05)
