"""The CNN baseline: from scratch or from weights, in the normalisation and resolution of these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CPU_FP32
from deitkit.comparison.compare import compare
from deitkit.comparison.run import run_recipe
from deitkit.comparison.verify import verify_run
from deitkit.data.dataset import Dataset
from deitkit.errors import CheckpointError, RecipeError
from deitkit.models.built import BuiltClassifier
from deitkit.models.classifier import Classifier
from deitkit.models.saved import read_card, save_tensors
from deitkit.models.weights.read import read_state
from deitkit.models.zoo import create_classifier
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.training import build
from deitkit.training.build import build_students

FIELDS = ("methods=[none]", "model.name=micro", "model.patch_px=4", "baseline.name=cifar/resnet20")


def built_baseline(dataset: Dataset, *changes: str) -> Classifier:
    (cnn,) = build_students(load_recipe("digits", [*FIELDS, *changes]), dataset, 0, CPU_FP32, names=["cnn-baseline"])
    return cnn.classifier


def weights(path: Path, classes: int) -> Path:
    torch.manual_seed(5)
    save_tensors(path, dict(create_classifier("cifar/resnet20", classes=classes, channels=3).model.state_dict()))
    return path


def differing(classifier: Classifier, file: Path) -> set[str]:
    """Return the names of the tensors that are not those of a file."""
    state = read_state(file)
    return {name for name, value in classifier.model.state_dict().items() if not torch.equal(value, state[name])}


def test_a_baseline_starts_from_a_checkpoint(stripes: Dataset, tmp_path: Path) -> None:
    whole = weights(tmp_path / "cnn.safetensors", 3)
    found = built_baseline(stripes, f"baseline.checkpoint={whole}", "baseline.image_px=16")
    scratch = built_baseline(stripes)
    assert (found.image_px, scratch.image_px) == (16, None)
    assert not differing(found, whole)
    assert "conv1.weight" in differing(scratch, whole)
    other = weights(tmp_path / "other.safetensors", 7)
    resized = built_baseline(stripes, f"baseline.checkpoint={other}")
    assert differing(resized, other) == {"linear.weight", "linear.bias"}
    assert torch.equal(resized.model.state_dict()["linear.weight"], scratch.model.state_dict()["linear.weight"])


def test_what_of_a_checkpoint_a_baseline_takes_is_said(stripes: Dataset, tmp_path: Path) -> None:
    state = create_classifier("cifar/resnet20", classes=7, channels=3).model.state_dict()
    parts = {"model": state, "model_ema": {f"module.{name}": value + 1 for name, value in state.items()}}
    torch.save(parts, tmp_path / "cnn.pth")
    recipe, said = load_recipe("digits", [*FIELDS, f"baseline.checkpoint={tmp_path / 'cnn.pth'}"]), []
    (cnn,) = build_students(recipe, stripes, 0, CPU_FP32, said.append, names=["cnn-baseline"])
    assert torch.equal(cnn.classifier.model.state_dict()["conv1.weight"], state["conv1.weight"] + 1)
    (line,) = said
    assert line.startswith("cnn-baseline starts from cnn.pth (sha256 ")
    assert "; of its parts model_ema, model, 'model_ema' is read; " in line
    assert line.endswith("; its classifier does not fit and is left out")


def test_a_pretrained_baseline_has_the_normalisation_and_the_resolution_of_its_library(
    stripes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def created(name: str, **fields: Any) -> BuiltClassifier:
        asked.update(fields)
        model = create_classifier(name, classes=fields["classes"], channels=fields["channels"]).model
        return BuiltClassifier(model, "linear", "a library", (0.4,) * 3, (0.2,) * 3, image_px=24)

    monkeypatch.setattr(build, "create_classifier", created)
    found = built_baseline(stripes, "baseline.pretrained=true")
    assert asked["pretrained"] is True
    assert (found.image_px, found.mean.flatten().tolist()) == (24, pytest.approx([0.4] * 3))
    scratch = built_baseline(stripes)
    assert asked["pretrained"] is False
    assert (scratch.image_px, scratch.mean.flatten().tolist()) == (None, pytest.approx(list(stripes.mean)))


def test_mistakes_name_the_baselines_fields(stripes: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"baseline\.pretrained=true has no weights .* as baseline\.checkpoint"):
        built_baseline(stripes, "baseline.pretrained=true")
    with pytest.raises(RecipeError, match=r"baseline\.name='cifar/resnet21' is unknown"):
        built_baseline(stripes, "baseline.name=cifar/resnet21")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        built_baseline(stripes, f"baseline.checkpoint={tmp_path / 'nowhere.pth'}")


def test_a_run_says_that_its_baseline_was_pretrained_and_keeps_to_its_weights(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = create_classifier("cifar/resnet20", classes=10, channels=1).model
    save_tensors(tmp_path / "cnn.safetensors", dict(model.state_dict()))
    fields = ("methods=[none]", "train.epochs=1", "baseline.name=cifar/resnet20", "baseline.image_px=12",
              f"baseline.checkpoint={tmp_path / 'cnn.safetensors'}")  # fmt: skip
    results = compare(tiny_recipe(*fields), tmp_path / "run", watcher=Watcher())
    assert results.rows[-1].label == "CNN baseline (cifar/resnet20, pretrained), labels alone"
    assert verify_run(tmp_path / "run", Watcher()).holds
    save_tensors(tmp_path / "cnn.safetensors", {name: 2 * value for name, value in model.state_dict().items()})
    with pytest.raises(CheckpointError, match="another version of the weights of the baseline"):
        compare(tiny_recipe(*fields, "methods=[none, class-only]"), tmp_path / "run", watcher=Watcher(), resume=True)


def test_a_baseline_that_has_seen_test_images_is_refused(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    fields = ("methods=[none]", "baseline.name=cifar/resnet20", "data.train_images=null", "train.epochs=1")
    compare(tiny_recipe(*fields), tmp_path / "first", watcher=Watcher())
    cnn = tmp_path / "first" / "seed-0" / "cnn-baseline" / "model.safetensors"
    again = (*fields, f"baseline.checkpoint={cnn}")
    for other in ("data.split_seed=1", "data.folds=2"):
        divided = [other, *(["data.test_images=null"] if "folds" in other else [])]
        expected = rf"test images of digits are training images of baseline.checkpoint={cnn}"
        with pytest.raises(RecipeError, match=expected):
            run_recipe(tiny_recipe(*again, *divided), tmp_path / "other", watcher=Watcher())
    assert not (tmp_path / "other").exists()
    compare(tiny_recipe(*again), tmp_path / "same", watcher=Watcher())
    card = read_card(tmp_path / "same" / "seed-0" / "cnn-baseline")
    assert card.trained_before_on is not None
