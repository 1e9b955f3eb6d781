"""A published folder: opened by timm, transformers and deitkit with the model's answers, and its card."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import RepoUrl
from PIL import Image

from deitkit.comparison.compare import compare
from deitkit.comparison.winner import copy_winner
from deitkit.data.duplicates import sketch
from deitkit.errors import CheckpointError, DataError, RecipeError
from deitkit.evaluation.readouts import readout_scores
from deitkit.export import publish as module
from deitkit.export.export import ExportOptions, export_onnx
from deitkit.export.hub import OWN_FILES, full_name, push
from deitkit.export.publish import PublishOptions, publish
from deitkit.export.record import ExportRecord
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.run.observer import Watcher
from deitkit.run.results import read_results

Run = Callable[..., tuple[int, str, str]]


def quiet(text: str) -> None:
    """Take the stages of an export."""


def saved(folder: Path, tokens: tuple[str, ...] = ("class", "distillation"), **card: Any) -> Path:
    torch.manual_seed(0)
    model = DeiT(image_px=8, patch_px=2, channels=1, classes=3, width=16, depth=2, heads=2, tokens=tokens)
    for head in (model.head, model.head_dist):
        if head is not None:
            torch.nn.init.normal_(head.weight)
    described = {"class_names": ["a|b", "<b>", "c"], "channels": 1, "input_px": [8, 8], **card}
    save_classifier(folder, Classifier(model, mean=(0.3,), std=(0.4,)), described)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe names folders of this machine."""
    root = tmp_path_factory.mktemp("private")
    for label, name in enumerate(("cat", "dog")):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(20):
            Image.new("L", (8, 8), 100 * label + 3 * index).save(root / "photos" / name / f"{index}.png")
    recipe = load_recipe(
        "digits",
        [
            f"data.name=folder:{root / 'photos'}", "data.train_images=null", "data.test_images=null", "methods=[none]",
            "model.width=16", "model.depth=1", "model.heads=1", "train.epochs=1", "train.warmup_epochs=0",
            "train.batch_size=8", "baseline=null",
        ],
    )  # fmt: skip
    compare(recipe, root / "run", watcher=Watcher())
    return root / "run"


def test_timm_transformers_and_deitkit_open_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    folder = saved(tmp_path / "model")
    publish(folder, tmp_path / "out", PublishOptions(), quiet)
    views = torch.rand(5, 1, 8, 8)
    with torch.inference_mode():
        output = load_classifier(folder, torch.device("cpu"))[0](views)
        expected = readout_scores(output)["joint-logits"]
        normalised = (views - 0.3) / 0.4
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(normalised)
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        ours = load_classifier(tmp_path / "out", torch.device("cpu"))[0](views)
        torch.testing.assert_close(by_timm, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(normalised).logits, expected, rtol=1e-4, atol=1e-5)
    assert theirs.config.id2label == {0: "a|b", 1: "<b>", 2: "c"}
    assert torch.equal(ours.class_logits, output.class_logits)
    assert torch.equal(ours.distillation_logits, output.distillation_logits)


def test_a_student_that_timm_names_otherwise_has_no_card_of_ours(tmp_path: Path) -> None:
    publish(saved(tmp_path / "model", ("distillation",)), tmp_path / "out", PublishOptions(), quiet)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True) is not None
    assert not (tmp_path / "out" / "model.json").exists()
    assert "deitkit predict" not in (tmp_path / "out" / "README.md").read_text()


def test_the_card_is_written_from_the_run(finished: Path, tmp_path: Path) -> None:
    card = publish(finished, tmp_path / "out", PublishOptions("me/pets", "apache-2.0"), quiet).read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert yaml.safe_load(head)["pipeline_tag"] == "image-classification"
    assert text.lstrip().startswith("# pets\n")
    assert "| row | labels |" in text
    assert re.search(r"^folder:photos: \d+ training, \d+ validation and 16 test images of 2 classes\.$", text, re.M)
    assert 'timm.create_model("hf-hub:me/pets", pretrained=True)' in text
    assert "One seed was trained" in text
    assert "No licence" not in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.json", "model.safetensors", "recipe.yaml",
    ]  # fmt: skip
    assert "license" not in yaml.safe_load(
        publish(finished, tmp_path / "bare", PublishOptions(), quiet).read_text().split("---\n")[1]
    )
    by_student = publish(finished / "seed-0" / "none", tmp_path / "other", PublishOptions(), quiet).read_text()
    assert "| row | labels |" in by_student
    assert "No licence was given" in by_student
    assert "not the winner of its run" in by_student
    assert "not the winner of its run" not in card


def test_folders_of_this_machine_are_left_out(finished: Path, tmp_path: Path) -> None:
    publish(finished, tmp_path / "out", PublishOptions("me/pets"), quiet)
    for file in (tmp_path / "out").iterdir():
        assert str(finished.parent).encode() not in file.read_bytes(), file
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["data"]["name"] == "folder:photos"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    text = publish(saved(tmp_path / "model"), tmp_path / "out", PublishOptions(), quiet).read_text()
    assert "a\\|b, \\<b\\>, c" in text
    assert "It was made from model" in text


def test_with_an_onnx_file(finished: Path, tmp_path: Path, run: Run) -> None:
    code, out, errors = run("publish", finished, "--out", tmp_path / "out", "--licence", "mit")
    assert code == 0, errors
    assert "model-int8.onnx" in out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "onnxruntime.InferenceSession" in text
    assert "| model-int8.onnx |" in text
    for file in (tmp_path / "out").iterdir():
        assert str(finished.parent).encode() not in file.read_bytes(), file
    data = f"folder:{finished.parent / 'photos'}"
    assert run("verify", tmp_path / "out" / "model.onnx", "--data", data)[0] == 0


def test_mistakes_leave_nothing_behind(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(RecipeError, match="already exists: name a new folder"):
        publish(finished, tmp_path / "full", PublishOptions(), quiet)
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"
    code, _, errors = run("publish", tmp_path, "--out", tmp_path / "out", "--no-onnx")
    assert code == 2
    assert "contains no model.json" in errors
    code, _, errors = run("publish", finished, "--out", tmp_path / "out", "--data", "digits")
    assert code == 2
    assert "digits has the classes" in errors
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "largest_difference", lambda *_: 0.5)
    with pytest.raises(CheckpointError, match=r"out does not reproduce .*: its logits differ by up to 0\.5"):
        publish(finished, tmp_path / "out", PublishOptions(), quiet)
    assert not (tmp_path / "out").exists()


def test_an_upload_tells_its_address_or_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Api:
        def repo_info(self, name: str) -> Any:
            return type("Info", (), {"private": name != "me/public"})

        def create_repo(self, name: str, **settings: Any) -> RepoUrl:
            done.append((name, settings))
            return RepoUrl(f"https://huggingface.co/{name if '/' in name else f'me/{name}'}")

        def upload_folder(self, **settings: Any) -> None:
            done.append(settings)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push(tmp_path, "me/pets", private=True) == "https://huggingface.co/me/pets"
    assert done[0] == ("me/pets", {"private": True, "exist_ok": True})
    assert done[1]["folder_path"] == tmp_path
    assert {"model.onnx", "model-int8.onnx", "recipe.yaml"} <= {*done[1]["delete_patterns"]} == {*OWN_FILES}
    assert push(tmp_path, "pets", private=True) == "https://huggingface.co/me/pets"
    assert done.pop()["repo_id"] == "me/pets"  # as the Hub named it
    done.pop()
    with pytest.raises(RecipeError, match="this name is a public repository already"):
        push(tmp_path, "me/public", private=True)
    assert len(done) == 3  # nothing was uploaded

    def refuse(self: Api, name: str, **settings: Any) -> str:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(
        RecipeError, match=r"--push me/pets failed \(no route\): check the network.*can be uploaded later"
    ):
        push(tmp_path, "me/pets", private=False)

    def wrong_card(self: Api, **settings: Any) -> None:
        raise ValueError('Invalid metadata in README.md.\n- "license" must be one of [mit, other]')

    monkeypatch.setattr(Api, "create_repo", lambda self, name, **settings: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(Api, "upload_folder", wrong_card)
    folder = tmp_path / "two words"
    with pytest.raises(RecipeError) as refused:
        push(folder, "me/pets", private=True)
    assert '(Invalid metadata in README.md. - "license" must be one of [mit, other])' in str(refused.value)
    assert str(refused.value).endswith(f"can be uploaded later: hf upload me/pets '{folder}' --private")


class LoggedIn:
    """The part of the Hub's client that says who is logged in."""

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}


def test_a_name_on_the_hub_has_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", LoggedIn)
    assert full_name("pets") == "me/pets"
    assert full_name("us/pets") == "us/pets"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--push", "a/b/c"), "--push a/b/c is not a name on the Hub (Repo id must be in the form"),
        (("--push", "my model"), "--push my model is not a name on the Hub (Repo id must use alphanumeric"),
        (
            ("--push", "me/pets", "--licence", "MIT"),
            "--licence MIT is not one of the Hub's identifiers: did you mean mit",
        ),
        (("--licence", "mine alone"), "name one as the Hub does, such as apache-2.0 or cc-by-4.0, or other"),
        (("--push", "me/pets"), "--push me/pets needs a login (no token): log in with hf auth login"),
        (("--private",), "--private is for an upload: add --push USER/NAME, or leave it out"),
        (("--no-onnx", "--int8"), "--int8 is for the ONNX files, and --no-onnx writes none"),
        (("--no-onnx", "--data", "digits"), "--data is for the ONNX files, and --no-onnx writes none"),
        (("--readout", "joint"), "readout joint: this model has class"),
    ],
)
def test_mistakes_are_told_before_anything_is_exported(
    arguments: tuple[str, ...],
    sentence: str,
    finished: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def whoami(self: Any) -> dict[str, str]:
        raise OSError("no token")

    monkeypatch.setattr(LoggedIn, "whoami", whoami)
    monkeypatch.setattr("huggingface_hub.HfApi", LoggedIn)
    monkeypatch.setattr(module, "export_onnx", lambda *_: pytest.fail("exported"))
    code, _, errors = run("publish", finished, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert sentence in errors
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_not_of_the_run_below_which_it_lies(finished: Path, tmp_path: Path, run: Run) -> None:
    home = shutil.copytree(finished, tmp_path / "run")
    for place in ("smaller", "seed-0/smaller"):
        change = ("--image-px", 16) if place == "smaller" else ("--image-px", 8)
        code, _, errors = run("convert", home, "--to", "ours", "--out", home / place, *change)
        assert code == 0, errors
        card = publish(home / place, tmp_path / place, PublishOptions(), quiet).read_text()
        assert "| row | labels |" not in card
        assert "teacher of this run" not in card
        assert "It was made from run (sha256 " in card
        assert ("- resolution: 8 x 8 -\\> 16 x 16 px" in card) == (place == "smaller")
        assert not (tmp_path / place / "recipe.yaml").exists()
    shutil.copytree(home / "winner", home / "mine")
    assert "| row | labels |" not in publish(home / "mine", tmp_path / "mine", PublishOptions(), quiet).read_text()


def test_a_new_classifier_is_not_published(finished: Path, tmp_path: Path, run: Run) -> None:
    assert run("convert", finished, "--to", "ours", "--out", tmp_path / "new", "--classes", 7)[0] == 0
    with pytest.raises(CheckpointError, match=r"has a classifier that is all zero, since it is new: train it first"):
        publish(tmp_path / "new", tmp_path / "out", PublishOptions(), quiet)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_checked_as_its_users_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def without_the_config(name: str, **arguments: Any) -> Any:
        if name.startswith("local-dir:"):
            raise RuntimeError("no such option")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", without_the_config)
    with pytest.raises(CheckpointError, match=r"timm .* cannot open local-dir:.*out \(no such option\): update timm"):
        publish(saved(tmp_path / "model"), tmp_path / "out", PublishOptions(), quiet)
    assert not (tmp_path / "out").exists()


def test_another_readout_is_that_of_all_files(tmp_path: Path, run: Run) -> None:
    folder = saved(tmp_path / "model", readout="joint", test_top1=0.9)
    code, _, errors = run("publish", folder, "--out", tmp_path / "out", "--no-onnx", "--readout", "class")
    assert code == 0, errors
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["readout"] == "class"
    assert "test_top1" not in card
    assert "`class`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("lost", [0.0, 0.5])
def test_int8_that_loses_much_is_left_out(
    lost: float, finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any) -> ExportRecord:
        record = export_onnx(*arguments)
        changes = {"top1": record.rows[0].top1 - lost, "milliseconds": 1e6}
        rows = (*record.rows[:2], record.rows[2].model_copy(update=changes))
        return record.model_copy(update={"rows": rows})

    monkeypatch.setattr(module, "export_onnx", measured)
    code, _, errors = run("publish", finished, "--out", tmp_path / "out")
    assert code == 0, errors
    left_out = lost > 0.01
    assert ("model-int8.onnx is left out, since it loses 50.0 points of accuracy" in errors) == left_out
    assert ("int8 is not faster than float32 on this processor" in errors) == (not left_out)
    assert (tmp_path / "out" / "model-int8.onnx").exists() == (not left_out)
    assert ("model-int8.onnx" in (tmp_path / "out" / "README.md").read_text()) == (not left_out)
    assert ("int8" in (tmp_path / "out" / "model.onnx.json").read_text()) == (not left_out)


def test_without_int8(finished: Path, tmp_path: Path, run: Run) -> None:
    assert run("publish", finished, "--out", tmp_path / "out", "--no-int8")[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"model.onnx"}


def test_a_failure_leaves_the_folder_of_a_link_empty(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")

    def stopped(facts: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_rendered", stopped)
    with pytest.raises(KeyboardInterrupt):
        publish(finished, tmp_path / "out", PublishOptions(), quiet)
    assert not any((tmp_path / "there").iterdir())
    monkeypatch.undo()
    publish(finished, tmp_path / "out", PublishOptions(), quiet)


def test_a_winner_with_another_readout_takes_no_file_of_the_one_before(finished: Path, tmp_path: Path) -> None:
    home = shutil.copytree(finished, tmp_path / "run")
    results, card, file = read_results(home), home / "winner" / "model.json", home / "winner" / "model.onnx"
    file.touch()
    copy_winner(results, home, [home / "seed-0"])
    assert file.exists()
    card.write_text(json.dumps(json.loads(card.read_text()) | {"readout": "joint"}))
    copy_winner(results, home, [home / "seed-0"])
    assert not file.exists()
    assert json.loads(card.read_text())["readout"] == "class"


def test_the_name_of_a_data_set_is_text_in_the_card(finished: Path) -> None:
    results = read_results(finished)
    hostile = results.model_copy(update={"dataset": results.dataset.model_copy(update={"name": "a|<b>*c*"})})
    said = module._data(hostile)
    assert "<b>" not in said
    assert "*c*" not in said.replace("\\*", "")


def test_a_file_is_not_checked_on_other_images_of_the_same_relative_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = finished.parent / "photos"
    for name, other in (("cat", "dog"), ("dog", "cat")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file in (photos / other).iterdir():
            Image.open(file).point(lambda level: level + 1).save(tmp_path / "photos" / name / file.name)
    model = shutil.copytree(finished / "seed-0" / "none", tmp_path / "none")
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(card | {"dataset": "folder:photos"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data folder:photos has other images here than the model was trained on: run"):
        export_onnx(model, tmp_path / "out.onnx", ExportOptions())
    export_onnx(model, tmp_path / "out.onnx", ExportOptions(data="folder:photos"))
    monkeypatch.chdir(finished.parent)
    assert export_onnx(model, tmp_path / "here.onnx", ExportOptions()).n == 16
    more = {"dataset": "folder:photos", "trained_before_on": sketch(torch.arange(-500, 500) * 2**50)}
    (model / "model.json").write_text(json.dumps(card | more))  # of a checkpoint of other images
    assert export_onnx(model, tmp_path / "tuned.onnx", ExportOptions()).n == 16


def test_a_run_is_found_from_within_the_folder_of_its_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished / "winner")
    card = publish(Path(), tmp_path / "winner", PublishOptions(), quiet).read_text()
    assert card == publish(finished / "winner", tmp_path / "same" / "winner", PublishOptions(), quiet).read_text()
    assert "| row | labels |" in card
    assert "not the winner" not in card
    monkeypatch.chdir(finished / "seed-0")
    assert "not the winner of its run" in publish(Path("none"), tmp_path / "none", PublishOptions(), quiet).read_text()


def test_a_teacher_is_no_student_of_its_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    saved(tmp_path / "run" / "teacher", dataset="digits")
    card = publish(tmp_path / "run" / "teacher", tmp_path / "out", PublishOptions(), quiet).read_text()
    assert "It was a teacher of this run, whose students are in the table." in card
    assert "None" not in card


def test_figures_of_a_public_file_name_the_images_they_are_of(tmp_path: Path) -> None:
    for name in "abc":
        for split in ("train", "test"):
            for index in range(8):
                place = tmp_path / "others" / split / name
                place.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 20 * index + ord(name)).save(place / f"{index}.png")
    folder = saved(tmp_path / "model", class_names=["a", "b", "c"], dataset="digits")
    options = ExportOptions(data=f"folder:{tmp_path / 'others'}", public=True)
    assert export_onnx(folder, tmp_path / "model.onnx", options).dataset == "folder:others"
