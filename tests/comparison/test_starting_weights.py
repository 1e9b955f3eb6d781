"""Students of a comparison that start from a checkpoint: what they hold, and what is recorded of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import CPU_FP32
from deitkit.comparison.compare import compare
from deitkit.data.dataset import load_dataset
from deitkit.errors import CheckpointError
from deitkit.models.weights.read import file_sha256
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.training.build import build_students
from run_helpers import Listener

TinyRecipe = Callable[..., Recipe]


def test_a_comparison_goes_on_from_the_winner_of_another(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    compare(tiny_recipe("methods=[none]", "train.epochs=1"), tmp_path / "first", watcher=Watcher())
    file = tmp_path / "first" / "winner" / "model.safetensors"
    recipe = tiny_recipe("methods=[none, token-hard]", "train.epochs=1", f"model.checkpoint={tmp_path / 'first'}")
    start = load_file(file)
    for student in build_students(recipe, load_dataset(recipe.data), 0, CPU_FP32):
        state = student.classifier.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in start.items() if name != "pos_embed")
        assert torch.equal(state["pos_embed"][:, -4:], start["pos_embed"][:, -4:])

    watcher = Listener()
    results = compare(recipe, tmp_path / "second", watcher=watcher)
    name = f"first (sha256 {file_sha256(file)[:8]})"
    tokens = "token-hard: tokens: class -> class+distillation; distillation token and head start as copies of the class"
    assert f"students start from {name}" in watcher.heard
    assert any(line.startswith(tokens) for line in watcher.heard)
    assert results.initial == name
    assert f"Students start from {name}." in results.notes
    card = json.loads((tmp_path / "second" / "seed-0" / "token-hard" / "model.json").read_text())
    assert card["initial"] == name


def test_without_a_checkpoint_nothing_is_said_and_none_is_recorded(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    watcher = Listener()
    results = compare(tiny_recipe("methods=[none]", "train.epochs=1"), tmp_path / "run", watcher=watcher)
    assert results.initial is None
    assert not [line for line in watcher.heard if "start" in line]


def test_weights_of_another_size_end_the_run_before_it_begins(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    compare(tiny_recipe("methods=[none]", "train.epochs=1"), tmp_path / "first", watcher=Watcher())
    recipe = tiny_recipe("methods=[none]", "model.width=32", f"model.checkpoint={tmp_path / 'first'}")
    with pytest.raises(CheckpointError, match=r"is 16 wide and has 2 blocks, the student 32 and 2: set model.width=16"):
        compare(recipe, tmp_path / "second", watcher=Watcher())
    assert not (tmp_path / "second").exists()


def test_the_row_before_has_the_heads_of_the_students(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    compare(tiny_recipe("methods=[none]", "train.epochs=2"), tmp_path / "first", watcher=Watcher())
    bare = tmp_path / "bare.safetensors"  # without a card, nothing tells that it has two heads of 8
    shutil.copy(tmp_path / "first" / "winner" / "model.safetensors", bare)
    still = ("train.optimizer=sgd", "train.learning_rate=1e-12", "train.weight_decay=0", "train.epochs=1")
    card = json.loads((tmp_path / "first" / "winner" / "model.json").read_text())
    assert card["config"]["heads"] == 2
    named = ("model.heads=null", "train.precision=fp32")  # two, those of its named size
    recipe = tiny_recipe("methods=[none]", f"model.checkpoint={bare}", *named, *still)
    rows = {row.row: row for row in compare(recipe, tmp_path / "second", watcher=Watcher()).rows}
    assert rows["before/class"].top1 == rows["none/class"].top1, "which did not move"


def test_a_run_does_not_mix_students_of_two_starting_points(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = tmp_path / "first"
    for seed, out in ((0, first), (1, tmp_path / "other")):
        compare(tiny_recipe("methods=[none]", "train.epochs=1", f"seeds=[{seed}]"), out, watcher=Watcher())
    fields = ("train.epochs=1", f"model.checkpoint={first}")
    compare(tiny_recipe("methods=[none]", *fields), tmp_path / "run", watcher=Watcher())
    shutil.copytree(tmp_path / "other" / "winner", first / "winner", dirs_exist_ok=True)  # as after it has grown
    with pytest.raises(CheckpointError, match="was begun with another version of the initial weights than is here now"):
        compare(tiny_recipe("methods=[none, hard]", *fields), tmp_path / "run", watcher=Watcher(), resume=True)


def test_initial_weights_that_are_gone_are_named(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    compare(tiny_recipe("methods=[none]", "train.epochs=1"), tmp_path / "first", watcher=Watcher())
    fields = ("train.epochs=1", f"model.checkpoint={tmp_path / 'first'}")
    compare(tiny_recipe("methods=[none]", *fields), tmp_path / "run", watcher=Watcher())
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(tiny_recipe("methods=[none, hard]", *fields), tmp_path / "run", watcher=Watcher(), resume=True)
