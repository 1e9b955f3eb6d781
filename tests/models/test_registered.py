"""Architectures that users register: in Python, and on the command line by DEITKIT_IMPORT."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import TINY
from deitkit.comparison.run import run_recipe
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import METHODS, Method, Term
from deitkit.errors import CheckpointError, RecipeError, TeacherError
from deitkit.models import registered
from deitkit.models.built import reset_head
from deitkit.models.classifier import Classifier
from deitkit.models.registered import register_model
from deitkit.models.saved import load_classifier, save_classifier
from deitkit.models.zoo import create_classifier
from deitkit.recipe.schema import Recipe, TeacherRecipe
from deitkit.run.observer import Watcher
from deitkit.run.results import read_results
from deitkit.system.user_code import import_user_code
from deitkit.teachers.build import draft_teacher

FILE = """
import torch
import deitkit
from deitkit.distillation.methods import METHODS, Method, Term
from shared_by_my_nets import WIDTH

@deitkit.register_model("my-net")
def my_net(classes, channels):
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, WIDTH, 3, padding=1), torch.nn.BatchNorm2d(WIDTH), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(WIDTH, classes),
    )

METHODS["half-hard"] = Method("half-hard", ("class",), (Term("class", "labels", lambda _: 0.5),
    Term("class", "hard", lambda _: 0.5)), "half of each", "labels and decisions, half of each")
"""


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "_REGISTERED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_builds_a_registered_architecture_with_its_classifier() -> None:
    @register_model("pyramid.2")
    def build(classes: int, channels: int) -> nn.Module:
        return nn.ModuleDict({"body": nn.Conv2d(channels, 5, 3), "classifier": nn.Linear(5, classes)})

    built = create_classifier("own/pyramid.2", classes=7, channels=1)
    assert (built.head, built.mean, built.image_px, built.new_head) == ("classifier", None, None, False)
    assert built.source.startswith("test_registered.py (sha256 ")
    reset_head(built, 3)
    assert built.model.get_submodule("classifier").out_features == 3

    @register_model("pyramid.2")
    class Pyramid(nn.Module):
        def __init__(self, classes: int, channels: int) -> None:
            super().__init__()
            self.last = nn.Conv2d(channels, classes, 1)

    assert create_classifier("own/pyramid.2", classes=7, channels=1).head == "last"


def raises(*, classes: int, channels: int) -> nn.Module:
    raise ValueError("no room\nfor details")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda num_classes: nn.Linear(2, num_classes), "unexpected keyword argument 'classes'"),
        (raises, "cannot be built for 7 classes and 3 channels (ValueError: no room): correct its function"),
        (lambda classes, channels: None, "returned a NoneType: let it return a torch.nn.Module"),
        (
            lambda classes, channels: nn.Linear(7, 4),
            "no linear layer or convolution with 7 outputs, one for each class",
        ),
    ],
)
def test_functions_that_do_not_build_a_classifier(build: Any, expected: str) -> None:
    register_model("wrong")(build)
    with pytest.raises(TeacherError) as caught:
        create_classifier("own/wrong", classes=7, channels=3)
    assert "'own/wrong'" in str(caught.value)
    assert expected in str(caught.value)


def test_names_that_are_not_registered() -> None:
    register_model("mine")(lambda classes, channels: nn.Linear(channels, classes))
    with pytest.raises(
        TeacherError, match=r"'own/other' is not registered \(registered are mine\): .* set DEITKIT_IMPORT"
    ):
        create_classifier("own/other", classes=2, channels=3)
    with pytest.raises(TeacherError, match=r"'timm/mine' is unknown: did you mean own/mine "):
        create_classifier("timm/mine", classes=2, channels=3)
    with pytest.raises(TeacherError, match="pretrained=true has no weights for 'own/mine'"):
        create_classifier("own/mine", classes=2, channels=3, pretrained=True)
    for name in ("", "a/b", "a b"):
        with pytest.raises(RecipeError, match="is no name"):
            register_model(name)


def test_a_file_is_imported_and_its_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEITKIT_IMPORT", raising=False)
    import_user_code()
    monkeypatch.setenv("DEITKIT_IMPORT", str(tmp_path / "absent.py"))
    with pytest.raises(RecipeError, match=r"absent\.py is not a file"):
        import_user_code()
    (tmp_path / "typo.py").write_text("import torch\n\ntorhc.manual_seed(0)\n")
    monkeypatch.setenv("DEITKIT_IMPORT", str(tmp_path / "typo.py"))
    with pytest.raises(RecipeError, match=r"NameError: name 'torhc' is not defined; line 3 of .*typo\.py\)"):
        import_user_code()
    monkeypatch.setenv("DEITKIT_IMPORT", "no_such_module")
    with pytest.raises(RecipeError, match=r"\(ModuleNotFoundError: No module named 'no_such_module'\): correct it"):
        import_user_code()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("raise SystemError('taken for the library')")
    (tmp_path / "fine.py").write_text("import colorsys\n\nprint(colorsys.rgb_to_hsv)\n")
    monkeypatch.setenv("DEITKIT_IMPORT", "fine.py")
    import_user_code()
    assert os.environ["DEITKIT_IMPORT"] == str(tmp_path / "fine.py")


def test_the_command_line_trains_under_an_own_teacher_by_an_own_method(tmp_path: Path) -> None:
    (tmp_path / "my_nets.py").write_text(FILE)
    (tmp_path / "shared_by_my_nets.py").write_text("WIDTH = 24\n")
    chosen = ("teacher.name=own/my-net", "methods=[none, half-hard]", "baseline.name=own/my-net", "seeds=[0, 1]")

    def deitkit(*arguments: str, imported: str = "my_nets.py") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deitkit", *arguments]
        environment = os.environ | {"DEITKIT_IMPORT": imported}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    run = ("compare", "digits", *TINY, *chosen, "--out", "run")
    missing = deitkit(*run, "methods=[none]", imported="")
    assert (missing.returncode, "set DEITKIT_IMPORT to its file" in missing.stderr) == (2, True), missing.stderr
    done = deitkit(*run, "--on", "local:2")
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "run")
    assert [row.row for row in results.rows] == ["none/class", "half-hard/class", "cnn-baseline/class"]
    assert all(row.status == "ok" for row in results.rows)
    assert (results.teacher.name, results.teacher.source[:18]) == ("own/my-net", "my_nets.py (sha256")
    image = tmp_path / "digit.png"
    from PIL import Image

    Image.new("L", (8, 8)).save(image)
    answered = deitkit("predict", "run/teacher", str(image), "--json")
    assert answered.returncode == 0, answered.stderr
    refused = deitkit("predict", "run/teacher", str(image), imported="")
    assert (refused.returncode, "'own/my-net' is not registered" in refused.stderr) == (2, True), refused.stderr
    assert deitkit("verify", "run").returncode == 0


def test_a_model_that_returns_no_logits_is_refused_before_anything_trains(tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(
        "import torch, deitkit\n\n@deitkit.register_model('pairs')\nclass Pairs(torch.nn.Module):\n"
        "    def __init__(self, classes, channels):\n        super().__init__()\n"
        "        self.head = torch.nn.Linear(channels, classes)\n"
        "    def forward(self, x):\n        return {'logits': self.head(x.mean((2, 3)))}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "deitkit", "compare", "digits", *TINY, "teacher.name=own/pairs", "--out", "run"],
        cwd=tmp_path, env=os.environ | {"DEITKIT_IMPORT": "pairs.py"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "own/pairs" in done.stderr
    assert not (tmp_path / "run" / "teacher").exists()


class Twice(nn.Module):
    """One layer under two names, which safetensors refuses to write as they are."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.first = self.again = nn.Conv2d(channels, channels, 3, padding=1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.again(self.first(images)).mean(dim=(2, 3)))
        return logits


def test_a_net_with_a_shared_layer_is_saved_and_read(tmp_path: Path) -> None:
    register_model("twice")(Twice)
    built = create_classifier("own/twice", classes=4, channels=3)
    classifier = Classifier(built.model, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    card = {"architecture": "own/twice", "class_names": ["a", "b", "c", "d"], "channels": 3, "input_px": [8, 8]}
    save_classifier(tmp_path, classifier, card)
    again, _ = load_classifier(tmp_path, torch.device("cpu"))
    view = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(view).class_logits, classifier(view).class_logits)


class Within(nn.Module):
    """All layers under one attribute, and one whose name is that of a loss."""

    def __init__(self, attribute: str, classes: int, channels: int) -> None:
        super().__init__()
        self.attribute = attribute
        layers = [nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.add_module(
            attribute, nn.Sequential(*layers, nn.ModuleDict({"loss": nn.Linear(4, 4)}), nn.Linear(4, classes))
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        *layers, loss, last = self.get_submodule(self.attribute)
        for layer in layers:
            images = layer(images)
        logits: torch.Tensor = last(loss["loss"](images))
        return logits


@pytest.mark.parametrize("attribute", ["model", "net", "network", "module", "loss", "student"])
def test_a_net_under_any_attribute_is_saved_read_and_taken_from_a_checkpoint(
    attribute: str, stripes: Dataset, tmp_path: Path
) -> None:
    register_model("within")(functools.partial(Within, attribute))
    built = create_classifier("own/within", classes=3, channels=3)
    classifier = Classifier(built.model, mean=stripes.mean, std=stripes.std).eval()
    card = {"architecture": "own/within", "class_names": stripes.class_names, "channels": 3, "input_px": [8, 8]}
    save_classifier(tmp_path, classifier, card)
    view = torch.rand(2, 3, 8, 8)
    expected = classifier(view).class_logits
    assert torch.equal(load_classifier(tmp_path, torch.device("cpu"))[0](view).class_logits, expected)
    parallel = {f"module.{name}": value for name, value in built.model.state_dict().items()}
    torch.save({"state_dict": parallel}, tmp_path / "parallel.pth")
    for file in ("model.safetensors", "parallel.pth"):
        teacher, drafted = draft_teacher(
            TeacherRecipe(name="own/within", checkpoint=tmp_path / file, fit="none"), stripes
        )
        assert torch.equal(teacher.eval()(view).class_logits, expected), file
        assert "does not fit" not in drafted.source
    teacher, _ = draft_teacher(TeacherRecipe(name=str(tmp_path)), stripes)
    assert teacher.model.state_dict().keys() == built.model.state_dict().keys()


def test_lazy_layers_are_refused() -> None:
    register_model("lazy")(lambda classes, channels: nn.Sequential(nn.Flatten(), nn.LazyLinear(classes)))
    with pytest.raises(TeacherError, match="'own/lazy' has lazy layers, whose size is unknown"):
        create_classifier("own/lazy", classes=4, channels=3)


CHANGING = """
import torch, deitkit
from deitkit.distillation.methods import METHODS, SIGNALS, Method, Signal, Term

class Net(torch.nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.head = torch.nn.Linear(channels, classes)
    def forward(self, images):
        return self.head(images.mean((2, 3)).{act}())

deitkit.register_model("net")(Net)

def loss(logits, teacher, targets, settings):
    return {factor} * (logits.float() - teacher.float()).square().mean()

SIGNALS["square"] = Signal(loss, "soft")
terms = (Term("class", "square", lambda settings: {weight}),)
METHODS["square"] = Method("square", ("class",), terms, "square", "square")
"""


def test_other_code_of_the_user_is_not_mixed_into_a_run(tmp_path: Path) -> None:
    def train(*methods: str, act: str = "relu", factor: float = 1.0, weight: float = 1.0, comment: str = "") -> Any:
        (tmp_path / "mine.py").write_text(CHANGING.format(act=act, factor=factor, weight=weight) + comment)
        chosen = (f"methods=[{','.join(methods)}]", "train.epochs=1", "teacher.name=own/net", "seeds=[0]")
        return subprocess.run(
            [sys.executable, "-m", "deitkit", "compare", "digits", *TINY, *chosen, "--out", "run", "--resume"],
            cwd=tmp_path, env=os.environ | {"DEITKIT_IMPORT": "mine.py"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    first = train("none", "square")
    assert first.returncode == 0, first.stderr
    for changes, named in (
        ({"act": "sigmoid"}, "own/net"), ({"factor": 2.0}, "the method square"), ({"weight": 2.0}, "the method square")
    ):  # fmt: skip
        refused = train("none", "square", "soft", **changes)
        assert refused.returncode == 2, refused.stderr
        assert f"was begun with another version of {named} than is here now" in refused.stderr
    grown = train("none", "square", "soft", comment="\n# a remark\n")
    assert grown.returncode == 0, grown.stderr


def test_folds_and_variants_are_not_trained_by_other_versions_of_a_method(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss_times(factor: float) -> Any:
        return lambda settings: factor

    def change(factor: float) -> None:
        term = Term("class", "labels", loss_times(factor))
        monkeypatch.setitem(METHODS, "mine", Method("mine", ("class",), (term,), "mine", "mine"))

    change(1.0)
    monkeypatch.setattr("deitkit.comparison.folds.write_report", lambda folder: [])
    short = ("methods=[mine]", "train.epochs=1", "data.test_images=null", "data.train_images=null")
    folds = tiny_recipe(*short, "data.folds=2")
    base = tiny_recipe(*short[:2], "variants.a.train.momentum=0.5")
    grown = tiny_recipe(*short[:2], "variants.a.train.momentum=0.5", "variants.b.train.momentum=0.7")
    run_recipe(folds, tmp_path / "folds", watcher=Watcher())
    run_recipe(base, tmp_path / "variants", watcher=Watcher())
    shutil.rmtree(tmp_path / "folds" / "folds" / "2")
    change(2.0)
    for recipe, name in ((folds, "folds"), (grown, "variants")):
        with pytest.raises(CheckpointError, match="begun with another version of the method mine"):
            run_recipe(recipe, tmp_path / name, watcher=Watcher(), resume=True)
    change(1.0)
    assert run_recipe(grown, tmp_path / "variants", watcher=Watcher(), resume=True).rows


def test_a_teacher_alone_needs_no_code_of_the_students(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    fields = ("teacher.train.epochs=1", "teacher.min_top1=null", "teacher.allow_weak=true", "--out", tmp_path / "out")
    code, _, errors = run("teacher", "digits", "methods=[none, unknown]", "model.checkpoint=nope.pt", *fields)
    assert code == 0, errors
    assert run("teacher", "digits", "methods=[none, unknown]", "model.checkpoint=nope.pt", *fields, "--resume")[0] == 0
