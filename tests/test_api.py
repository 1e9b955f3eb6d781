"""The public Python API, as a user writes it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from PIL import Image

import deitkit
from deitkit.api import Model
from deitkit.errors import DataError, Interrupted, RecipeError
from deitkit.models.accelerate import RECOMPILATIONS, accelerate
from deitkit.models.classifier import Classifier
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import begin_run
from deitkit.run.observer import Watcher

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
    drawn = torch.get_rng_state()
    result = deitkit.compare("own-images", data=f"folder:{photos}", **FAST)
    assert torch.equal(torch.get_rng_state(), drawn), "the caller's own draws go on"
    assert result.folder == tmp_path / "runs" / "own-images", "whatever the working directory becomes"
    assert [row.row for row in result.rows][:2] == ["none/class", "token-hard/class"]
    assert all(row.n == 24 for row in result.rows)
    assert result.winner is not None
    assert result.winner.class_names == ["cat", "dog"]
    assert result.winner is result.winner, "which keeps its weights in memory"
    (answer,) = result.winner.predict(photos / "test" / "cat" / "0.png")
    assert [name for name, _ in answer["classes"]] in (["cat", "dog"], ["dog", "cat"])
    assert len(result.winner.predict([photos / "test" / "cat", str(photos / "test" / "dog" / "0.png")], top=1)) == 13
    check_images_and_arguments(result.winner, photos / "test" / "cat" / "0.png")
    decomposed = photos / "test" / "cat" / "e\u0301.png"  # as a Mac unpacks it
    shutil.copy(photos / "test" / "cat" / "0.png", decomposed)
    (named,) = result.winner.predict(decomposed)
    assert named == answer | {"image": unicodedata.normalize("NFC", str(decomposed))}
    decomposed.unlink()
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


def check_images_and_arguments(model: Model, photo: Path) -> None:
    """Images of Pillow are answered as their files are; what is no image or data set is a sentence."""
    other = photo.with_name("1.png")
    twice = model.predict([photo, other, photo])
    assert [each["image"] for each in twice] == [str(photo), str(other), str(photo)]
    nested = photo.parent / "more" / "scan"  # without a suffix it is no image of its folder
    nested.parent.mkdir()
    shutil.copy(photo, nested)
    shutil.copy(photo, nested.with_name("2.png"))
    several = [each["image"] for each in model.predict([nested.parent, nested, nested.with_name("2.png")])]
    assert several == [str(nested.with_name("2.png")), str(nested), str(nested.with_name("2.png"))]
    shutil.rmtree(nested.parent)
    answer, of_file, again = model.predict([Image.open(photo), photo, Image.open(photo)])
    assert answer == of_file | {"image": "images[0]"}
    assert again["image"] == "images[2]"
    assert model.predict(Image.open(photo)) == [answer]
    assert model.predict(file for file in [photo]) == [of_file]
    turned = Image.open(photo)
    turned.getexif()[0x0112] = 3
    assert model.predict(turned)[0]["classes"] == model.predict(turned.rotate(180))[0]["classes"]
    with pytest.raises(DataError, match="images is empty: give at least one"):
        model.predict([])
    with pytest.raises(DataError, match=r"images: an image of Pillow cannot be read .* convert it to RGB"):
        model.predict(Image.new("F", (8, 8)))
    with pytest.raises(DataError, match=r"images: an image of Pillow cannot be read .* or leave it out"):
        model.predict(Image.open(photo).crop((5, 5, 5, 9)))
    with pytest.raises(RecipeError, match="top is True"):
        model.predict(photo, top=True)
    told = told_by("model.predict(numpy.zeros((8, 8, 3)))", "model.predict(None)", "model.evaluate(None)",
                   "model.evaluate(deitkit.load_dataset('digits'))", "model.evaluate('digits', root=5)",
                   model=model.folder)  # fmt: skip
    assert [line.partition(":")[0] for line in told] == [
        "images", "images", "data is of the type NoneType", "data is of the type Dataset", "root",
    ]  # fmt: skip
    assert "ndarray is neither a path nor an image of Pillow" in told[0]


def told_by(*calls: str, model: Path | None = None) -> list[str]:
    """Return the sentence of each call, in a process that does not check the types of arguments, as a user's."""
    script = "import deitkit, numpy\nfrom deitkit.errors import DeitkitError\n"
    script += f"model = deitkit.load_model({str(model)!r})\n" if model is not None else ""
    for call in calls:
        script += f"try:\n    {call}\nexcept DeitkitError as error:\n    print(error)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def test_an_argument_of_a_wrong_type_is_a_sentence() -> None:
    assert told_by(
        "deitkit.compare(None, train={'epochs': 'no'})",
        "deitkit.compare('digits', out=5)",
        "deitkit.load_model(None)",
        "deitkit.finetune(None, 'digits')",
        "deitkit.load_dataset(None)",
    ) == [
        "recipe is None: name a shipped recipe (see `deitkit recipes`) or a YAML file",
        "out: int is not a path: name a file or folder, as text or a Path",
        "path: NoneType is not a path: name a file or folder, as text or a Path",
        "checkpoint: NoneType is not a path: name a file or folder, as text or a Path",
        "data.name=None: input should be text",
    ]
    assert told_by("deitkit.train('digits', 'none', methods=['soft'])") == [
        "methods: train has one student, under its method; use compare for more"
    ]
    for line in told_by("deitkit.train('digits', None)", "deitkit.train('digits', ['none'])"):
        assert "is not a method; did you mean none" in line


def test_the_code_of_the_docs_runs(
    tmp_path: Path,
    write_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``docs/python.md`` as it is written, with a smaller training."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    first, tracker, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    photos = write_images(tmp_path / "photos")
    shutil.copy(photos / "test" / "cat" / "0.png", tmp_path / "x.jpg")
    names: dict[str, Any] = {"FAST": FAST}
    assert 'train={"epochs": 40}' in first
    exec(first.replace('train={"epochs": 40}', "**FAST"), names)
    assert names["result"].rows[0].method == "none"
    names["SMALL"] = {key: value for key, value in FAST.items() if key != "progress"} | {"data": f"folder:{photos}"}
    exec(tracker.replace('"digits",', '"own-images", **SMALL,'), names)
    assert "seed 0 none 1 {'class': " in capsys.readouterr().out


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
    for seeds in (range(3), np.arange(3), torch.arange(3), (0, 1, 2)):
        assert deitkit.load_recipe("digits", seeds=seeds).seeds == (0, 1, 2)
    assert deitkit.load_recipe("digits", methods=[deitkit.METHODS["none"], "soft"]).methods == ("none", "soft")
    assert deitkit.load_recipe("digits", methods=deitkit.METHODS.keys()).methods == tuple(deitkit.METHODS)
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
    more = deitkit.load_dataset("digits", train_images=50, unlabelled="rest").unlabelled
    assert more is not None
    assert len(more) == 1294 - 50


def test_importing_it_loads_nothing_and_lists_the_public_names() -> None:
    script = "import sys, deitkit\nassert not {'torch', 'numpy', 'timm'} & set(sys.modules)\n"
    script += "assert {'compare', 'load_model', 'METHODS'} <= set(dir(deitkit))\nprint(deitkit.compare.__name__)\n"
    script += "try:\n    deitkit.nothing\nexcept AttributeError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["compare", "module 'deitkit' has no attribute 'nothing'"]


@pytest.mark.parametrize("model", ["deit_small", {"name": "deit_small", "depth": 3}])
def test_a_recipe_takes_fields_as_its_name_does(model: Any) -> None:
    named = deitkit.load_recipe("own-images", model=model)
    assert deitkit.load_recipe(deitkit.load_recipe("own-images"), model=model) == named
    assert named.model.width is None, "that of deit_small"


def test_threads_train_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running, most = 0, 0

    def run_recipe(recipe: Recipe, folder: Path, **settings: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        begin_run(folder, recipe)
        time.sleep(0.05)
        running -= 1
        raise DataError("enough")

    def compare() -> None:
        with suppress(DataError):
            deitkit.compare("digits")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deitkit.api.run_recipe", run_recipe)
    threads = [threading.Thread(target=compare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "digits-2", "digits-3"]


def test_the_callers_random_numbers_go_on_on_every_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept: list[list[int]] = []

    def fork_rng(devices: Sequence[int]) -> Any:
        kept.append([*devices])
        return nullcontext()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with pytest.raises(DataError):
        deitkit.compare("digits", **{"data.name": f"folder:{tmp_path / 'absent'}"})
    assert kept == [[0, 1]]


def test_what_is_no_recipe_or_value_of_one_is_a_sentence() -> None:
    told = told_by(
        "deitkit.compare({'train': 1})", "deitkit.compare('digits', teacher=__import__('torch').nn.Flatten())"
    )
    assert told[0].startswith("recipe is of the type dict: name a shipped recipe or a YAML file")
    assert told[1].startswith("a Flatten of torch is not a value of a recipe: save its state_dict() with safetensors")


def test_characters_beyond_16_bits_and_the_home_folder_are_what_they_say(
    tmp_path: Path, write_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert deitkit.load_recipe("digits", name="run \U0001f680").name == "run \U0001f680"
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "\U0001f680", "methods": ["none"]}))
    assert deitkit.load_recipe("~/recipe.yaml").name == "\U0001f680"
    with pytest.raises(RecipeError, match="is not valid YAML"):
        deitkit.load_recipe("digits", name="\ud83d")
    photos = write_images(tmp_path / "\U0001f600")
    assert len(deitkit.load_dataset(f"folder:{photos}", image_px=8).test) == 24
    recipe = deitkit.load_recipe("digits", **{"teacher.checkpoint": "~/w.pth", "teacher.name": "~/teacher"})
    assert recipe.teacher.checkpoint == tmp_path / "w.pth"
    assert recipe.teacher.name == str(tmp_path / "teacher")
    monkeypatch.setattr("deitkit.api.run_recipe", lambda recipe, folder, **_: pytest.fail(f"in {folder}"))
    with pytest.raises(pytest.fail.Exception, match=f"in {tmp_path / 'out'}"):
        deitkit.compare("digits", out="~/out")


def test_an_interrupt_saves_whoever_watches(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    class Interrupting(Watcher):
        def epoch(self, title: str, metrics: list[Any]) -> None:
            if title.startswith("seed"):
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    fields = FAST | {
        "data": f"folder:{write_images(tmp_path / 'photos')}",
        "methods": ["none"],
        "progress": Interrupting(),
    }
    with pytest.raises(Interrupted):
        deitkit.compare("own-images", out=tmp_path / "run", **fields | {"train": FAST["train"] | {"epochs": 3}})
    assert (tmp_path / "run" / "seed-0" / "checkpoint.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_no_field_is_dropped_without_a_word() -> None:
    with pytest.raises(RecipeError, match=r"baseline\.name: train has one student"):
        deitkit.train("digits", "none", **{"baseline.name": "cifar/resnet20"})
    with pytest.raises(RecipeError, match="METHODS has another method of the name 'soft'"):
        deitkit.train("digits", replace(deitkit.METHODS["soft"], title="mine"))
    assert deitkit.load_recipe("digits", baseline={}).baseline is not None
    assert deitkit.load_recipe("digits", train={}) == deitkit.load_recipe("digits")


def test_the_callers_compiler_keeps_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = torch._dynamo.config
    before = settings.recompile_limit, settings.fail_on_recompile_limit_hit

    def compiled(recipe: Recipe, folder: Path, **_: Any) -> Any:
        student = torch.nn.Identity()
        accelerate(Classifier(student, mean=(0.5,), std=(0.5,)), recipe.speed, torch.device("cpu"))
        assert (settings.recompile_limit, settings.fail_on_recompile_limit_hit) == (RECOMPILATIONS, True)
        raise RecipeError("seen")

    monkeypatch.setattr("deitkit.api.run_recipe", compiled)
    with pytest.raises(RecipeError, match="seen"):
        deitkit.compare("digits", speed={"compile": True}, out=tmp_path / "run", progress=False)
    assert (settings.recompile_limit, settings.fail_on_recompile_limit_hit) == before
