"""Test images that nearly equal a training image: what is found, what is not, and where it is told."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deitkit.comparison.compare import compare
from deitkit.data import duplicates
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.data.duplicates import find_near_duplicates
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.run.observer import Watcher


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path / "cache"))


def scene(seed: int, px: int = 96) -> Image.Image:
    """A picture with large and small shapes, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    fine = np.random.default_rng(seed + 1000).integers(-25, 26, (px, px, 3))
    smooth = np.asarray(Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 training and 20 test images; of the latter 3 are copies in another form, 2 are equal, and 15 are new."""
    home = tmp_path / "photos"
    for index in range(40):
        save(scene(index), home / "train" / "ab"[index % 2] / f"{index}.png")
    for index in range(15):
        save(scene(100 + index), home / "test" / "ab"[index % 2] / f"new-{index}.png")
    for index in range(2):
        save(scene(index), home / "test" / "a" / f"equal-{index}.png")
    save(scene(4), home / "test" / "a" / "quality.jpg", quality=30)
    save(scene(5).resize((50, 50)), home / "test" / "b" / "smaller.png")
    save(scene(6).point(lambda value: min(255, value + 20)), home / "test" / "a" / "brighter.png")
    return home


def load(home: Path, **fields: object) -> Dataset:
    return load_dataset(DataRecipe(name=f"folder:{home}", validation_fraction=0.05, **fields))  # type: ignore[arg-type]


def test_copies_in_another_form_are_found_and_named(photos: Path) -> None:
    data = load(photos, image_px=48)
    found = data.near_duplicates
    pairs = {Path(test).name: Path(train).stem for test, train in found.examples}
    assert found.count == len(pairs) == 3
    assert pairs == {"quality.jpg": "4", "smaller.png": "5", "brighter.png": "6"}
    assert data.duplicates.count == 2, "what is equal is counted there, and not twice"
    assert len(data.test) == 20, "nothing is removed"


def test_small_and_streamed_images_are_not_compared(photos: Path) -> None:
    assert load(photos, image_px=16).near_duplicates.count == 0
    assert load(photos, image_px=48, streaming=True, workers=0).near_duplicates.count == 0


def test_the_most_alike_is_found_as_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    train = generator.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    noise = [generator.integers(-most, most + 1, (4, 3, 32, 32)) for most in (9, 60)]  # the latter correlates by 0.9
    test = np.clip(np.concatenate([train[5:9] + noise[0], train[5:9] + noise[1]]), 0, 255)

    def thumbnail(image: np.ndarray) -> np.ndarray:
        return image.astype(float).reshape(3, 16, 2, 16, 2).mean(axis=(2, 4)).reshape(3, -1)

    def correlation(one: np.ndarray, other: np.ndarray) -> float:
        a, b = (thumbnail(image) - thumbnail(image).mean(axis=1, keepdims=True) for image in (one, other))
        return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))

    pairs = [  # in one part or in many, also of one image
        [place, int(np.argmax(values))]
        for place, values in enumerate([[correlation(image, other) for other in train] for image in test])
        if max(values) > 0.96
    ]
    for most in (2**24, 5 * 3 * 32**2, 1):
        monkeypatch.setattr(duplicates, "_MOST_VALUES", most)
        assert find_near_duplicates(torch.from_numpy(train), torch.from_numpy(test.astype(np.uint8))).tolist() == pairs
    assert pairs == [[0, 5], [1, 6], [2, 7], [3, 8]]


def test_large_images_are_compared_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    pool = duplicates.adaptive_avg_pool2d
    monkeypatch.setattr(
        duplicates, "adaptive_avg_pool2d", lambda images, px: seen.append(images.numel()) or pool(images, px)
    )
    train, test = (torch.zeros(count, 3, 384, 384, dtype=torch.uint8) for count in (80, 3))
    assert not len(find_near_duplicates(train, test))
    assert sum(seen) == train.numel() + test.numel()
    assert max(seen) * 4 <= 2**26, "bytes as float32"


def test_plain_images_look_like_nothing() -> None:
    plain = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    barely = plain.clone()
    barely[:, :, 0, 0] += 1
    assert find_near_duplicates(plain, barely).shape == (0, 2)
    assert find_near_duplicates(plain[:0], barely).shape == (0, 2)


def test_a_comparison_tells_of_them(photos: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    said: list[str] = []
    watcher = Watcher()
    watcher.say = said.append  # type: ignore[method-assign]
    recipe = tiny_recipe(
        "methods=[none]", f"data.name=folder:{photos}", "data.image_px=32", "data.train_images=null",
        "data.test_images=null", "model.patch_px=8",
    )  # fmt: skip
    results = compare(recipe, tmp_path / "run", watcher=watcher)
    sentence = "3 test images nearly equal a training image, such as"
    assert sum(line.startswith(sentence) for line in said) == 1
    assert sum(note.startswith(sentence) for note in results.notes) == 1
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["dataset"]["near_duplicates"]["count"] == 3
    assert "nearly equal a training image" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("eval_crop", [0.875, 0.7])
def test_copies_are_found_where_test_images_are_cropped(photos: Path, eval_crop: float) -> None:
    found = load(photos, image_px=64, eval_crop=eval_crop).near_duplicates
    pairs = {Path(test).name: Path(train).stem for test, train in found.examples}
    assert pairs == {"quality.jpg": "4", "smaller.png": "5", "brighter.png": "6"}
