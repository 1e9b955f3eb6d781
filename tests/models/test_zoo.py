"""Classifiers by name: they build, answer with logits, know their head, and refuse in one sentence."""

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

from deitkit.errors import TeacherError
from deitkit.models.built import reset_head
from deitkit.models.classifier import Classifier
from deitkit.models.weights.read import load_into, read_checkpoint
from deitkit.models.zoo import create_classifier, names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Name, channels, side of the images, whether the library states a normalisation.
BUILDABLE = [
    ("cifar/resnet20", 1, 8, False),
    ("small/resnet18", 3, 8, False),
    ("small/regnet_x_400mf", 1, 8, False),
    ("torchvision/regnet_x_400mf", 3, 32, True),
    ("torchvision/resnet18", 1, 32, True),
    ("torchvision/squeezenet1_1", 3, 32, True),
    ("torchvision/googlenet", 1, 32, True),
    ("timm/resnet18", 1, 32, True),
    ("timm/resnet18", 3, 32, True),
    ("timm/resnetv2_18", 3, 32, True),
    ("timm/vit_tiny_patch16_224", 3, 32, True),
]


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize(("name", "channels", "image_px", "known"), BUILDABLE)
def test_builds_with_a_head_that_can_be_replaced(name: str, channels: int, image_px: int, known: bool) -> None:
    built = create_classifier(name, classes=7, channels=channels, image_px=image_px)
    images = torch.randn(2, channels, image_px, image_px)
    assert built.model.train()(images).shape == (2, 7)
    assert not built.new_head
    assert (built.mean is not None) == (built.std is not None) == (known and channels == 3)
    weights = {key: value.clone() for key, value in built.model.state_dict().items()}
    reset_head(built, 4)
    assert built.model.eval()(images).shape == (2, 4)
    changed = {key for key, value in built.model.state_dict().items() if not torch.equal(value, weights[key])}
    assert changed == {f"{built.head}.weight", f"{built.head}.bias"}
    assert all(parameter.requires_grad for parameter in built.model.get_submodule(built.head).parameters())


@pytest.mark.parametrize(
    ("name", "head", "millions"), [("timm/regnety_160", "head.fc", 80.6), ("timm/resnet18.a1_in1k", "fc", 11.2)]
)
def test_large_and_tagged_teachers_build(name: str, head: str, millions: float) -> None:
    with torch.device("meta"):
        built = create_classifier(name, classes=10, channels=3)
    assert sum(parameter.numel() for parameter in built.model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert (built.head, built.mean, built.std) == (head, IMAGENET_MEAN, IMAGENET_STD)
    assert built.image_px is None


def test_architectures_tied_to_a_resolution_say_so() -> None:
    with torch.device("meta"):
        for name in ("timm/deit_tiny_patch16_224", "torchvision/vit_b_32"):
            assert create_classifier(name, classes=2, channels=3).image_px == 224
            assert create_classifier(name, classes=2, channels=3, image_px=96).image_px == 96


def test_sources_name_the_library_and_its_version() -> None:
    sources = [create_classifier(name, classes=2, channels=3).source for name in ("cifar/resnet20", "timm/resnet18")]
    assert sources == ["deitkit", f"timm {timm.__version__}"]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts can be reached, so that the library itself is asked for its weights."""
    for library in ("timm", "torchvision"):
        monkeypatch.setattr(f"deitkit.models.{library}_models.unreachable", lambda url: None)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("classes", "new_head"), [(1000, False), (10, True)])
def test_pretrained_torchvision(classes: int, new_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    built = create_classifier("torchvision/resnet18", classes=classes, channels=3, pretrained=True)
    assert torch.equal(built.model.state_dict()["conv1.weight"], state["conv1.weight"])
    assert built.model.state_dict()["fc.weight"].shape == (classes, 512)
    assert built.new_head == new_head
    assert (built.image_px, built.mean, built.std) == (224, IMAGENET_MEAN, IMAGENET_STD)
    assert built.source == f"torchvision {torchvision.__version__}, ImageNet weights IMAGENET1K_V1"


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("classes", "new_head"), [(1000, False), (10, True)])
def test_pretrained_timm(classes: int, new_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("resnet18").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    built = create_classifier("timm/resnet18", classes=classes, channels=3, pretrained=True)
    assert torch.equal(built.model.state_dict()["conv1.weight"], state["conv1.weight"])
    assert torch.equal(built.model.state_dict()["fc.weight"], state["fc.weight"]) == (not new_head)
    assert built.new_head == new_head
    assert (built.image_px, built.source) == (224, f"timm {timm.__version__}, weights a1_in1k")


def unreachable(*_: Any, **__: Any) -> None:
    raise urllib.error.URLError("no route")


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_offline_is_told_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(TeacherError, match=rf"weights of '{name}' cannot be loaded .*no route.* teacher.checkpoint$"):
        create_classifier(name, classes=2, channels=3, pretrained=True)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet18", {}, "'resnet18' is unknown: did you mean small/resnet18 or torchvision/resnet18 or timm/resnet18"),
        ("torchvision/resnet19", {}, "did you mean torchvision/resnet1"),
        ("cifar/resnet110", {}, "did you mean cifar/resnet"),
        ("cifar/resnet20.tag", {}, "did you mean cifar/resnet20"),
        (
            "???",
            {},
            "is unknown: write timm/NAME, torchvision/NAME, small/NAME or cifar/resnet20, 32, 44 or 56, or a folder",
        ),
        ("timm/resnet18.nonsense", {}, "'timm/resnet18.nonsense' cannot be built .*Invalid pretrained tag"),
        ("timm/deit_tiny_distilled_patch16_224", {}, "no single classifier layer"),
        ("torchvision/vit_b_32", {"image_px": 33}, r"cannot be built with teacher.image_px=33 \("),
        ("cifar/resnet20", {"pretrained": True}, "has no weights for 'cifar/resnet20'.*teacher.checkpoint"),
        ("timm/test_resnet.none", {}, "Invalid pretrained tag"),
        (
            "timm/resnet18",
            {"pretrained": True, "channels": 1},
            "needs 3 channels, but the images have 1: set data.chan",
        ),
    ],
)
def test_refusals(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TeacherError, match=sentence):
        create_classifier(name, **{"classes": 2, "channels": 3, **options})


def test_weights_that_the_library_lacks_are_refused() -> None:
    without = next(
        name for name in timm.list_models() if (card := timm.get_pretrained_cfg(name)) and not card.has_weights
    )
    with pytest.raises(TeacherError, match=f"has no weights for 'timm/{without}': give a file as teacher.checkpoint"):
        create_classifier(f"timm/{without}", classes=2, channels=3, pretrained=True)


def test_names_are_unique_and_hold_the_documented_teachers() -> None:
    known = names()
    assert len(set(known)) == len(known)
    assert {"cifar/resnet56", "small/resnet18", "torchvision/regnet_x_400mf", "timm/regnety_160"} <= set(known)


@pytest.mark.parametrize(
    "architecture", ["alexnet", "convnext_tiny", "efficientnet_b0", "maxvit_t", "swin_t", "vgg11", "vit_h_14"]
)
def test_heads_of_torchvision_are_found(architecture: str) -> None:
    with torch.device("meta"):  # where RegNets cannot be built
        built = create_classifier(f"torchvision/{architecture}", classes=7, channels=1)
        reset_head(built, 3)
        assert built.model.eval()(torch.empty(2, 1, 224, 224)).shape == (2, 3)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_pretrained_models_of_several_classifiers_are_saved_as_they_teach(
    architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = torchvision.models.get_model(architecture, aux_logits=True, transform_input=True, init_weights=False)
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_var.fill_(1 / 6)  # which keeps the scale of what a new convolution and a ReLU give
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: theirs.state_dict())
    built = create_classifier(f"torchvision/{architecture}", classes=1000, channels=3, pretrained=True)
    assert built.mean is not None
    assert built.std is not None
    ours = Classifier(built.model, mean=built.mean, std=built.std).eval()
    view = torch.rand(2, 3, 96, 96)
    normalised = (view - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(ours(view).class_logits, theirs.eval()(normalised), rtol=1e-4, atol=1e-4)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")  # the file that the sentence on a lack of network names
    fetched = create_classifier(f"torchvision/{architecture}", classes=1000, channels=3, pretrained=False)
    load_into(fetched.model, read_checkpoint(tmp_path / "weights.pth").state, head=fetched.head, source="weights.pth")
    assert fetched.mean is not None
    assert fetched.std is not None
    as_teacher = Classifier(fetched.model, mean=fetched.mean, std=fetched.std).eval()
    with torch.no_grad():
        torch.testing.assert_close(as_teacher(view).class_logits, theirs(normalised), rtol=1e-4, atol=1e-4)
    again = create_classifier(f"torchvision/{architecture}", classes=1000, channels=3, pretrained=False)
    again.model.load_state_dict(built.model.state_dict())
    with torch.no_grad():
        other = Classifier(again.model, mean=built.mean, std=built.std).eval()(view).class_logits
    torch.testing.assert_close(other, ours(view).class_logits.detach())
