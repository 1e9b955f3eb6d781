"""Pretrained weights by name: fetched once through timm, adapted to the students, and their mistakes in a sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from deitkit.cli.compare import _compare
from deitkit.comparison.compare import compare
from deitkit.comparison.finetune import start_from
from deitkit.errors import CheckpointError, RecipeError
from deitkit.models.vit import create_student
from deitkit.models.weights.initialise import load_initial_weights, read_weights
from deitkit.models.weights.pretrained import fetch, licence_of, with_pretrained_size
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import ModelRecipe
from deitkit.run.folder import begin_run
from deitkit.run.observer import Watcher

NAME = "timm/deit_tiny_distilled_patch16_224"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put random weights where timm finds its own, as its cache does; return the names that were asked for."""
    asked: list[str] = []
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path / "cache"))

    def find(card: object) -> tuple[dict[str, str], None]:
        architecture = card.architecture  # type: ignore[attr-defined]
        asked.append(architecture)
        torch.manual_seed(0)
        path = tmp_path / f"{architecture}.safetensors"
        save_file(timm.create_model(architecture).state_dict(), path)
        return {"file": str(path)}, None

    monkeypatch.setattr("deitkit.models.timm_models.find_timm_file", find)
    return asked


def test_weights_are_timms_and_fetched_once(downloaded: list[str]) -> None:
    folder = fetch(NAME)
    assert fetch(NAME) == folder
    assert downloaded == ["deit_tiny_distilled_patch16_224"]
    weights = read_weights(folder)
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    assert (weights.mean, weights.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not weights.assumes_heads
    assert licence_of(folder) == "apache-2.0"
    model = ModelRecipe(name="deit_tiny", patch_px=16)
    student = create_student(
        model, image_px=(224, 224), channels=3, classes=1000, tokens=("class", "distillation"), seed=0
    )
    load_initial_weights(student, folder, mean=weights.mean, std=weights.std)
    view = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        output = student.eval()(view)
        torch.testing.assert_close((output.class_logits + output.distillation_logits) / 2, theirs(view))


def test_the_size_is_that_of_the_weights() -> None:
    recipe = load_recipe("own-images", [f"model.pretrained={NAME}"]).model
    sized = with_pretrained_size(recipe)
    assert (sized.name, sized.width, sized.depth, sized.heads) == ("deit_tiny", 192, 12, 3)
    assert sized.patch_px == 8, "the recipe's patches stay: the embedding is resized"
    base = ModelRecipe(name="vit_base", pretrained="timm/vit_base_patch16_224")
    assert with_pretrained_size(base).name == "vit_base", "two names have this size"
    assert with_pretrained_size(sized) == sized
    free = with_pretrained_size(ModelRecipe(pretrained="timm/vit_small_patch32_224"))
    assert (free.name, free.patch_px) == ("deit_small", 32)
    plain = ModelRecipe(name="micro")
    assert with_pretrained_size(plain) is plain


@pytest.mark.parametrize("override", ["model.name=deit_small", "model.width=64", "model.depth=3"])
def test_a_size_that_is_not_the_weights_is_refused(override: str) -> None:
    recipe = load_recipe("own-images", [f"model.pretrained={NAME}", override])
    with pytest.raises(CheckpointError, match=rf"{override}.*has model.width=192 model.depth=12 model.heads=3: drop"):
        with_pretrained_size(recipe.model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/deit_tiny_distiled_patch16_224", "did you mean timm/deit_tiny_distilled_patch16_224"),
        ("deit_tiny_patch16_224", "is not a model of timm"),
        ("timm/resnet18", "not a vision transformer with a class token"),
        ("timm/vit_base_patch16_siglip_224", "not a vision transformer with a class token"),
        ("timm/deit_tiny_patch16_224/../../x", "is not a model of timm"),
        ("", "is not a model of timm"),
        ("timm/deit_tiny_patch16_224.nothing", "no weights of this tag in timm: choose from deit_tiny_patch16_224.fb_"),
        ("timm/deit_tiny_patch16_224./../../x", "no weights of this tag in timm"),
    ],
)
def test_names_that_cannot_be_a_student(name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        fetch(name)


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "deitkit.models.timm_models.unreachable", lambda url: "huggingface.co cannot be reached: no answer"
    )
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments: None)
    with pytest.raises(CheckpointError, match=r"not on this machine.*model\.safetensors elsewhere and set model"):
        fetch(NAME)
    assert not (tmp_path / "pretrained").exists()


def test_weights_without_a_file_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="has no weights in timm"):
        fetch("timm/vit_base_patch16_18x2_224")


def test_two_sources_of_weights_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match=r"model\.pretrained and model\.checkpoint exclude each other"):
        load_recipe("digits", [f"model.pretrained={NAME}", "model.checkpoint=x.pth"])


def test_students_of_a_run_start_from_them(
    downloaded: list[str], write_images: Callable[..., Path], tmp_path: Path
) -> None:
    photos = write_images(tmp_path / "photos")
    small = (
        "data.image_px=16", "train.epochs=1", "train.warmup_epochs=0", "train.batch_size=8",
        "methods=[none, token-hard]",
        "teacher.train.epochs=1", "teacher.train.warmup_epochs=0", "teacher.train.batch_size=8",
        "teacher.allow_weak=true", f"data.name=folder:{photos}", f"model.pretrained={NAME}",
    )  # fmt: skip
    recipe = load_recipe("own-images", small)
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    assert results.initial is not None
    assert results.initial.startswith(f"{NAME} (sha256 ")
    assert results.initial.endswith(", licence apache-2.0)")
    assert any("position" in note.lower() for note in results.notes)
    stored = load_recipe(str(tmp_path / "run" / "recipe.yaml")).model
    assert (stored.pretrained, stored.width, stored.checkpoint) == (NAME, 192, None)
    compare(recipe, tmp_path / "run", watcher=Watcher(), resume=True)
    assert len(downloaded) == 1


def test_resume_finds_the_run_of_a_name(
    downloaded: list[str], write_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("own-images", [f"model.pretrained={NAME}"])
    stored = recipe.model_copy(update={"model": with_pretrained_size(recipe.model)})
    begin_run(tmp_path / "runs" / "own-images", stored)
    found = []
    monkeypatch.setattr("deitkit.comparison.run.run_recipe", lambda recipe, folder, **_: found.append(folder))
    with pytest.raises(AttributeError):  # nothing to print
        _compare(recipe, None, resume=True, as_json=True)
    assert found == [Path("runs/own-images")]


def test_a_checkpoint_of_the_command_line_and_a_name_in_the_recipe_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.pretrained=.* in the recipe, but .* on the command line"):
        start_from(load_recipe("own-images", [f"model.pretrained={NAME}"]), tmp_path / "x.pth")
