"""The public Python API, as a user writes it."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deitkit
from deitkit.errors import RecipeError

FAST = {
    "data.image_px": 16, "data.train_images": 12,
    "model": {"name": "micro", "width": 16, "depth": 2, "heads": 2, "patch_px": 4},
    "train": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0}, "methods": ["none", "token-hard"], "baseline": None,
    "teacher": {
        "name": "cifar/resnet20", "allow_weak": True, "min_top1": None,
        "train": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
    },
    "progress": False,
}  # fmt: skip


def test_a_comparison_of_own_images(
    tmp_path: Path, write_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    result = deitkit.compare("own-images", data=f"folder:{photos}", **FAST)
    assert result.folder == Path("runs/own-images")
    assert [row.row for row in result.rows][:2] == ["none/class", "token-hard/class"]
    assert all(row.n == 24 for row in result.rows)
    assert result.winner is not None
    assert result.winner.class_names == ["cat", "dog"]
    (answer,) = result.winner.predict(photos / "test" / "cat" / "0.png")
    assert [name for name, _ in answer["classes"]] in (["cat", "dog"], ["dog", "cat"])
    assert len(result.winner.predict([photos / "test" / "cat", str(photos / "test" / "dog" / "0.png")], top=1)) == 13
    readouts = result.winner.evaluate(f"folder:{photos}")["readouts"]
    won = next(row for row in result.rows if row.row == result.results.winner)
    assert {entry["readout"]: entry["top1"] for entry in readouts}[won.readout] == won.top1[0]
    assert "none/class" in str(result)
    assert "(token-hard, joint)" in result._repr_markdown_()
    assert result.verdict in repr(result)
    assert deitkit.load_model(result.folder).card == result.winner.card

    more = deitkit.compare("own-images", data=f"folder:{photos}", **FAST | {"methods": ["none"]}, resume=True)
    assert [row.row for row in more.rows] == ["none/class"]
    with pytest.raises(RecipeError, match=r"train\.epochs was 1, now 2"):
        deitkit.compare("own-images", data=f"folder:{photos}", **FAST | {"train.epochs": 2}, resume=True)
    tuned = deitkit.finetune(result.folder, "own-images", data=f"folder:{photos}", **FAST | {"methods": ["none"]})
    assert tuned.rows[0].row.startswith("before/")
    alone = deitkit.train(
        "own-images",
        "soft",
        data=f"folder:{photos}",
        **{k: v for k, v in FAST.items() if k not in ("methods", "baseline")},
    )
    assert {row.method for row in alone.rows} == {"soft"}


def test_the_code_of_the_docs_runs(
    tmp_path: Path, write_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``docs/python.md`` as it is written, with a smaller training."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    first, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    photos = write_images(tmp_path / "photos")
    shutil.copy(photos / "test" / "cat" / "0.png", tmp_path / "x.jpg")
    names: dict[str, Any] = {"FAST": FAST}
    assert 'train={"epochs": 40}' in first
    exec(first.replace('train={"epochs": 40}', "**FAST"), names)
    assert names["result"].rows[0].method == "none"


def test_it_runs_in_a_thread_too(tmp_path: Path) -> None:
    found = []
    fields = {
        "train": {"epochs": 1, "batch_size": 16, "warmup_epochs": 0},
        "data.train_images": 32,
        "methods": ["none"],
    }
    work = threading.Thread(target=lambda: found.append(deitkit.compare("digits", out=tmp_path / "run", **fields)))
    work.start()
    work.join()
    assert found[0].rows


def test_recipes_are_changed_by_field_and_mistakes_are_sentences() -> None:
    recipe = deitkit.load_recipe("digits", train={"epochs": 3}, data="cifar10", seeds=[0, 1], **{"model.depth": 2})
    assert (recipe.train.epochs, recipe.data.name, recipe.seeds, recipe.model.depth) == (3, "cifar10", (0, 1), 2)
    assert deitkit.load_recipe(recipe) == recipe
    assert deitkit.load_recipe(recipe, train={"epochs": 5}).train.epochs == 5
    assert deitkit.load_recipe(recipe, train={"epochs": 5}).train.batch_size == recipe.train.batch_size
    with pytest.raises(RecipeError, match=r"unknown key 'train\.epoch': did you mean train\.epochs"):
        deitkit.load_recipe("digits", train={"epoch": 3})


def test_a_data_set_is_loaded_by_name() -> None:
    data = deitkit.load_dataset("digits", train_images=50)
    assert len(data.train) == 50
    assert data.train.images.dtype == torch.uint8
    assert "token-hard" in deitkit.METHODS


def test_importing_it_loads_nothing_and_lists_the_public_names() -> None:
    script = "import sys, deitkit\nassert not {'torch', 'numpy', 'timm'} & set(sys.modules)\n"
    script += "assert {'compare', 'load_model', 'METHODS'} <= set(dir(deitkit))\nprint(deitkit.compare.__name__)\n"
    script += "try:\n    deitkit.nothing\nexcept AttributeError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["compare", "module 'deitkit' has no attribute 'nothing'"]
