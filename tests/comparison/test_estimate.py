"""How long a comparison says that it will take, and that saying it changes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import CPU_FP32, StopAfter
from deitkit.comparison import estimate
from deitkit.comparison.compare import compare
from deitkit.comparison.estimate import estimate_training
from deitkit.comparison.units import PREPARE, run_unit
from deitkit.data.dataset import load_dataset
from deitkit.errors import Interrupted
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision
from deitkit.system.words import duration_text
from run_helpers import Listener, assert_same_run

TinyRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.0, "89 s"), (91.0, "2 min"), (3590.0, "1 h 0 min"), (11100.0, "3 h 5 min")]
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is estimated, by a clock that ticks at each look."""
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    ticks = iter(range(10**6))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("_ticking")
def test_an_estimate_grows_with_the_run_and_shrinks_as_it_is_done(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[none, soft]", "train.epochs=3", "seeds=[0, 1]")
    data, folder = load_dataset(recipe.data), tmp_path / "run"

    def seconds(recipe: Recipe, precision: Precision = CPU_FP32) -> tuple[float, float] | None:
        found = estimate_training(recipe, data, folder, precision)
        return None if found is None else (found.teachers, found.students)

    steps, timed = len(data.train) // 16, estimate.TIMED_STEPS
    teacher, students = seconds(recipe) or (0, 0)
    # With a clock that ticks at each look, a step of a teacher or of a cohort takes a fixed number of ticks.
    ticks_of_teacher = teacher * timed / (steps * recipe.teacher.train.epochs)
    ticks_of_cohort = students * timed / (steps * recipe.train.epochs * 2)
    assert ticks_of_teacher == pytest.approx(round(ticks_of_teacher))
    assert ticks_of_cohort == pytest.approx(round(ticks_of_cohort))
    longer = tiny_recipe("methods=[none, soft]", "train.epochs=9", "seeds=[0, 1]")
    assert seconds(longer) == pytest.approx((teacher, 3 * students))
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    compare(tiny_recipe("methods=[none, soft]", "train.epochs=3"), folder, watcher=Watcher())
    found = estimate_training(recipe, data, folder, CPU_FP32)
    assert found is not None
    assert found.teachers == 0.0, "it is there"
    assert "teacher" not in str(found)
    assert estimate_training(recipe.model_copy(update={"seeds": (0,)}), data, folder, CPU_FP32) is None


def test_a_training_that_units_have_begun_is_not_estimated(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    recipe = tiny_recipe("methods=[none]", "train.epochs=6")
    run_unit(recipe, tmp_path, PREPARE, watcher=Watcher())
    data = load_dataset(recipe.data)
    assert estimate_training(recipe, data, tmp_path, CPU_FP32) is not None
    with pytest.raises(Interrupted):
        run_unit(recipe, tmp_path, "seed-0/none", watcher=StopAfter(5))
    assert estimate_training(recipe, data, tmp_path, CPU_FP32) is None


@pytest.mark.usefixtures("_ticking")
def test_a_teacher_of_all_images_is_estimated_on_all(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    times = []
    for every in ("false", "true"):
        recipe = tiny_recipe("methods=[soft]", f"teacher.all_images={every}")
        found = estimate_training(recipe, load_dataset(recipe.data), tmp_path, CPU_FP32)
        assert found is not None
        times.append(found.teachers)
    assert times[1] / times[0] == pytest.approx((1294 // 16) / (64 // 16), rel=0.3)


def test_an_estimate_changes_nothing(tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("methods=[none, token-hard]", "model.drop_path=0.1", "model.dropout=0.1")
    compare(recipe, tmp_path / "without", watcher=Watcher())
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    watcher = Listener()
    compare(recipe, tmp_path / "with", watcher=watcher)
    (line,) = [line for line in watcher.heard if line.startswith("training will take about")]
    assert "on this machine (teacher" in line
    assert_same_run(tmp_path / "without", tmp_path / "with")


def test_of_a_cross_validation_each_fold_is_estimated(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    recipe = tiny_recipe("methods=[none]", "data.folds=3", "data.fold=2")
    found = estimate_training(recipe, load_dataset(recipe.data), tmp_path / "run", CPU_FP32)
    assert str(found).startswith("fold 2 of 3 will take about")


def test_no_teacher_is_built_where_no_method_has_one(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    recipe = tiny_recipe("methods=[none]", f"teacher.checkpoint={tmp_path / 'absent.pth'}")
    found = estimate_training(recipe, load_dataset(recipe.data), tmp_path / "run", CPU_FP32)
    assert found is not None
    assert found.teachers == 0.0
    assert found.students > 0


def test_short_runs_and_gpus_are_not_estimated(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]")
    data = load_dataset(recipe.data)
    assert estimate_training(recipe, data, tmp_path, CPU_FP32) is None
    long = tiny_recipe("methods=[none]", "train.epochs=100000")
    assert estimate_training(long, data, tmp_path, Precision(torch.device("cuda"), torch.float32)) is None


def test_a_grown_run_is_estimated_with_its_own_teacher(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tiny_recipe("methods=[hard]"), tmp_path / "first", watcher=Watcher())
    given = f"teacher.name={tmp_path / 'first' / 'teacher'}"
    compare(tiny_recipe("methods=[hard]", given), tmp_path / "run", watcher=Watcher())
    shutil.rmtree(tmp_path / "first")
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    watcher = Listener()
    compare(tiny_recipe("methods=[hard, soft]", given), tmp_path / "run", watcher=watcher, resume=True)
    assert any(line.startswith("training will take about") for line in watcher.heard)
    assert watcher.trained == {(0, "soft")}
