"""A comparison that grows: methods and seeds come and go, and the table is that of one run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CPU_FP32, TINY, StopAfter
from deitkit.comparison.ablation import compare_variants
from deitkit.comparison.cohort_states import PREDICTIONS, holds, plan_cohorts
from deitkit.comparison.compare import compare
from deitkit.comparison.winner import copy_winner
from deitkit.data.dataset import load_dataset
from deitkit.errors import CheckpointError, Interrupted, TeacherError
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import begin_run
from deitkit.run.metrics import read_metrics
from deitkit.run.observer import Watcher
from deitkit.run.results import read_results
from deitkit.run.state import load_tree, save_tree
from deitkit.teachers.prepare import dry_run_teachers
from deitkit.teachers.saved import origins
from run_helpers import Listener, assert_same_run, timeless

TinyRecipe = Callable[..., Recipe]
FIELDS = ("train.epochs=3", "train.ema_decay=0.9")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a comparison of two students, to compare with or to copy."""
    folder = tmp_path_factory.mktemp("once") / "run"
    compare(load_recipe("digits", [*TINY, "methods=[none, soft]", *FIELDS]), folder, watcher=Watcher())
    return folder


def grow(recipe: Recipe, folder: Path) -> Listener:
    watcher = Listener()
    compare(recipe, folder, watcher=watcher, resume=folder.exists())
    return watcher


def test_grown_in_three_steps_is_run_at_once(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    whole = tiny_recipe("methods=[none, hard, token-soft]", "seeds=[0, 1]", *FIELDS)
    compare(whole, tmp_path / "once", watcher=Watcher())
    grown = tmp_path / "grown"
    steps = (
        (("methods=[none]", "seeds=[0]"), {(0, "none")}),
        (("methods=[none, token-soft]", "seeds=[0]"), {(0, "token-soft")}),
        (
            ("methods=[none, hard, token-soft]", "seeds=[0, 1]"),
            {(0, "hard"), (1, "none"), (1, "hard"), (1, "token-soft")},
        ),
    )  # fmt: skip
    for changes, trained in steps:
        watcher = grow(tiny_recipe(*changes, *FIELDS), grown)
        assert watcher.trained == trained
    assert "seed-0: none, token-soft finished before; training hard" in watcher.heard
    assert_same_run(tmp_path / "once", grown)
    assert load_recipe(str(grown / "recipe.yaml")) == whole


def test_a_method_taken_out_leaves_the_table_and_keeps_its_folder(
    tiny_recipe: TinyRecipe, once: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(once, tmp_path / "run")
    whole = {path: path.read_bytes() for path in (folder / "seed-0" / "soft").iterdir()}
    before = timeless(json.loads((folder / "results.json").read_text()))
    watcher = grow(tiny_recipe("methods=[none]", *FIELDS), folder)
    assert not watcher.trained
    assert "seed-0: soft not a method of the recipe: left out of the table, its folder stays" in watcher.heard
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"none"}
    assert "soft" not in (folder / "metrics.jsonl").read_text()
    assert {path: path.read_bytes() for path in (folder / "seed-0" / "soft").iterdir()} == whole
    assert not grow(tiny_recipe("methods=[none, soft]", *FIELDS), folder).trained
    assert timeless(json.loads((folder / "results.json").read_text())) == before


def test_seeds_that_are_no_longer_named_are_told(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    grow(tiny_recipe("methods=[none]", "seeds=[0, 3]", "train.epochs=1"), folder)
    watcher = grow(tiny_recipe("methods=[none]", "seeds=[0]", "train.epochs=1"), folder)
    assert sum("seed 3 is not in the recipe: left out of the table" in line for line in watcher.heard) == 1
    watcher = grow(tiny_recipe("methods=[none]", "seeds=[0, 3]", "train.epochs=1"), folder)
    assert not watcher.trained
    assert not any("not in the recipe: left out" in line for line in watcher.heard)


def test_a_method_taken_out_in_the_middle_of_its_training_comes_back(
    tiny_recipe: TinyRecipe, once: Path, tmp_path: Path
) -> None:
    both = tiny_recipe("methods=[none, soft]", *FIELDS)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        compare(both, folder, watcher=StopAfter(25))
    state = load_tree(folder / "seed-0" / "checkpoint.safetensors")
    place = f"resuming at epoch {state['epoch'] + 1}, step {state['step'] + 1}"
    watcher = grow(tiny_recipe("methods=[none]", *FIELDS), folder)
    aside = folder / "seed-0" / "soft"
    assert f"soft is not in the comparison any more: its training so far stays in {aside}" in watcher.heard
    assert watcher.trained == {(0, "none")}
    assert list(load_tree(aside / "checkpoint.safetensors")["students"]) == ["soft"]
    watcher = grow(both, folder)
    assert f"seed 0: {place}" in watcher.heard
    assert watcher.trained == {(0, "soft")}
    assert_same_run(once, folder)
    assert not list(folder.rglob("checkpoint*.safetensors"))


def test_a_run_that_was_stopped_goes_on_before_what_is_new(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    whole = tiny_recipe("methods=[none, soft, hard]", *FIELDS)
    grow(whole, tmp_path / "once")
    with pytest.raises(Interrupted):
        compare(tiny_recipe("methods=[none, soft]", *FIELDS), tmp_path / "run", watcher=StopAfter(25))
    with pytest.raises(Interrupted):  # once more, in the cohort of what is new
        compare(whole, tmp_path / "run", watcher=StopAfter(22), resume=True)
    grow(whole, tmp_path / "run")
    assert_same_run(tmp_path / "once", tmp_path / "run")


def test_a_run_whose_newest_state_is_gone_grows_from_the_one_before(
    tiny_recipe: TinyRecipe, once: Path, tmp_path: Path
) -> None:
    both, often = tiny_recipe("methods=[none, soft]", *FIELDS), "speed.save_seconds=0.000001"
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        compare(tiny_recipe("methods=[none]", *FIELDS, often), folder, watcher=StopAfter(9))
    (folder / "seed-0" / "checkpoint.safetensors").unlink()
    assert (folder / "seed-0" / "checkpoint.before.safetensors").exists()
    assert grow(both, folder).trained == {(0, "none"), (0, "soft")}
    assert_same_run(once, folder)


def test_a_kill_between_two_students_that_are_kept_loses_neither(
    tiny_recipe: TinyRecipe, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tiny_recipe("methods=[none, soft]", *FIELDS)

    def killed(path: Path, tree: Any) -> None:
        if path.parent.name == "soft":
            raise KeyboardInterrupt
        save_tree(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr("deitkit.comparison.seed_run.save_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(both, tmp_path / "run", watcher=Watcher())
    assert (tmp_path / "run" / "seed-0" / "none" / PREDICTIONS).exists()
    grow(both, tmp_path / "run")
    assert_same_run(once, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("train.epochs=4", "train.epochs was 3, now 4"),
        ("train.learning_rate=0.5", "train.learning_rate was 0.01, now 0.5"),
        ("distillation.temperature=2", "distillation.temperature was 3.0, now 2.0"),
        ("seeds=[1, 0]", r"seeds was \[0\], now \[1, 0\]"),
        ("baseline={name: cifar/resnet20}", "baseline"),
    ],
)
def test_everything_else_that_changed_is_refused(
    change: str, sentence: str, tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    begin_run(tmp_path / "run", tiny_recipe("methods=[none]", *FIELDS))
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=sentence):
        grow(tiny_recipe("methods=[none, soft]", *FIELDS, change), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_an_ablation_grows_in_all_its_variants(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    fields = ("variants={sgd: {train.optimizer: sgd, train.learning_rate: 0.1}}", "train.epochs=1")
    compare_variants(tiny_recipe("methods=[none, hard]", *fields), tmp_path / "once", watcher=Watcher())
    compare_variants(tiny_recipe("methods=[none]", *fields), tmp_path / "run", watcher=Watcher())
    watcher = Listener()
    compare_variants(tiny_recipe("methods=[none, hard]", *fields), tmp_path / "run", watcher=watcher, resume=True)
    assert watcher.trained == {(0, "hard")}
    results = [timeless(json.loads((tmp_path / name / "results.json").read_text())) for name in ("once", "run")]
    assert results[0] == results[1]


def test_cohorts_are_planned_from_what_lies_in_the_folder(tmp_path: Path) -> None:
    home, heard = tmp_path / "seed-0", []

    def plan(*names: str) -> list[tuple[str, ...]]:
        cohorts = plan_cohorts(home, names, names, heard.append, 0.0, apart=False)
        assert not cohorts or holds(cohorts[0], home), "or it would be planned for ever"
        return [cohort.names for cohort in cohorts]

    assert plan("none", "soft") == [("none", "soft")]
    save_tree(home / "none" / PREDICTIONS, {})
    assert plan("none", "soft") == [("soft",)]
    state = {
        "epoch": 1,
        "step": 0,
        "students": {name: {"weights": torch.zeros(2)} for name in ("none", "soft", "hard")},
    }
    save_tree(home / "checkpoint.safetensors", state)
    assert plan("none", "soft", "hard", "dist") == [("soft", "hard"), ("dist",)]
    assert heard == []
    assert plan("none", "soft", "dist") == [("soft",), ("dist",)]
    assert len(heard) == 1
    assert plan("none", "soft", "hard", "dist") == [("soft", "hard"), ("dist",)], "the shared state still holds it"
    assert plan("none", "dist") == [("dist",)]
    assert not (home / "checkpoint.safetensors").exists()
    assert plan("none", "soft", "hard", "dist") == [("soft",), ("hard",), ("dist",)]
    shutil.rmtree(home)
    assert plan("none") == [("none",)]
    save_tree(home / "none" / "checkpoint.safetensors", state)  # of a unit that trained three students
    save_tree(home / "none" / "checkpoint.before.safetensors", state)
    assert plan("none", "soft") == [("none",), ("soft",)], "the third has left, and keeps its state"
    assert plan("none", "soft", "hard") == [("none",), ("soft",), ("hard",)]
    assert not list(home.glob("*/checkpoint.before.safetensors")), "which would still hold three"
    shutil.rmtree(home)
    save_tree(home / "none" / "checkpoint.safetensors", state | {"students": {"soft": {}}})  # without its owner
    assert plan("none", "soft") == [("soft",), ("none",)]
    assert not (home / "none" / "checkpoint.safetensors").exists()
    shutil.rmtree(home)
    save_tree(home / "none" / "checkpoint.safetensors", state)
    save_tree(home / "hard" / "checkpoint.safetensors", state | {"students": {"hard": {}}})  # killed while dividing it
    assert plan("none", "soft", "hard") == [("none", "soft", "hard")]
    assert not (home / "hard" / "checkpoint.safetensors").exists()


def test_a_run_goes_on_only_with_the_images_and_labels_that_it_was_begun_with(
    write_images: Callable[..., Path], tmp_path: Path
) -> None:
    photos = write_images(tmp_path / "photos")
    own = ("data.train_images=null", "data.test_images=null", "data.image_px=8", f"data.name=folder:{photos}")

    def run(methods: str, **fields: bool) -> Any:
        recipe = load_recipe("digits", [*TINY, *own, f"methods={methods}", "train.epochs=1"])
        return compare(recipe, tmp_path / "run", watcher=Watcher(), **fields)

    run("[none]")
    one, other = photos / "test" / "cat" / "3.png", photos / "test" / "dog" / "3.png"
    swapped = one.read_bytes(), other.read_bytes()
    one.write_bytes(swapped[1])
    other.write_bytes(swapped[0])
    with pytest.raises(CheckpointError, match=r"was begun with other images or labels than data\.name=.* has now"):
        run("[none, hard]", resume=True)
    one.write_bytes(swapped[0])
    other.unlink()
    with pytest.raises(CheckpointError, match="was begun with other images"):
        run("[none, hard]", resume=True)
    other.write_bytes(swapped[1])
    environment = tmp_path / "run" / "environment.json"
    whole = environment.read_text()
    for damaged in (whole[:-9], "[1]"):
        environment.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"environment\.json cannot be read: delete it, and check"):
            run("[none, hard]", resume=True)
    environment.write_text(whole)
    assert not (tmp_path / "run" / "seed-0" / "hard").exists(), "nothing was trained on them"
    assert [row.method for row in run("[none, hard]", resume=True).rows] == ["none", "hard"]


def test_another_winner_takes_no_file_that_was_exported_from_the_one_before(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    results = compare(tiny_recipe("methods=[none, hard]"), run, watcher=Watcher())
    files = [run / "winner" / name for name in ("model.onnx", "model.onnx.json", "notes.txt")]
    for file in files:
        file.write_text("x")
    homes = [run / "seed-0"]
    copy_winner(results, run, homes)
    assert all(file.exists() for file in files)
    (other,) = {"none/class", "hard/class"} - {results.winner}
    copy_winner(results.model_copy(update={"winner": other}), run, homes)
    assert [file.exists() for file in files] == [False, False, True]
    copy_winner(results.model_copy(update={"winner": None}), run, homes)
    assert not (run / "winner").exists()


def test_a_teacher_that_was_trained_on_test_images_is_refused(tmp_path: Path) -> None:
    fields = [*TINY, "methods=[none, hard]", "train.epochs=1", "data.train_images=null", "data.test_images=null"]
    compare(load_recipe("digits", fields), tmp_path / "first", watcher=Watcher())
    teacher = tmp_path / "first" / "teacher"
    given = [f"teacher.name={teacher}", "teacher.fit=none"]
    checkpoint = [f"teacher.checkpoint={teacher / 'model.safetensors'}", "teacher.fit=none"]
    for one in (given, checkpoint):
        with pytest.raises(TeacherError, match=r"of the test images of digits are training images of the teacher"):
            compare(load_recipe("digits", [*fields, *one, "data.split_seed=3"]), tmp_path / "other", watcher=Watcher())
    cut = tmp_path / "cut"
    shutil.copytree(teacher, cut)
    (cut / "model.json").write_text((teacher / "model.json").read_text()[:-9])
    damaged = load_recipe("digits", [*fields, f"teacher.checkpoint={cut / 'model.safetensors'}", "teacher.fit=none"])
    with pytest.raises(CheckpointError, match=r"model\.json is damaged"):
        compare(damaged, tmp_path / "other", watcher=Watcher())
    (cut / "model.json").write_text('{"format": "graph-model"}')  # of another program
    assert origins(damaged.teacher) == []
    variants = load_recipe("digits", [*fields, *given, "data.split_seed=3", "variants={sgd: {train.optimizer: sgd}}"])
    with pytest.raises(TeacherError, match=r"variant base: about .* of the test images of digits are training images"):
        compare_variants(variants, tmp_path / "other", watcher=Watcher())
    assert not (tmp_path / "other").exists()
    compare(load_recipe("digits", [*fields, *given]), tmp_path / "second", watcher=Watcher())
    handed_on = load_recipe("digits", [*fields, f"teacher.name={tmp_path / 'second' / 'teacher'}", "data.split_seed=3"])
    with pytest.raises(TeacherError, match=r"divide the data as for its training \(data\.split_seed=0"):
        compare(handed_on, tmp_path / "other", watcher=Watcher())
    again = load_recipe("digits", [*fields, *given, "data.image_px=16"])  # the same division, at another size
    dry_run_teachers(again, load_dataset(again.data), tmp_path / "new", CPU_FP32)
    other = again.model_copy(update={"data": again.data.model_copy(update={"split_seed": 3})})
    with pytest.raises(TeacherError, match=r"divide the data as for its training \(data\.split_seed=0 data\.test_f"):
        dry_run_teachers(other, load_dataset(other.data), tmp_path / "new", CPU_FP32)


def test_a_seed_taken_out_in_the_middle_of_its_training_keeps_its_metrics(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    both = tiny_recipe("methods=[none, soft]", "seeds=[0, 1]", *FIELDS)
    compare(both, tmp_path / "once", watcher=Watcher())
    with pytest.raises(Interrupted):
        compare(both, tmp_path / "run", watcher=StopAfter(42))
    assert any(line.seed == 1 for line in read_metrics(tmp_path / "run"))
    grow(tiny_recipe("methods=[none, soft]", "seeds=[0]", *FIELDS), tmp_path / "run")
    assert not any(line.seed == 1 for line in read_metrics(tmp_path / "run"))
    grow(both, tmp_path / "run")
    assert_same_run(tmp_path / "once", tmp_path / "run")


def test_a_full_disk_is_told_when_the_winner_is_copied(
    once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(once, tmp_path / "run")
    shutil.rmtree(folder / "winner")
    monkeypatch.setattr("deitkit.system.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match=r"cannot write '.*winner.*': no space left"):
        copy_winner(read_results(folder), folder, [folder / "seed-0"])


def test_a_resumed_run_may_ask_more_of_its_teacher(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    fields = ("methods=[hard]", "teacher.allow_weak=false", "data.train_images=640", "teacher.train.epochs=6")
    grow(tiny_recipe(*fields), tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    refusal = r"^teacher .* scores .* and is weak: is below teacher\.min_top1=1: lower teacher.min_top1, or set"
    with pytest.raises(TeacherError, match=refusal):
        grow(tiny_recipe(*fields, "teacher.min_top1=1.0"), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before, "and so it can still be analyzed"
    grow(tiny_recipe(*fields, "teacher.min_top1=1.0", "teacher.allow_weak=true"), tmp_path / "run")
    teacher = read_results(tmp_path / "run").teacher
    assert teacher is not None
    assert (teacher.weak, teacher.verdict) == (True, "weak, allowed by the recipe: is below teacher.min_top1=1")
