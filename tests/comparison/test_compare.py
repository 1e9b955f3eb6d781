"""The comparison end to end: what a run folder holds, that a stopped run ends the same, and every shipped recipe."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import CPU_FP32, TINY, StopAfter, poisoned_gradient, striped_dataset
from deitkit.comparison.ablation import compare_variants
from deitkit.comparison.compare import compare
from deitkit.data.dataset import load_dataset
from deitkit.distillation.methods import METHODS
from deitkit.errors import CheckpointError, DeitkitError, Interrupted, RecipeError
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
from deitkit.models.saved import load_classifier
from deitkit.recipe.load import load_recipe, shipped_recipes
from deitkit.recipe.schema import Recipe
from deitkit.report.write import write_report
from deitkit.run.folder import locked
from deitkit.run.observer import Watcher
from deitkit.training.build import build_students
from deitkit.training.cohort import Cohort
from deitkit.training.student import Student
from run_helpers import timeless

TinyRecipe = Callable[..., Recipe]


@pytest.mark.reports
def test_a_run_folder_holds_all_that_the_design_promises(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none, token-hard]", "baseline={name: cifar/resnet20}", "train.ema_decay=0.9",
                         "train.precision=fp32")  # fmt: skip
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    for name in (
        "recipe.yaml", "environment.json", "metrics.jsonl", "results.json", "report.html", "table.md", "table.csv",
        "table.tex", "curves.png", "curves.svg", "views.png", "teacher/card.json", "teacher/model.safetensors",
        "teacher/metrics.jsonl", "seed-0/none/model.safetensors", "seed-0/token-hard/model.json", "winner/model.json",
        "seed-0/cnn-baseline/model.safetensors", "seed-0/none+ema/model.safetensors",
    ):  # fmt: skip
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert not list((tmp_path / "run").rglob("*.pkl"))
    rows = {row.row: row for row in results.rows}
    assert set(rows) == {
        f"{name}{ema}"
        for ema in ("", "+ema")
        for name in (
            "none/class", "token-hard/class", "token-hard/distillation", "token-hard/joint", "token-hard/joint-logits",
            "cnn-baseline/class",
        )
    }  # fmt: skip
    assert "labels" not in rows["none/class"].differences
    assert rows["token-hard/joint"].differences["labels"].test == "McNemar"
    assert results.dataset.train == 64
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe

    # The table's figure is that of the saved weights on the test images.
    classifier, _ = load_classifier(tmp_path / "run" / "seed-0" / "token-hard", torch.device("cpu"))
    test = load_dataset(recipe.data).test
    scores = readout_scores(predict(classifier, test, CPU_FP32))["joint"]
    assert rows["token-hard/joint"].top1 == (top_k_accuracy(scores, test.labels),)
    before = (tmp_path / "run" / "table.csv").read_text()
    write_report(tmp_path / "run")
    assert (tmp_path / "run" / "table.csv").read_text() == before


def test_rows_over_seeds_have_spread_and_a_paired_test(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none, soft]", "seeds=[0, 1, 2]", "augment.cutmix=0", "augment.crop=none", *LEARNS)
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    soft = results.rows[1]
    mean = sum(soft.top1) / 3
    assert soft.top1_mean == pytest.approx(mean)
    assert soft.top1_std == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in soft.top1) / 2))
    assert soft.differences["labels"].test == "paired t"
    assert len(set(soft.top1)) > 1, "three seeds gave one figure"


@pytest.mark.parametrize("steps", [1, 5, 6, 9, 13, 17, 23])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tiny_recipe: TinyRecipe, tmp_path: Path, steps: int) -> None:
    recipe = tiny_recipe("methods=[none, token-hard]", "model.drop_path=0.1", "seeds=[0, 1]")
    whole = tmp_path.parent / "undisturbed"
    if not (whole / "results.json").exists():
        compare(recipe, whole, watcher=Watcher())
    with pytest.raises(Interrupted):
        compare(recipe, tmp_path / "run", watcher=StopAfter(steps))
    compare(recipe, tmp_path / "run", watcher=Watcher(), resume=True)
    for name in ("results.json", "metrics.jsonl", "teacher/metrics.jsonl"):
        texts = [(folder / name).read_text() for folder in (whole, tmp_path / "run")]
        trees = [[timeless(json.loads(line)) for line in text.splitlines()] if "jsonl" in name else
                 timeless(json.loads(text)) for text in texts]  # fmt: skip
        assert trees[0] == trees[1], name
    for path in whole.glob("seed-*/*/model.safetensors"):
        other = load_file(tmp_path / "run" / path.relative_to(whole))
        for name, value in load_file(path).items():
            assert torch.equal(value, other[name]), (path, name)


def test_a_clock_that_jumps_changes_nothing(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[none, token-hard]")
    steady = compare(recipe, tmp_path / "steady", watcher=Watcher())
    now, jumps = time.time, itertools.cycle((0, -(10**9), 3600, 10**9))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    with pytest.raises(Interrupted):
        compare(recipe, tmp_path / "jumping", watcher=StopAfter(9))
    jumping = compare(recipe, tmp_path / "jumping", watcher=Watcher(), resume=True)
    assert timeless(jumping.to_json()) == timeless(steady.to_json())
    assert all(0 < row.train_seconds < 3600 for row in jumping.rows)


def test_resume_of_an_ended_run_trains_nothing(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]", "train.epochs=1")
    compare(recipe, tmp_path / "run", watcher=Watcher())
    compare(recipe, tmp_path / "run", watcher=StopAfter(1), resume=True)


def test_folders_are_not_overwritten(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]", "train.epochs=1")
    with pytest.raises(Interrupted):
        compare(recipe, tmp_path / "run", watcher=StopAfter(1))
    with pytest.raises(CheckpointError, match="add --resume"):
        compare(recipe, tmp_path / "run", watcher=Watcher())
    with pytest.raises(CheckpointError, match=r"train\.epochs was 1, now 2"):
        compare(tiny_recipe("methods=[none]"), tmp_path / "run", watcher=Watcher(), resume=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="contains other files"):
        compare(recipe, tmp_path / "photos", watcher=Watcher(), resume=True)


def test_methods_start_from_the_same_weights(tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe("methods=[none, token-hard, distillation-only, mean-pool-none]")
    students = build_students(recipe, load_dataset(recipe.data), 3, CPU_FP32)
    states = [student.classifier.model.state_dict() for student in students]
    for state in states[1:]:
        assert torch.equal(states[0]["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
        assert torch.equal(states[0]["patch_embed.proj.weight"], state["patch_embed.proj.weight"])


def test_a_student_that_cannot_be_built_is_told_before_the_teacher_trains(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="patch"):
        compare(tiny_recipe("model.patch_px=3"), tmp_path / "run", watcher=Watcher())
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_stopped_student_is_a_row_that_says_so(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "backward", poisoned_gradient("hard", 5))
    results = compare(tiny_recipe("methods=[none, hard]"), tmp_path / "run", watcher=Watcher())
    none, hard = results.rows
    assert none.status == "ok"
    assert hard.status.startswith("seed 0 stopped at step 6: the loss or a weight is not finite (learning rate")
    assert hard.top1 == (None,)
    assert results.winner == "none/class"


LEARNS = ("data.train_images=320", "train.epochs=4", "train.optimizer=adamw", "train.learning_rate=0.004")
SHRUNK = (
    "model.width=24", "model.depth=1", "model.heads=2", "train.epochs=1", "train.warmup_epochs=0", "seeds=[0]",
    "teacher.checkpoint=null", "teacher.mean=null", "teacher.std=null", "teacher.pretrained=false",
    "teacher.name=cifar/resnet20", "teacher.min_top1=null", "teacher.allow_weak=true", "data.train_images=null",
    "teacher.image_px=null",  # at 384 px a step takes minutes
    "data.test_images=null", "data.image_px=null", "data.train_px=null", "data.eval_crop=1", "model.patch_px=4",
    "train.schedule_epochs=null", "train.batch_size=20", "teacher.train.epochs=1",
    "teacher.train.warmup_epochs=0", "teacher.train.batch_size=20",
)  # fmt: skip


DRAWN = ("digits", "cifar10-seed")  # one beside the paper's figures, one beside the reproduction's


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.reports if name in DRAWN else ()) for name in shipped_recipes()]
)
def test_every_shipped_recipe_trains_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name, SHRUNK)
    if recipe.baseline is not None:
        recipe = load_recipe(name, [*SHRUNK, "baseline.name=cifar/resnet20", "baseline.warmup_epochs=0"])
    px = 8 if recipe.data.name == "digits" else 32
    channels = 1 if recipe.data.name in ("digits", "fashion_mnist") else 3
    data = striped_dataset(classes=10, per_class=4, image_px=px, channels=channels)
    monkeypatch.setattr("deitkit.comparison.images.load_dataset", lambda *_, **settings: data)
    if recipe.variants:
        monkeypatch.setattr("deitkit.comparison.ablation.load_dataset", lambda *_, **settings: data)
        results = compare_variants(recipe, tmp_path / "run", watcher=Watcher())
        assert {row.variant for row in results.rows} == {"base", *recipe.variants}
    else:
        results = compare(recipe, tmp_path / "run", watcher=Watcher())
    assert {row.method for row in results.rows} - {"cnn-baseline"} == set(recipe.methods)
    assert all(row.status == "ok" for row in results.rows)


def test_a_cohort_of_every_method_trains(tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe(f"methods={list(METHODS)}")
    data = load_dataset(recipe.data)
    students = build_students(recipe, data, 0, CPU_FP32)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).requires_grad_(False)
    cohort = Cohort(
        students, teacher=teacher, dataset=data, augment=recipe.augment, train=recipe.train,
        speed=recipe.speed,
       precision=CPU_FP32, seed=0,
    )  # fmt: skip
    records = next(cohort.fit())
    assert [record.student for record in records] == list(METHODS)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_saves_and_resume_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from deitkit.cli.main import main; main()", "compare", "digits", *TINY]
    command += ["methods=[none]", "train.epochs=400", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "seed-0" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ((), "train.batch_size=32 and teacher.train.batch_size=32 exceed the 18 training images: use at most 18"),
        (("train.batch_size=16",), "teacher.train.batch_size=32 exceeds the 18 training images: use at most 18"),
        (("teacher.train.batch_size=16",), "train.batch_size=32 exceeds the 18 training images: use at most 18"),
    ],
)
def test_a_batch_of_more_images_than_there_are_is_named_before_anything_trains(
    write_images: Callable[..., Path], tmp_path: Path, fields: tuple[str, ...], sentence: str
) -> None:
    photos = write_images(tmp_path / "photos", count=10)
    recipe = load_recipe("own-images", [f"data.name=folder:{photos}", "data.image_px=16", *fields])
    with pytest.raises(DeitkitError, match=f"^{re.escape(sentence)}"):
        compare(recipe, tmp_path / "run", watcher=Watcher())
    assert not (tmp_path / "run").exists()


def test_a_finished_model_that_cannot_be_read_is_named_with_what_to_do(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tiny_recipe("methods=[none, hard]", "train.epochs=1")
    table = compare(recipe, run, watcher=Watcher()).rows
    for number, (name, content) in enumerate(
        [("seed-0/none/model.json", None), ("seed-0/none/model.json", b"{}"), ("seed-0/hard/model.safetensors", None),
         ("seed-0/hard/model.safetensors", b"cut"), ("teacher/card.json", b"{}"), ("teacher/model.json", None)]
    ):  # fmt: skip
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        home = (copy / name).parent
        with pytest.raises(CheckpointError, match="put its files back, or delete the folder, and --resume") as told:
            compare(recipe, copy, watcher=Watcher(), resume=True)
        assert str(told.value).startswith(f"{home} is finished, but cannot be read (")
        shutil.rmtree(home)
    again = compare(recipe, copy, watcher=Watcher(), resume=True)
    assert [row.top1 for row in again.rows] == [row.top1 for row in table]


def test_a_run_folder_may_be_moved_while_it_is_locked(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
        (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "kept").exists()


def test_a_disk_that_is_full_for_a_moment_costs_only_tensorboards_files(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deitkit.training.fit.SummaryWriter.add_scalar", full)
    assert compare(tiny_recipe("methods=[none]"), tmp_path / "one", watcher=Watcher()).winner is not None
    monkeypatch.setattr("deitkit.training.fit.SummaryWriter", full)
    assert compare(tiny_recipe("methods=[none]"), tmp_path / "two", watcher=Watcher()).winner is not None


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ("teacher.checkpoint=gone.pth", r"gone\.pth does not exist: check its name"),
        ("baseline.checkpoint=gone.pth", r"gone\.pth does not exist: check its name"),
        ("teacher.name=timm/resnet19", r"teacher\.name='timm/resnet19' is unknown: did you mean timm/resnet18"),
        ("teacher.name=own/mine", "'own/mine' is not registered.*import the module that registers it"),
        ("baseline.name=cifar/resnet21", r"baseline\.name='cifar/resnet21' is unknown"),
    ],
)
def test_what_a_recipe_names_but_does_not_exist_is_told_before_images_are_decoded(
    change: str, mistake: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deitkit.comparison.prepare.load_images", lambda *_: pytest.fail("it reads the images first"))
    recipe = tiny_recipe("methods=[hard]", change)
    with pytest.raises(DeitkitError, match=mistake):
        compare(recipe, tmp_path / "run", watcher=Watcher())
