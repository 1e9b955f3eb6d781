"""A teacher that takes larger images than the students: tested as it is used, and as it taught."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import TINY
from deitkit.comparison.compare import compare
from deitkit.comparison.teachers_only import train_teachers
from deitkit.comparison.verify import verify_run
from deitkit.evaluation.apply import evaluate_model
from deitkit.recipe.load import load_recipe
from deitkit.run.observer import Watcher


def write_stripes(folder: Path) -> str:
    """Write images of 32 px whose classes are stripes of different width, the narrow ones lost at 8 px."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 60), ("test", 30)):
        for name, width in (("narrow", 1), ("wide", 4), ("none", 64)):
            rows = (torch.arange(32) // width % 2).float() * 120
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = (rows[:, None, None] + 60 + 40 * torch.rand(32, 32, 3, generator=generator)).byte()
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{index}.png")
    return f"data.name=folder:{folder}"


def test_a_teacher_is_tested_as_it_is_used(tmp_path: Path) -> None:
    own = [
        *TINY, write_stripes(tmp_path / "photos"), "data.train_images=null", "data.test_images=null",
        "data.streaming=false", "device=cpu", "train.precision=fp32", "augment.crop=none",
    ]  # fmt: skip
    fields = [*own, "data.image_px=32", "teacher.train.epochs=6", "teacher.train.augment.crop=none"]
    train_teachers(load_recipe("digits", fields[:-1]), tmp_path / "cnn", watcher=Watcher())
    loaded = [f"teacher.name={tmp_path / 'cnn' / 'teacher'}", "teacher.image_px=32", "teacher.allow_weak=true"]
    recipe = load_recipe("digits", [*own, "data.image_px=8", "methods=[none, hard]", "train.epochs=1", *loaded])
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    teacher = results.teacher
    assert teacher is not None
    measured = evaluate_model(tmp_path / "run" / "teacher", f"folder:{tmp_path / 'photos'}")
    assert teacher.test_top1 == measured["readouts"][0]["top1"]
    assert teacher.view_test_top1 is not None
    assert teacher.test_top1 > teacher.view_test_top1 + 0.2
    hard = results.row("hard/class")
    assert hard is not None
    assert hard.top1_mean is not None
    assert hard.differences["teacher"].mean == pytest.approx(hard.top1_mean - teacher.test_top1)
    (note,) = (note for note in results.notes if "tested as it is used" in note)
    assert "on images of 32 px; on the students' 8 px, with which it taught, it scores" in note
    assert f"{100 * teacher.view_test_top1:.2f} %" in note
    assert verify_run(tmp_path / "run", Watcher()).holds
