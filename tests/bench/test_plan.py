"""The plan of a training: its figures follow from each other, and it names what limits it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deitkit.bench.plan import Cluster, decode_rate, plan
from deitkit.bench.training_speed import Bench
from deitkit.errors import RecipeError
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe

IMAGENET = load_recipe("imagenet-deit-small-distilled", [])
EIGHT = {"devices": 8, "images_per_second": 2200.0, "decoded_per_second": 300.0, "cores": 128}
SHARE_LEFT = 0.99  # of the training images, beside the validation images of the recipe


def test_figures_of_imagenet_follow_from_each_other() -> None:
    found = plan(IMAGENET, Cluster(**EIGHT, price=3.0))
    assert found["images"] == round(1_281_167 * SHARE_LEFT)
    assert found["views"] == found["images"] // 1024 * 1024 * 300
    assert found["hours"] == pytest.approx(found["views"] / 17_600 / 3600)
    assert found["cost"] == pytest.approx(3 * 8 * found["hours"])
    assert found["cores_to_decode"] == pytest.approx(17_600 / 300 / 3), "an image is decoded once for three views"
    assert found["gradient_mb"] == pytest.approx(4 * 22.4, rel=0.01), "DeiT-S has 22.4 million weights with both heads"
    copies = 3 * (224**2 + 448**2)  # at train_px too, of which random crops are cut
    assert found["gib_in_memory"] == pytest.approx(found["images"] * copies / 2**30)
    assert found["bottleneck"] == "the devices: decoding and traffic keep up"


DIGITS = ["model.width=16", "model.depth=1", "model.heads=2", "train.batch_size=16", "train.epochs=5"]
SPEED = Cluster(images_per_second=1000.0, images=640, decoded_per_second=300.0, price=1.0)


def test_folds_variants_and_seeds_take_their_times_together() -> None:
    def planned(*overrides: str, given: Cluster = SPEED) -> dict[str, Any]:
        return plan(load_recipe("digits", [*DIGITS, *overrides]), given)

    alone = planned()
    assert (alone["views"], alone["parts"], alone["notes"]) == (640 * 5, {}, [])
    folds = planned("data.folds=5")
    for figure in ("views", "hours", "cost"):
        assert folds[figure] == pytest.approx(5 * alone[figure])
    assert list(folds["parts"]) == ["fold 1", "fold 2", "fold 3", "fold 4", "fold 5"]
    assert planned("data.folds=5", "data.fold=2")["hours"] == alone["hours"]
    variants = planned("variants={a: {train.epochs: 10}, b: {train.epochs: 20, methods: [none]}}", "seeds=[0, 1]")
    assert variants["views"] == 640 * 2 * (5 + 10 + 20)
    assert variants["hours"] == pytest.approx(alone["hours"] * 2 * (1 + 2 + 4))
    assert variants["parts"] == pytest.approx({name: alone["hours"] * 2 * n for name, n in zip("ab", (2, 4))} | {
        "base": alone["hours"] * 2
    })  # fmt: skip
    assert variants["notes"] == [
        "the given speed is taken for every variant, also for one with another model or other methods"
    ]
    decoding = planned("variants={a: {train.repeats: 2}}", "train.repeats=4", given=replace(SPEED, cores=1))
    assert decoding["cores_to_decode"] == pytest.approx(1000 / 300 / 2)
    assert decoding["bottleneck"].startswith("decoding: 2 cores")
    assert decoding["bottleneck"].endswith("stay in memory (a)"), "the base needs less than one core"
    baseline = planned("baseline.name=teacher")
    assert baseline["gradient_mb"] > alone["gradient_mb"], "it is one more student"
    assert "with the baseline" in baseline["notes"][0]
    at_hand = planned("data.folds=5", "data.train_images=null", given=Cluster(images_per_second=1000.0))
    assert 0.7 * 5 < at_hand["views"] / (1797 * 5) < 0.75 * 5, "a fold is tested on, a tenth of the rest validates"


def test_the_speed_of_equal_steps_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def bench_train(part: Recipe, **settings: Any) -> dict[str, float]:
        students = Bench(part, True).students(part.methods)
        measured.append([student.name for student in students])
        return {"images_per_second": 1000.0 / len(students)}

    monkeypatch.setattr("deitkit.bench.plan.bench_train", bench_train)
    given = Cluster(images=640, decoded_per_second=300.0)
    fields = [*DIGITS, "methods=[none]", "variants={a: {train.epochs: 10}, b: {baseline.name: teacher}}"]
    found = plan(load_recipe("digits", fields), given)
    assert measured == [["none"], ["none", "cnn-baseline"]]
    assert found["parts"]["a"] == pytest.approx(2 * found["parts"]["base"])
    assert found["parts"]["b"] == pytest.approx(2 * found["parts"]["base"])
    measured.clear()
    plan(load_recipe("digits", [*DIGITS, "methods=[none]", "data.folds=5"]), given)
    assert measured == [["none"]]


def test_what_limits_it_is_named() -> None:
    decoding = plan(IMAGENET, Cluster(**EIGHT | {"cores": 4}))
    assert decoding["bottleneck"].startswith("decoding: 20 cores would keep the devices busy, and 4 are there")
    link = plan(IMAGENET, Cluster(**EIGHT, link_gb_per_second=1.0))
    assert link["bottleneck"].startswith("the link: gradients of 90 MB take 157 ms of a step of 58 ms")


def test_a_set_at_hand_is_counted_and_a_speed_that_is_not_given_is_measured() -> None:
    digits = load_recipe("digits", ["model.width=16", "model.depth=1", "model.heads=2", "train.batch_size=16"])
    found = plan(digits, Cluster(devices=2))
    assert found["speed"] == "measured here"
    assert found["images_per_second"] > 1
    assert found["images"] == digits.data.train_images
    with pytest.raises(RecipeError, match=r"--images 8 is less than train\.batch_size=16"):
        plan(digits, Cluster(images=8))
    with pytest.raises(RecipeError, match="--speed inf is not a finite number"):
        plan(digits, Cluster(images_per_second=float("inf")))
    with pytest.raises(RecipeError, match="or say how many training images there are with --images"):
        plan(load_recipe("digits", ["data.name=folder:nowhere"]), Cluster())
    assert decode_rate(64, seconds=0.1) > 10


def test_the_command_prints_a_table_or_json(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    words: list[Any] = ["bench", "plan", "imagenet-deit-small-distilled", "--devices", 8, "--speed", 2200]
    words = [str(word) for word in [*words, "--decode", 300, "--cores", 128, "--price", 3]]
    code, printed, _ = run(*words)
    assert code == 0
    assert "6 h 0 min" in printed
    assert "limited by the devices" in printed
    code, printed, _ = run(*words, "--json")
    assert json.loads(printed)["devices"] == 8


def test_a_limit_to_the_images_holds_for_those_that_are_not_at_hand() -> None:
    few = load_recipe("imagenet-deit-tiny", ["data.train_images=10000"])
    assert plan(few, Cluster(**EIGHT))["images"] == 10_000
