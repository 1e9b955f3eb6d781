"""A student's folder rebuilds it whole, whatever its architecture, and folders from before a field existed still do."""

import json
from pathlib import Path

import pytest
import torch

from deitkit.errors import CheckpointError
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.saved import load_classifier, save_classifier
from deitkit.models.vit import create_student
from deitkit.recipe.schema import ModelRecipe
from deitkit.training.optim import ExponentialMovingAverage

CPU = torch.device("cpu")
CARD = {"class_names": ["a", "b", "c"], "channels": 3}


def student(**fields: object) -> Classifier:
    recipe = ModelRecipe(**{"name": "micro", "depth": 2, "patch_px": 4, **fields})
    model = create_student(recipe, image_px=(16, 16), channels=3, classes=3, tokens=("class",), seed=0)
    return Classifier(model, mean=(0.4,) * 3, std=(0.3,) * 3)


def test_layer_scale_and_stem_come_back_with_their_statistics(tmp_path: Path) -> None:
    trained = student(layer_scale=0.1, stem="conv")
    average = ExponentialMovingAverage(trained, 0.9)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    for _ in range(3):
        trained(torch.rand(8, 3, 16, 16)).class_logits.square().mean().backward()
        optimizer.step()
        average.update(trained)
    view = torch.rand(2, 3, 16, 16)
    answers = []
    for name, classifier in (("last", trained.eval()), ("ema", average.classifier)):
        save_classifier(tmp_path / name, classifier, CARD)
        again, card = load_classifier(tmp_path / name, CPU)
        assert card.config is not None
        assert (card.config["layer_scale"], card.config["stem"]) == (0.1, "conv")
        answers.append(classifier(view).class_logits)
        assert torch.equal(again(view).class_logits, answers[-1])
    assert not torch.equal(*answers)


def test_a_card_from_before_these_fields_is_a_student_without_them(tmp_path: Path) -> None:
    plain = student().eval()
    save_classifier(tmp_path, plain, CARD)
    path = tmp_path / "model.json"
    card = json.loads(path.read_text())
    assert (card["config"].pop("layer_scale"), card["config"].pop("stem")) == (None, "patch")
    path.write_text(json.dumps(card))
    view = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_classifier(tmp_path, CPU)[0](view).class_logits, plain(view).class_logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 2**20), ("depth", 2**40), ("classes", 2**40), ("image_px", 2**20), ("channels", 2**40)],
)
def test_a_card_may_not_ask_for_more_memory_than_its_weights_take(tmp_path: Path, field: str, value: int) -> None:
    save_classifier(tmp_path, student(), CARD)
    path = tmp_path / "model.json"
    card = json.loads(path.read_text())
    card["config"][field] = value
    path.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"describes a larger model than model.safetensors contains"):
        load_classifier(tmp_path, CPU)


@pytest.mark.parametrize(("field", "value"), [("channels", 2**40), ("image_px", 2**30), ("class_names", [""] * 10**6)])
def test_nor_may_that_of_a_cnn(tmp_path: Path, field: str, value: object) -> None:
    cnn = Classifier(CifarResNet(20, channels=3, classes=3), mean=(0.4,) * 3, std=(0.3,) * 3)
    save_classifier(tmp_path, cnn, CARD | {"architecture": "cifar/resnet20"})
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=r"describes a larger model|see image_px|see channels"):
        load_classifier(tmp_path, CPU)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fit", "stretch"),
        ("eval_crop", 0.0),
        ("eval_crop", 1.5),
        ("channels", 2),
        ("split", {"split_seeds": 1}),
        ("input_px", [2**14, 16]),
        ("eval_crop", 1e-4),
        ("trained_before_view", {"image_px": 2**30, "channels": 3, "fit": "crop"}),
    ],
)
def test_a_card_with_a_wrong_value_is_one_sentence(tmp_path: Path, field: str, value: object) -> None:
    save_classifier(tmp_path, student(), CARD | {"input_px": [16, 16]})
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"model.json is incomplete or wrong \(see {field}\)"):
        load_classifier(tmp_path, CPU)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class_names": ["a", "b"]}, "classes of config is 3, but it describes a model with 2"),
        ({"channels": 1, "mean": [0.4], "std": [0.3]}, "channels of config is 3, but it describes a model with 1"),
        ({"channels": 1}, "mean and std have 3 and 3 values, channels is 1"),
        ({"std": [0.3]}, "mean and std have 3 and 1 values, channels is 3"),
        ({"input_px": [32, 32]}, r"image_px of config is 16, but input_px is \[32, 32\]"),
        ({"image_px": 32}, "image_px is 32, but its model takes 16"),
    ],
)
def test_a_card_that_contradicts_its_model_is_one_sentence(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    save_classifier(tmp_path, student(), CARD)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(
        CheckpointError, match=rf"model.json is incomplete or wrong \({reason}\): copy the folder again"
    ):
        load_classifier(tmp_path, CPU)


def test_reading_a_model_leaves_the_callers_random_numbers_as_they_are(tmp_path: Path) -> None:
    save_classifier(tmp_path / "student", student(), CARD)
    cnn = Classifier(CifarResNet(20, channels=3, classes=3), mean=(0.4,) * 3, std=(0.3,) * 3)
    save_classifier(tmp_path / "cnn", cnn, CARD | {"architecture": "cifar/resnet20"})
    torch.manual_seed(3)
    expected = torch.rand(4)
    for kind in ("student", "cnn"):
        torch.manual_seed(3)
        load_classifier(tmp_path / kind, CPU)
        assert torch.equal(torch.rand(4), expected), kind


@pytest.mark.parametrize("damaged", ["no sketch", "AAAA", ""])
def test_a_damaged_sketch_tells_nothing(tmp_path: Path, damaged: str) -> None:
    save_classifier(tmp_path, student(), CARD | {"trained_on": damaged, "trained_before_on": damaged})
    _, card = load_classifier(tmp_path, CPU)
    assert card.seen is None


@pytest.mark.parametrize("field", ["kind", "config", "mean", "std", "image_px", "class_names"])
def test_a_card_without_a_field_is_one_sentence(tmp_path: Path, field: str) -> None:
    save_classifier(tmp_path, student(), CARD)
    path = tmp_path / "model.json"
    card = json.loads(path.read_text())
    del card[field]
    path.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=rf"model.json is incomplete or wrong \(see {field}\)"):
        load_classifier(tmp_path, CPU)
