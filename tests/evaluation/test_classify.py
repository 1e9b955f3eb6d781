"""Classifying many files: in order, in batches, by several processes, into files, and past what cannot be read."""

import csv
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import TINY
from deitkit.api import Model
from deitkit.comparison.compare import compare
from deitkit.data.dataset import load_dataset
from deitkit.data.selection import read_selection
from deitkit.errors import DataError, RecipeError
from deitkit.evaluation import classify as module
from deitkit.evaluation.apply import evaluate_model, load_data_of
from deitkit.evaluation.classify import Classification, image_files
from deitkit.evaluation.seen_images import data_recipe_of, share_seen
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.saved import load_classifier, read_card, save_classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision

Run = Callable[..., tuple[int, str, str]]


def save_student(folder: Path, tokens: tuple[str, ...] = ("class", "distillation")) -> Path:
    torch.manual_seed(0)
    model = DeiT(image_px=8, patch_px=4, channels=3, classes=3, width=16, depth=1, heads=2, tokens=tokens)
    card = {"class_names": ["a", "b", "c"], "channels": 3, "input_px": [8, 8], "method": "token-hard"}
    save_classifier(folder, Classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3), card)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_student(tmp_path / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """150 images in two folders; two files of them cannot be decoded."""
    for index in range(150):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (index, 255 - index, 7 * index % 256)).save(path)
    (tmp_path / "photos" / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "photos" / "b" / "empty.png").write_bytes(b"")
    return tmp_path / "photos"


def test_batches_and_processes_change_nothing(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = []
    for path in sorted(photos.glob("*/[0-9]*.png")):
        one_by_one += list(Classification(model, [path]))
    together = [found for found in Classification(model, [photos]) if "error" not in found]
    apart = [found for found in Classification(model, [photos], workers=2) if "error" not in found]
    assert [one["image"] for one in together] == [one["image"] for one in one_by_one]
    assert apart == together
    for one, other in zip(together, one_by_one, strict=True):
        assert [name for name, _ in one["classes"]] == [name for name, _ in other["classes"]]
        assert [share for _, share in one["classes"]] == pytest.approx(
            [share for _, share in other["classes"]], abs=1e-5
        )


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(model: Path, photos: Path) -> None:
    found = list(Classification(model, [photos]))
    assert len(found) == 152
    bad = {Path(one["image"]).name: one for one in found if "error" in one}
    assert set(bad) == {"broken.jpg", "empty.png"}
    assert all(one["classes"] == [] for one in bad.values())


def test_only_some_images_are_in_memory(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    decode = module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda *arguments: read.append(1) or decode(*arguments))
    next(iter(Classification(model, [photos])))
    assert len(read) == module.BATCH_SIZE


def test_a_file_that_is_named_twice_is_read_once(model: Path, photos: Path) -> None:
    path = photos / "a" / "000.png"
    assert len(list(Classification(model, [path, path, photos / "a"]))) == 76


@pytest.mark.parametrize("tokens", [("class",), ("class", "distillation"), ()])
def test_embeddings_are_the_inputs_of_the_heads(
    tokens: tuple[str, ...], tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deitkit.system.device.computes_bf16", lambda _: False)  # to compare in float32
    folder = save_student(tmp_path / "other", tokens)
    (found,) = Classification(folder, [photos / "a" / "000.png"], embed=True, readout="class")
    assert found["embedding"].dtype == np.float32
    assert found["embedding"].shape == (16 * max(len(tokens), 1),)
    from deitkit.models.saved import load_classifier

    classifier, _ = load_classifier(folder, torch.device("cpu"))
    logits = classifier.model.head(torch.from_numpy(found["embedding"][None, :16]))
    shares = dict(found["classes"])
    assert logits.softmax(-1)[0].tolist() == pytest.approx([shares[name] for name in "abc"], abs=1e-5)


def test_a_cnn_has_embeddings_too(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(0)
    card = {"class_names": ["a", "b", "c"], "channels": 3, "input_px": [8, 8], "architecture": "cifar/resnet20"}
    save_classifier(
        tmp_path / "cnn", Classifier(CifarResNet(20, classes=3, channels=3), mean=(0.5,) * 3, std=(0.5,) * 3), card
    )
    (found,) = Classification(tmp_path / "cnn", [photos / "a" / "000.png"], embed=True)
    assert found["embedding"].shape == (64,)


def test_mistakes_are_one_sentence(model: Path, photos: Path, tmp_path: Path) -> None:
    for paths, words in (
        ([tmp_path / "nothing.png"], r"nothing\.png does not exist"),
        ([photos / "a" / "broken.jpg"], r"broken\.jpg cannot be decoded .* convert it"),
        ([tmp_path / "model"], "contains no image"),
    ):
        with pytest.raises(DataError, match=words):
            list(Classification(model, paths))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    (tmp_path / "bad" / "b.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of 2 images can be decoded, first .*a\.png .*: convert it to PNG, and"):
        list(Classification(model, [tmp_path / "bad"]))
    with pytest.raises(RecipeError, match="readout other: this model has class, distillation"):
        list(Classification(model, [photos], readout="other"))
    for top in (0, -1):
        with pytest.raises(RecipeError, match=r"top is .*: give the number of classes to return, at least 1"):
            list(Classification(model, [photos], top=top))


def test_files_of_answers(model: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    code, text, _ = run("predict", model, photos, "--out", tmp_path / "a.csv", "--embeddings", tmp_path / "e.parquet")
    assert code == 0
    assert "150 of 152 images classified, in " in text
    assert text.count("left out: ") == 2
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = list(Classification(model, [photos]))
    assert [row["image"] for row in rows] == [one["image"] for one in expected]
    assert [row["class_1"] for row in rows] == [one["classes"][0][0] if one["classes"] else "" for one in expected]
    assert [bool(row["error"]) for row in rows] == ["error" in one for one in expected]
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.num_rows == 150
    assert len(table["embedding"][0].as_py()) == 32
    assert run("predict", model, photos, "--out", tmp_path / "a.jsonl")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [one["image"] for one in expected]
    assert json.loads(run("predict", model, photos, "--out", tmp_path / "b.csv", "--json")[1])["classified"] == 150


def test_a_named_file_that_cannot_be_decoded_costs_no_other(
    model: Path, photos: Path, tmp_path: Path, run: Run
) -> None:
    """As when a shell writes out ``photos/*``."""
    named = sorted((photos / "a").iterdir())
    code, text, _ = run("predict", model, *named, "--out", tmp_path / "a.csv")
    assert code == 0
    assert "broken.jpg cannot be decoded" in text
    assert "75 of 76 images classified, in " in text
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows if row["error"]] == [str(photos / "a" / "broken.jpg")]
    assert len(rows) == 76
    answers = Model(model).predict([str(path) for path in named])
    assert [path for path, answer in zip(named, answers, strict=True) if "error" in answer] == [
        photos / "a" / "broken.jpg"
    ]


def test_an_image_that_is_too_large_is_to_be_made_smaller(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 50):  # Pillow warns beyond its limit, and raises beyond twice as much
        Image.new("RGB", (side, side)).save(photos / "large.png")
        told = r"large\.png cannot be decoded \(more than 1,000 pixels\): resize it or leave it out"
        with pytest.raises(DataError, match=told):
            list(Classification(model, [photos / "large.png"]))
        (error,) = [one["error"] for one in Classification(model, [photos]) if one["image"].endswith("large.png")]
        assert error == "more than 1,000 pixels"


def test_the_callers_random_numbers_go_on(model: Path, photos: Path) -> None:
    for workers in (0, 2):
        classification = Classification(load_classifier(model, torch.device("cpu")), [photos], workers=workers)
        before = torch.get_rng_state()
        list(classification)
        assert torch.equal(torch.get_rng_state(), before), workers


@pytest.mark.parametrize(("method", "expected"), [("fork", True), ("spawn", False), (None, None)])
def test_processes_start_only_where_they_do_not_run_the_users_script_again(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, method: str | None, expected: bool | None
) -> None:
    asked: list[int | None] = []

    class Asked(Classification):
        def __init__(self, *inputs: Any, workers: int | None, **settings: Any) -> None:
            asked.append(workers)
            super().__init__(*inputs, workers=0, **settings)

    monkeypatch.setattr("deitkit.api.Classification", Asked)
    context = multiprocessing.get_context()
    if method is None:  # not chosen yet, and asking leaves it so
        expected = multiprocessing.get_all_start_methods()[0] == "fork"
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None if allow_none else context)
    else:
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    Model(model).predict(photos / "a" / "000.png")
    assert asked == [None if expected else 0]


def test_bf16_is_left_out_where_the_processor_has_no_instructions_for_it(
    model: Path, photos: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(card | {"precision": "bf16"}))
    (photos / "c").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "c" / "000.png")
    words = ("evaluate", model, "--data", f"folder:{photos}", "--all")
    for computes, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("deitkit.system.device.computes_bf16", lambda _, computes=computes: computes)
        classification = Classification(model, [photos])
        assert classification.precision.dtype == expected
        told = "in fp32, not in the model's bf16, for which this processor has no instructions"
        assert classification.remarks == ([] if computes else [told])
        for said in (run(*words)[1], run("predict", model, photos / "a" / "000.png")[1]):
            assert (told in " ".join(said.split())) is not computes


def test_ctrl_c_tells_what_is_in_the_files(
    model: Path, photos: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(classification: Classification) -> Iterator[Any]:
        yield from itertools.islice(original(classification), 80)
        raise KeyboardInterrupt

    original = Classification.__iter__
    monkeypatch.setattr(Classification, "__iter__", interrupted)
    answers, features = tmp_path / "a.csv", tmp_path / "e.parquet"
    code, _, errors = run("predict", model, photos, "--out", answers, "--embeddings", features)
    assert (code, errors) == (130, f"stopped after 80 of 152 images, which are in {answers} and {features}\n")
    with answers.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 80
    assert pq.read_table(features).num_rows == 79  # one of them cannot be decoded
    assert run("predict", model, photos)[::2] == (130, "stopped after 80 of 152 images\n")


def test_a_mistake_leaves_no_file(model: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    answers, features = tmp_path / "a.csv", tmp_path / "e.parquet"
    for words in ((photos, "--readout", "other"), (photos / "a" / "broken.jpg",)):
        code, _, errors = run("predict", model, *words, "--out", answers, "--embeddings", features)
        assert (code, errors.count("\n")) == (2, 1)
        assert not answers.exists()
        assert not features.exists()


@pytest.mark.skipif(os.name != "posix", reason="limits as POSIX has them")
@pytest.mark.parametrize("bytes_left", [0, 100, 3000])
@pytest.mark.parametrize("options", [("--out", "a.csv"), ("--embeddings", "e.parquet"), ("--out", "a.jsonl")])
def test_a_full_disk_leaves_no_file(
    model: Path, photos: Path, tmp_path: Path, run: Run, options: tuple[str, str], bytes_left: int
) -> None:
    import resource

    option, name = options
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))  # Python ignores the signal: it is an OSError
    try:
        code, _, errors = run("predict", model, photos, option, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert errors == f"error: {tmp_path / name} cannot be written (file too large): make room, or name another place\n"
    assert not (tmp_path / name).exists()


def test_a_file_that_exists_leaves_no_other(model: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "e.parquet").write_text("mine")
    words = ("predict", model, photos, "--out", tmp_path / "a.csv", "--embeddings", tmp_path / "e.parquet")
    assert "exists: name a new file" in run(*words)[2]
    assert not (tmp_path / "a.csv").exists()
    assert (tmp_path / "e.parquet").read_text() == "mine"


@pytest.mark.parametrize(("option", "name", "words"), [
    ("--out", "a.txt", "has another ending than .csv or .jsonl"),
    ("--embeddings", "a.csv", "has another ending than .parquet"),
    ("--out", "nowhere/a.csv", "cannot be written (no such file or directory)"),
    ("--out", "there.csv", "exists: name a new file"),
])  # fmt: skip
def test_files_that_cannot_be_written(
    model: Path, photos: Path, tmp_path: Path, run: Run, option: str, name: str, words: str
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    code, _, errors = run("predict", model, photos, option, tmp_path / name)
    assert code == 2
    assert words in errors
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert image_files(tmp_path) == [tmp_path / "a.png"]
    with pytest.raises(DataError, match=r"b\.png is neither a file nor a folder: name image files"):
        image_files(tmp_path / "b.png")


def test_classes_in_another_order_are_the_same_classes(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    photos = write_images(tmp_path / "photos", classes=("9", "10"))  # a folder has 10 first, a CSV file 9
    rows = [f"{path.relative_to(photos)},{path.parent.name},{path.parts[-3]}" for path in photos.glob("*/*/*.png")]
    (photos / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    model = DeiT(image_px=16, patch_px=8, channels=3, classes=2, width=16, depth=1, heads=2, tokens=("class",))
    model.head.bias.data = torch.tensor([9.0, 0.0])  # always 10
    card = {"class_names": ["10", "9"], "channels": 3, "input_px": [16, 16]}
    save_classifier(tmp_path / "model", Classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3), card)
    (photos / "test" / "9" / "0.png").unlink()
    rows.remove("test/9/0.png,9,test")
    (photos / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    found = [
        evaluate_model(tmp_path / "model", f"{kind}:{photos}{more}")
        for kind, more in (("folder", ""), ("csv", "/list.csv"))
    ]
    assert [one["readouts"][0]["top1"] for one in found] == [pytest.approx(12 / 23)] * 2


def test_only_test_images_are_read_to_evaluate(
    tmp_path: Path, write_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos")
    model = DeiT(image_px=16, patch_px=8, channels=3, classes=2, width=16, depth=1, heads=2, tokens=("class",))
    card = {"class_names": ["cat", "dog"], "channels": 3, "input_px": [16, 16]}
    save_classifier(tmp_path / "model", Classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3), card)
    wanted: list[int] = []

    def counted(listing: Any, selection: Any, *rest: Any) -> Any:
        wanted.append(len(selection))
        return read_selection(listing, selection, *rest)

    monkeypatch.setattr("deitkit.data.dataset.read_selection", counted)
    found = evaluate_model(tmp_path / "model", f"folder:{photos}")
    assert (found["n"], wanted) == (24, [24])


def test_data_with_classes_in_another_order_get_the_models_labels(tmp_path: Path) -> None:
    """As those of a folder ('10' before '9') and of a CSV file."""
    torch.manual_seed(0)
    model = DeiT(image_px=8, patch_px=4, channels=1, classes=10, width=16, depth=1, heads=2, tokens=("class",))
    names = [str(label) for label in range(10)]
    for name, order in (("same", names), ("reversed", names[::-1])):
        card = {"class_names": order, "channels": 1, "input_px": [8, 8]}
        save_classifier(tmp_path / name, Classifier(model, mean=(0.5,), std=(0.5,)), card)
    same, other = (read_card(tmp_path / name) for name in ("same", "reversed"))
    as_is, moved = load_data_of(same, "digits", None), load_data_of(other, "digits", None)
    assert moved.class_names == tuple(names[::-1])
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(moved, split).labels, 9 - getattr(as_is, split).labels)
    with pytest.raises(DataError, match="has the classes"):
        load_data_of(same.model_copy(update={"class_names": tuple("abcdefghij")}), "digits", None)


def test_of_equal_classes_the_first_is_the_answer_as_in_the_table(model: Path) -> None:
    classifier, card = load_classifier(model, torch.device("cpu"))
    student = classifier.model
    assert isinstance(student, DeiT)
    for head in (student.head, student.head_dist):
        assert isinstance(head, torch.nn.Linear)
        head.weight.data.zero_()
        head.bias.data.copy_(torch.tensor([-1.0, 2.0, 2.0]))
    precision = Precision.choose("bf16", torch.device("cpu"))
    pixels = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 4
    for readout in ("class", "joint", "joint-logits"):
        answers = module.classify_pixels(classifier, card, precision, pixels, readout)
        assert [answer["classes"][0][0] for answer in answers] == ["b"] * 4
        assert [name for name, _ in answers[0]["classes"]] == ["b", "c", "a"]


def test_a_model_that_takes_images_otherwise_than_it_learned_them_is_still_known_to_have_seen_them(
    tmp_path: Path, run: Run
) -> None:
    """Of a conversion: other pixels have other hashes, so the images are read as they were learned."""
    fields = [*TINY, "methods=[none]", "train.epochs=1", "data.split_seed=3"]
    compare(load_recipe("digits", fields), tmp_path / "run", watcher=Watcher())
    learned = tmp_path / "run" / "seed-0" / "none"
    for name, options in (("larger", ("--image-px", 16)), ("other", ("--patch-px", 2))):
        assert run("convert", learned, "--to", "ours", "--out", tmp_path / name, *options)[0] == 0
    for folder in (learned, tmp_path / "larger", tmp_path / "other"):
        assert evaluate_model(folder, "digits")["trained_on"] == 0, "divided as for its training"
        card = read_card(folder)
        elsewhere = card.model_copy(update={"split": {"split_seed": 0, "test_fraction": 0.4}})
        data = data_recipe_of(elsewhere, "digits", None)
        dataset = load_dataset(data)
        # Of 100 training images, those among the test images of another split.
        assert share_seen(elsewhere, data, dataset) > 0, folder


def test_all_images_of_new_data_can_be_measured(tmp_path: Path, write_images: Callable[..., Path], run: Run) -> None:
    photos = write_images(tmp_path / "photos", classes=("a", "b", "c"), count=10, parts=("",))
    model = save_student(tmp_path / "model")
    _, shown, said = run("evaluate", model, "--data", f"folder:{photos}")
    assert "n = 6" in shown
    assert "these are 6 of 30 images, since there is no test split: --all measures on all" in shown + said
    _, shown, said = run("evaluate", model, "--data", f"folder:{photos}", "--all")
    assert "n = 30" in shown
    assert "these are" not in shown + said
    assert json.loads(run("evaluate", model, "--data", f"folder:{photos}", "--json")[1])["drawn_from"] == 30


def test_all_images_are_measured_however_few(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    """Nothing divides them, so a class may have one image, and the model's folds do not matter."""
    photos = write_images(tmp_path / "photos", classes=("a", "b", "c"), count=1, parts=("",))
    model = save_student(tmp_path / "model")
    card = json.loads((model / "model.json").read_text())
    for split in ({}, {"split_seed": 0, "folds": 5, "fold": 2}):
        (model / "model.json").write_text(json.dumps(card | {"split": split}))
        found = evaluate_model(model, f"folder:{photos}", everything=True)
        assert (found["n"], found["drawn_from"], found["remarks"]) == (3, None, [])
        with pytest.raises(DataError, match="needs at least"):
            evaluate_model(model, f"folder:{photos}")


def test_images_of_some_of_the_classes_can_be_measured(
    tmp_path: Path, write_images: Callable[..., Path], run: Run
) -> None:
    photos = write_images(tmp_path / "archive" / "photos", classes=("c", "a"), count=3, parts=("",))
    model = save_student(tmp_path / "model")
    found = evaluate_model(model, f"folder:{photos}", everything=True)
    answers = [one["classes"][0][0] for one in Classification(model, [photos], readout="joint", top=1)]
    right = [name == place for name, place in zip(answers, "aaaccc", strict=True)]
    assert found["readouts"][2]["readout"] == "joint"
    assert found["readouts"][2]["top1"] == sum(right) / 6
    assert found["remarks"] == ["these images are of 2 classes, and the model may answer any of its 3"]
    assert found["remarks"][0] in " ".join(run("evaluate", model, "--data", f"folder:{photos}", "--all")[1].split())
    with pytest.raises(DataError, match="has the classes a, c, but the model has a, b, c: evaluate it on data with"):
        evaluate_model(model, f"folder:{photos}")
    write_images(tmp_path / "archive" / "photos", classes=("d",), count=3, parts=("",))
    with pytest.raises(DataError, match="has the classes a, c, d, but the model has"):
        evaluate_model(model, f"folder:{photos}", everything=True)
    with pytest.raises(DataError, match=rf"but the model has a, b, c: did you mean folder:{photos}\?"):
        evaluate_model(model, f"folder:{photos.parent}", everything=True)
