"""Images that are not square: cropped, padded or distorted, alike in training, predict, evaluate and exports."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deitkit.comparison.compare import compare
from deitkit.data.dataset import load_dataset
from deitkit.data.decode import decode_image
from deitkit.errors import RecipeError
from deitkit.evaluation.apply import evaluate_model
from deitkit.evaluation.classify import Classification
from deitkit.models.saved import load_classifier
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import DataRecipe
from deitkit.run.observer import Watcher

Run = Callable[..., tuple[int, str, str]]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """Return a smooth picture whose colours tell the place."""
    across = np.broadcast_to(np.linspace(10, 250, width)[None], (height, width))
    down = np.broadcast_to(np.linspace(10, 250, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 100)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(60, 30), (30, 60), (45, 45), (101, 7)])
def test_pad_is_pillows_on_black(size: tuple[int, int]) -> None:
    image = photograph(*size)
    ours = decode_image(encoded(image), 3, 24, fit="pad").astype(int)
    theirs = np.asarray(ImageOps.pad(image, (24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("size", [(60, 30), (30, 60), (101, 7)])
def test_squash_is_pillows_resize(size: tuple[int, int]) -> None:
    image = photograph(*size)
    theirs = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_image(encoded(image), 3, 24, fit="squash"), theirs)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(("crop", "pad", "squash")))
def test_every_shape_becomes_the_square(width: int, height: int, image_px: int, fit: str) -> None:
    assert decode_image(encoded(photograph(width, height)), 3, image_px, fit=fit).shape == (3, image_px, image_px)


def test_a_square_is_the_same_in_all_three() -> None:
    content = encoded(photograph(50, 50))
    cropped = decode_image(content, 3, 20)
    for fit in ("pad", "squash"):
        np.testing.assert_array_equal(decode_image(content, 3, 20, fit=fit), cropped)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_large_jpeg_and_a_turned_one_are_those_of_the_whole_image(fit: str) -> None:
    image = photograph(800, 500)
    whole = decode_image(encoded(image), 3, 20, fit=fit).astype(int)
    draft = decode_image(encoded(image, "JPEG", quality=98), 3, 20, fit=fit).astype(int)
    assert np.abs(whole - draft).max() <= 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = decode_image(encoded(turned, "PNG", exif=exif), 3, 20, fit=fit).astype(int)
    assert np.abs(whole - upright).max() <= 1


def test_the_evaluation_crop_applies_to_all() -> None:
    image = photograph(80, 40)
    for fit in ("pad", "squash"):
        large = decode_image(encoded(image), 3, 40, fit=fit)
        np.testing.assert_array_equal(decode_image(encoded(image), 3, 20, 0.5, fit), large[:, 10:30, 10:30])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            for index in range(12):
                path = tmp_path / "photos" / part / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph(40 + index, 20).point(lambda value, number=number: value // (1 + number)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_cache_knows_the_fit(photos: Path, streaming: bool) -> None:
    loaded = {
        fit: load_dataset(DataRecipe(name=f"folder:{photos}", image_px=16, fit=fit, streaming=streaming, workers=0))
        for fit in ("crop", "pad", "squash", "pad")
    }
    pixels = {fit: data.test.pixels(torch.arange(24)) for fit, data in loaded.items()}
    assert not torch.equal(pixels["crop"], pixels["pad"])
    assert not torch.equal(pixels["squash"], pixels["pad"])
    assert int(pixels["pad"][:, :, 0].max()) == 0, "black above and below"


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_predict_evaluate_and_exports_prepare_images_as_training_did(
    photos: Path, tmp_path: Path, run: Run, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deitkit.system.device.computes_bf16", lambda _: False)  # to compare in float32
    recipe = load_recipe(
        "own-images",
        (f"data.name=folder:{photos}", f"data.fit={fit}", "data.image_px=16", "methods=[none]", "train.epochs=1",
         "train.warmup_epochs=0", "train.batch_size=8", "model.width=16", "model.depth=1", "model.heads=1"),
    )  # fmt: skip
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    winner = tmp_path / "run" / "winner"
    assert json.loads((winner / "model.json").read_text())["fit"] == fit
    measured = evaluate_model(winner, f"folder:{photos}")
    assert measured["readouts"][0]["top1"] == results.rows[0].top1[0]
    file = photos / "test" / "cat" / "11.png"
    (answer,) = Classification(winner, [file])
    classifier, card = load_classifier(winner, torch.device("cpu"))
    shares = {}
    for each in ("crop", "pad", "squash"):
        view = torch.from_numpy(decode_image(file, 3, 16, fit=each).copy())[None].float() / 255
        with torch.no_grad():
            probabilities = classifier(view).class_logits.softmax(-1)[0].tolist()
        shares[each] = dict(zip(card.class_names, probabilities, strict=True))
    assert dict(answer["classes"]) == pytest.approx(shares[fit], abs=1e-6)
    assert dict(answer["classes"]) != pytest.approx(shares["crop"], abs=1e-6), "the model tells them apart"
    assert run("convert", tmp_path / "run", "--to", "timm", "--out", tmp_path / "timm")[0] == 0
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert config["crop_mode"] == {"pad": "border", "squash": "squash"}[fit]
    code, text, _ = run("convert", tmp_path / "run", "--to", "transformers", "--out", tmp_path / "hf")
    assert code == 0
    assert ("ImageOps.pad" in text) == (fit == "pad")


def test_a_fit_without_a_size_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.fit=pad has no effect on images that are not resized"):
        load_recipe("digits", ["data.fit=pad"])
