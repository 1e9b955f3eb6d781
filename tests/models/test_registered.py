"""Architectures that users register: in Python, and on the command line by DEITKIT_IMPORT."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from conftest import TINY
from deitkit.errors import RecipeError, TeacherError
from deitkit.models import registered
from deitkit.models.built import reset_head
from deitkit.models.registered import register_model
from deitkit.models.zoo import create_classifier
from deitkit.run.results import read_results
from deitkit.system.user_code import import_user_code

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
    with pytest.raises(RecipeError, match=r"ModuleNotFoundError: No module named 'no_such_module'"):
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
