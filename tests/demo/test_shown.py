"""What the demo shows: which models of a run, their answers, their attention, and examples of the test set."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deitkit.api import load_model
from deitkit.comparison.compare import compare
from deitkit.data.dataset import load_dataset, load_test_examples
from deitkit.demo.shown import MAP_PX, load_demo
from deitkit.errors import CheckpointError, DataError
from deitkit.models.classifier import Classifier
from deitkit.models.saved import save_classifier
from deitkit.models.vit import TOKENS as BOTH
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.run.observer import Watcher
from deitkit.run.results import read_results

TINY_RUN = (
    "data.test_images=100", "data.train_images=64", "model.width=16", "model.depth=2", "model.heads=2",
    "methods=[none, token-hard]", "train.epochs=1", "train.batch_size=16", "train.warmup_epochs=0",
    "teacher.all_images=false", "teacher.train.batch_size=16", "teacher.train.epochs=1",
    "teacher.train.warmup_epochs=0", "teacher.min_top1=null", "teacher.allow_weak=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    compare(load_recipe("digits", list(TINY_RUN)), folder, watcher=Watcher())
    return folder


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test image, as a file."""
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    pixels = load_dataset(load_recipe("digits").data).test.images[0]
    Image.fromarray(pixels[0].numpy()).save(path)
    return path


def saved_student(folder: Path, class_names: Sequence[str], **fields: object) -> Path:
    """Save a student of colour images with both tokens and random weights, large enough that its answers differ."""
    torch.manual_seed(0)
    model = DeiT(image_px=16, patch_px=4, channels=3, classes=len(class_names), width=16, depth=2, heads=2, tokens=BOTH)
    for values in model.parameters():
        if values.ndim > 1:
            torch.nn.init.normal_(values, std=0.5)
    card = {"class_names": list(class_names), "channels": 3, "input_px": [16, 16], **fields}
    save_classifier(folder, Classifier(model, mean=(0.5,) * 3, std=(0.2,) * 3), card)
    return folder


def quiet(text: str) -> None:
    raise AssertionError(text)


def test_a_run_shows_its_winner_its_teacher_and_the_other_students_each_once(finished: Path) -> None:
    demo, results = load_demo(finished), read_results(finished)
    winner = results.row(results.winner)
    assert winner is not None
    assert demo.models[0].name == f"winner: {winner.row}"
    assert demo.models[1].name == f"teacher: {results.teachers[0].name}"
    methods = [model.card.method for model in demo.models]
    assert methods[0] == winner.method
    assert sorted(filter(None, methods)) == ["none", "token-hard"]
    assert f"{100 * winner.top1_mean:.1f} % of the test images right" in demo.models[0].about
    assert results.verdict in demo.summary


def test_a_column_says_the_accuracy_of_its_own_model_not_the_mean_over_seeds(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    stored = json.loads((run / "results.json").read_text(encoding="utf-8"))
    stored["seeds"] = [0, 1]
    for row in stored["rows"]:
        row.update(top1=[0.25, 0.75], top1_mean=0.5)
    (run / "results.json").write_text(json.dumps(stored), encoding="utf-8")
    card = json.loads((run / "winner" / "model.json").read_text(encoding="utf-8"))
    (run / "winner" / "model.json").write_text(json.dumps(card | {"seed": 1}), encoding="utf-8")
    winner, _, other = load_demo(run).models
    assert "75.0 % of the test images right" in winner.about
    assert "25.0 % of the test images right" in other.about
    del card["seed"]
    (run / "winner" / "model.json").write_text(json.dumps(card), encoding="utf-8")
    assert "50.0 % of the test images right (mean of 2 seeds)" in load_demo(run).models[0].about


def test_classes_of_one_name_are_shown_apart(digit: Path, tmp_path: Path) -> None:
    demo = load_demo(saved_student(tmp_path / "model", ["crane", "owl", "crane"]))
    answer = demo.models[0].answer(digit, demo.precision)
    assert set(answer) == {"crane (0)", "owl", "crane (2)"}
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


def test_answers_are_those_of_predict(finished: Path, digit: Path) -> None:
    demo = load_demo(finished)
    homes = [finished / "winner", finished / "teacher"]
    for shown, home in zip(demo.models, homes, strict=False):
        answer = shown.answer(digit, demo.precision)
        (expected,) = load_model(home).predict(digit, top=10, readout=shown.readout)
        assert answer == dict(expected["classes"])
        assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


def test_every_token_has_its_pictures_and_a_model_without_tokens_none(finished: Path, digit: Path) -> None:
    demo = load_demo(finished)
    seen = {model.card.method: model for model in demo.models}
    assert not seen[None].has_attention  # the teacher
    titles = [title for _, title in seen["token-hard"].attention(digit)]
    assert titles == [
        "what the student sees", "class, last block", "class, rollout",
        "distillation, last block", "distillation, rollout",
    ]  # fmt: skip
    (picture, _), *maps = seen["none"].attention(digit)
    assert len(maps) == 2
    assert picture.width >= MAP_PX
    small = np.asarray(Image.open(digit))
    times = picture.width // 8
    assert np.array_equal(np.asarray(picture)[::times, ::times, 0], small)


def test_examples_are_test_images_of_every_class_in_turn() -> None:
    recipe = load_recipe("digits").data
    examples = load_test_examples(recipe, 20)
    assert [name for _, name in examples] == [str(digit) for digit in range(10)] * 2
    test = load_dataset(recipe).test
    known = {(image[0].numpy().tobytes(), int(label)) for image, label in zip(test.images, test.labels, strict=True)}
    assert all((image[..., 0].tobytes(), int(name)) in known for image, name in examples)
    assert len(load_test_examples(recipe, 10**6)) == len(test)


def test_photographs_are_shown_whole_and_damaged_ones_left_out(
    tmp_path: Path, write_images: Callable[..., Path]
) -> None:
    folder = write_images(tmp_path / "photos", px=40)
    for damaged in sorted((folder / "test" / "cat").iterdir())[:11]:
        damaged.write_bytes(damaged.read_bytes()[:60])
    recipe = load_recipe("own-images", [f"data.name=folder:{folder}", "data.image_px=16"]).data
    examples = load_test_examples(recipe, 6)
    assert [name for _, name in examples].count("cat") == 1
    assert len(examples) == 6
    assert {image.shape for image, _ in examples} == {(40, 40, 3)}


def test_a_lone_model_and_an_onnx_file_can_be_shown(finished: Path, digit: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from deitkit.export.export import ExportOptions, export_onnx

    home = finished / "seed-0" / "token-hard"
    export_onnx(home, tmp_path / "model.onnx", ExportOptions())
    answers = []
    for path in (home, tmp_path / "model.onnx"):
        demo = load_demo(path)
        (shown,) = demo.models
        assert len(demo.examples(5, quiet)) == 5
        answers.append(shown.answer(digit, demo.precision))
    assert not load_demo(tmp_path / "model.onnx").models[0].has_attention
    assert max(answers[0], key=answers[0].__getitem__) == max(answers[1], key=answers[1].__getitem__)


def test_without_its_data_the_demo_says_so_and_goes_on(finished: Path) -> None:
    said: list[str] = []
    demo = load_demo(finished / "winner", data="folder:gone")
    assert demo.examples(5, said.append) == []
    assert "no example images" in said[0]
    assert "gone" in said[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
    ids=["empty", "text", "PostScript", "SVG"],
)  # fmt: skip
def test_a_file_that_is_no_image_is_refused_in_one_sentence(finished: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret-name.png"
    path.write_bytes(content)
    demo = load_demo(finished / "winner")
    with pytest.raises(DataError, match="This file is damaged") as raised:
        demo.models[0].answer(path, demo.precision)
    assert "secret-name" not in str(raised.value)


def test_what_has_no_single_winner_is_refused(tmp_path: Path, finished: Path) -> None:
    stored = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    (tmp_path / "results.json").write_text(json.dumps(stored | {"folds": [1, 2]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="one of its folds"):
        load_demo(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_demo(tmp_path / "nothing")


def test_a_student_answers_by_the_readout_that_won_else_by_its_default_one(finished: Path, digit: Path) -> None:
    demo, results = load_demo(finished), read_results(finished)
    winner = results.row(results.winner)
    assert winner is not None
    expected = {"none": "class", "token-hard": "joint", winner.method: winner.readout}
    for shown in demo.models:
        if shown.card.method is None:  # the teacher
            continue
        home = finished / "seed-0" / shown.card.method
        (predicted,) = load_model(home).predict(digit, top=10, readout=expected[shown.card.method])
        assert shown.answer(digit, demo.precision) == dict(predicted["classes"])


def test_without_gradio_the_command_names_what_to_install(
    run: Callable[..., tuple[int, str, str]], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run("demo", finished)
    assert code == 2
    assert "pip install 'deitkit[demo]'" in err


def test_a_port_that_is_taken_is_named(finished: Path) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "deitkit", "demo", str(finished), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert f"error: --port {port} is taken: end what uses it, or name another port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_two_teachers_of_one_name_are_told_apart_and_a_stopped_student_is_left_out(tmp_path: Path) -> None:
    own = [field for field in TINY_RUN if not field.startswith("teacher.")]
    teacher = (
        "{name: cifar/resnet20, min_top1: null, allow_weak: true, train: {epochs: 1, batch_size: 16, warmup_epochs: 0}}"
    )
    compare(load_recipe("digits", [*own, f"teachers=[{teacher}, {teacher}]"]), tmp_path / "run", watcher=Watcher())
    names = [model.name for model in load_demo(tmp_path / "run").models]
    assert len({*names}) == 4
    assert names[1:3] == ["teacher 1: cifar/resnet20", "teacher 2: cifar/resnet20"]
    stored = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    other = "none" if stored["winner"].startswith("token-hard") else "token-hard"
    for row in stored["rows"]:
        if row["method"] == other:
            row.update(top1=[None], top1_mean=None, status="seed 0 stopped")
    (tmp_path / "run" / "results.json").write_text(json.dumps(stored), encoding="utf-8")
    assert [model.card.method for model in load_demo(tmp_path / "run").models].count(other) == 0


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_an_image_that_is_not_square_is_seen_as_in_training(tmp_path: Path, fit: str) -> None:
    home = saved_student(tmp_path / "model", ["cat", "dog", "owl"], fit=fit, eval_crop=0.875)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    demo = load_demo(home)
    (expected,) = load_model(home).predict(tmp_path / "wide.png", top=3)
    assert demo.models[0].answer(tmp_path / "wide.png", demo.precision) == dict(expected["classes"])
