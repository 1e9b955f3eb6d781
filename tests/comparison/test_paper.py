"""The paper's training recipe, whole: every ingredient of its Table 9 has an effect, and they run together."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU_FP32, striped_dataset
from deitkit.comparison.compare import compare
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.training.build import build_students
from deitkit.training.cohort import Cohort
from deitkit.training.optim import peak_learning_rate
from run_helpers import Listener

SIZES = ("tiny", "small", "base")
SMALL = (
    "model.width=16", "model.depth=2", "model.heads=2", "model.patch_px=8", "train.batch_size=12", "train.epochs=1",
    "train.warmup_epochs=0.5", "device=cpu", "train.precision=fp32",
)  # fmt: skip


def test_a_run_says_at_which_rate_it_learns(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]", "train.epochs=1", "train.learning_rate=0.016", "train.learning_rate_per=512")
    listener = Listener()
    compare(recipe, tmp_path / "run", watcher=listener)
    assert "learning rate 0.0005: 0.016 for 512 images, 16 in a step" in listener.heard
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    # Of the epoch's last step, the fourth: three quarters down the cosine.
    assert record["learning_rate"] == pytest.approx(0.0005 * (1 - 0.5**0.5) / 2)


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_six_models_share_all_but_their_size_and_teacher(size: str) -> None:
    plain, distilled = load_recipe(f"imagenet-deit-{size}"), load_recipe(f"imagenet-deit-{size}-distilled")
    base = load_recipe("imagenet-deit-base")
    for recipe in (plain, distilled):
        assert recipe.model == base.model.model_copy(update={"name": f"deit_{size}"})
        assert (recipe.data, recipe.augment, recipe.train) == (base.data, base.augment, base.train)
    assert (plain.methods, distilled.methods) == (("none",), ("token-hard",))
    assert peak_learning_rate(plain.train, plain.train) == pytest.approx(0.0005 * 1024 / 512)
    assert distilled.teacher.name.startswith("timm/regnety_160")


@pytest.fixture
def image_folder(tmp_path: Path) -> str:
    """Class folders of photos of different sizes, as ImageNet's are laid out."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 14), ("val", 4)):
        for name in ("n01440764", "n01443537"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(count):
                size = (36 + index, 44 - index, 3)
                pixels = draw.integers(0, 256, size, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{index:02}.JPEG")
    return f"data.name=folder:{tmp_path / 'images'}"


def test_all_ingredients_run_together_in_memory_and_streamed(image_folder: str, tmp_path: Path) -> None:
    seen = []
    for streaming in ("false", "true"):
        recipe = load_recipe(
            "imagenet-deit-tiny-distilled",
            [
                image_folder, *SMALL, "data.image_px=32", "data.train_px=32", f"data.streaming={streaming}",
                "data.workers=0", "teacher.name=cifar/resnet20", "teacher.pretrained=false", "teacher.min_top1=null",
                "teacher.allow_weak=true",
            ],
        )  # fmt: skip
        run = tmp_path / streaming
        results = compare(recipe, run, watcher=Watcher())
        readouts = ("class", "distillation", "joint", "joint-logits")
        assert {row.row for row in results.rows} == {
            f"token-hard/{readout}{average}" for readout in readouts for average in ("", "+ema")
        }
        assert all(row.status == "ok" and row.n == 8 for row in results.rows)
        for folder in ("seed-0/token-hard", "seed-0/token-hard+ema", "teacher"):
            assert json.loads((run / folder / "model.json").read_text())["eval_crop"] == 0.875
        (record,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert record["step"] == 2  # an epoch of 26 images has two steps of 12, each of four images in three views
        assert record["learning_rate"] == pytest.approx(0.0005 * 12 / 512)
        assert set(record["terms"]) == {"labels", "teacher"}
        seen.append((record["train_loss"], record["validation"], [row.top1 for row in results.rows]))
    assert seen[0] == seen[1]


def weights_after_an_epoch(*overrides: str) -> torch.Tensor:
    recipe = load_recipe("imagenet-deit-tiny", [*SMALL, *overrides])
    data = striped_dataset(image_px=16)
    cohort = Cohort(
        build_students(recipe, data, 0, CPU_FP32), teacher=None, dataset=data, augment=recipe.augment,
        train=recipe.train,speed=recipe.speed, precision=CPU_FP32, seed=0,
    )  # fmt: skip
    list(cohort.fit())
    return torch.cat([value.flatten() for value in cohort.students[0].classifier.model.state_dict().values()])


INGREDIENTS = (
    "augment.randaugment=null", "augment.randaugment=rand-m9-mstd0.5", "augment.mixup=0", "augment.cutmix=0",
    "augment.mix_switch=0.9", "augment.mix_probability=0.5", "augment.erase=0", "augment.erase_mode=constant",
    "augment.colour_jitter=0.4", "augment.flip=0", "augment.crop=simple", "augment.scale_min=0.5", "train.repeats=1",
    "model.drop_path=0", "model.dropout=0.1", "train.optimizer=sgd", "train.optimizer=lamb",
    "train.learning_rate_per=null", "train.warmup_epochs=0", "train.warmup_learning_rate=0",
    "train.min_learning_rate=0", "train.weight_decay=0", "train.label_smoothing=0", "train.clip_norm=0.01",
)  # fmt: skip


def test_every_ingredient_has_an_effect() -> None:
    whole = weights_after_an_epoch()
    assert torch.equal(weights_after_an_epoch(), whole)
    assert [change for change in INGREDIENTS if torch.equal(weights_after_an_epoch(change), whole)] == []
