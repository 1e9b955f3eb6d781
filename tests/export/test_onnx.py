"""ONNX files: equal to the model, complete, usable by every command, and refused when they are not as written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from deitkit.api import load_model
from deitkit.data.dataset import load_dataset
from deitkit.data.decode import decode_image
from deitkit.errors import CheckpointError, DeitkitError, RecipeError
from deitkit.evaluation.readouts import readout_scores
from deitkit.export.export import ExportOptions, export_onnx, int8_file, record_file, remarks
from deitkit.export.record import ExportRecord
from deitkit.models import onnx_file
from deitkit.models.classifier import Classifier
from deitkit.models.onnx_file import CARD_KEY, read_onnx, read_sealed
from deitkit.models.saved import save_classifier
from deitkit.models.vit import DeiT
from deitkit.models.zoo import create_classifier
from deitkit.recipe.schema import DataRecipe
from fuzz_helpers import cases

Run = Callable[..., tuple[int, str, str]]
DIGITS = [str(digit) for digit in range(10)]


def student(tokens: tuple[str, ...], channels: int = 1, px: int = 8, **changes: Any) -> nn.Module:
    fields = {"image_px": px, "patch_px": 2, "width": 32, "depth": 2, "heads": 2, "stem": "patch", **changes}
    return DeiT(channels=channels, classes=10, tokens=tokens, layer_scale=None, **fields)


def saved(folder: Path, model: nn.Module, channels: int = 1, px: int = 8, **card: Any) -> Path:
    """Save a classifier of digits with random weights, large enough that its answers differ."""
    generator = torch.Generator().manual_seed(0)
    for values in model.parameters():
        if values.ndim > 1:
            values.data = torch.randn(values.shape, generator=generator) * (0.5 / values[0].numel() ** 0.5)
    classifier = Classifier(model, mean=(0.3,) * channels, std=(0.4,) * channels, image_px=card.get("image_px")).eval()
    described = {"class_names": DIGITS, "channels": channels, "input_px": [px, px], "dataset": "digits", **card}
    save_classifier(folder, classifier, {**described, "image_px": classifier.image_px})
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student with both tokens, with model.onnx and model-int8.onnx in it."""
    folder = saved(tmp_path_factory.mktemp("exported") / "token-hard", student(("class", "distillation")))
    export_onnx(folder, folder / "model.onnx", ExportOptions(int8=True, calibration_images=64))
    return folder


def torch_probabilities(folder: Path, readout: str, images: torch.Tensor) -> torch.Tensor:
    model = load_model(folder)
    classifier, _ = onnx_or_folder(model.folder)
    with torch.inference_mode():
        return readout_scores(classifier(images.float() / 255))[readout].softmax(dim=-1)


def onnx_or_folder(folder: Path) -> Any:
    from deitkit.models.saved import load_classifier

    return load_classifier(folder, torch.device("cpu"))


MODELS: dict[str, Callable[[Path], Path]] = {
    "one token": lambda folder: saved(folder, student(("class",))),
    "distillation token": lambda folder: saved(folder, student(("distillation",))),
    "mean pooling": lambda folder: saved(folder, student(())),
    "stem of convolutions": lambda folder: saved(folder, student(("class",), stem="conv", patch_px=4)),
    "layer scale, colour, 12 px": lambda folder: saved(
        folder, student(("class", "distillation"), 3, 12, patch_px=4), 3, 12
    ),
    "CNN": lambda folder: saved(
        folder, create_classifier("cifar/resnet20", classes=10, channels=3).model, 3, 8, architecture="cifar/resnet20"
    ),
    "CNN that enlarges its images": lambda folder: saved(
        folder,
        create_classifier("cifar/resnet20", classes=10, channels=1).model,
        architecture="cifar/resnet20",
        image_px=20,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_answers_as_its_model(name: str, tmp_path: Path) -> None:
    folder = MODELS[name](tmp_path / "model")
    record = export_onnx(folder, tmp_path / "out.onnx", ExportOptions())
    assert record.rows[1].largest_difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    card = json.loads(session.get_modelmeta().custom_metadata_map[CARD_KEY])
    for count in (1, 2, 7):  # the example of the exporter has two
        images = torch.randint(256, (count, card["channels"], *card["input_px"]), dtype=torch.uint8)
        (ours,) = session.run(["probabilities"], {"images": images.numpy()})
        theirs = torch_probabilities(folder, record.readout, images).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(ours.sum(axis=1), 1, atol=1e-5)
    assert np.ptp(theirs) > 0.01


def test_the_code_of_the_docs_prepares_images_as_the_training_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def prepare" in block)
    draw = np.random.default_rng(0)
    pictures = {}
    for mode, size in (("RGB", (40, 30)), ("L", (21, 50)), ("RGBA", (33, 33)), ("RGB", (20, 44))):
        channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
        picture = Image.fromarray(draw.integers(0, 256, (*size, *channels), dtype=np.uint8), mode)
        pictures[f"{mode}-{size[0]}.png"] = picture
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    for channels, crop in ((3, 0.875), (1, 1.0)):
        folder = saved(tmp_path / f"of-{channels}", student(("class",), channels), channels, eval_crop=crop)
        export_onnx(folder, folder / "model.onnx", ExportOptions())
        monkeypatch.chdir(folder)
        for name, picture in pictures.items():
            picture.save("photo.png", exif=exif if name == "RGB-20.png" else None)
            found: dict[str, Any] = {}
            exec(code, found)
            expected = decode_image(Path("photo.png"), channels, 8, crop)
            np.testing.assert_array_equal(found["prepare"]("photo.png"), expected, name)
            assert capsys.readouterr().out.strip() in DIGITS


@pytest.mark.parametrize("readout", ["class", "distillation", "joint", "joint-logits"])
def test_every_readout_can_be_exported(readout: str, exported: Path, tmp_path: Path) -> None:
    record = export_onnx(exported, tmp_path / "one.onnx", ExportOptions(readout=readout, takes_bytes=False))
    assert record.readout == readout
    images = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx")
    (ours,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(ours, torch_probabilities(exported, readout, images * 255).numpy(), atol=1e-5)


def test_another_program_finds_all_that_it_needs(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [(one.name, one.type, one.shape[1:]) for one in session.get_inputs()] == [
        ("images", "tensor(uint8)", [1, 8, 8])
    ]
    assert [(one.name, one.shape[1:]) for one in session.get_outputs()] == [("probabilities", [10])]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == DIGITS
    assert json.loads(facts["mean"]) == pytest.approx([0.3])
    assert json.loads(facts["fit"]) == "crop"
    card = json.loads(facts[CARD_KEY])
    assert card["exported_readout"] == "joint"
    assert card["input"] == "uint8, 0 to 255"
    assert len(card["weights_sha256"]) == 64


def test_nothing_of_this_machine_is_in_a_file(exported: Path) -> None:
    for file in ("model.onnx", "model-int8.onnx"):
        content = (exported / file).read_bytes()
        assert b"site-packages" not in content
        assert b"deitkit/models" not in content
        assert str(exported.parent).encode() not in content


def test_int8_is_smaller_and_nearly_as_good(exported: Path) -> None:
    record = ExportRecord.model_validate_json(record_file(exported / "model.onnx").read_text())
    original, exact, quantised = record.rows
    assert [row.name for row in record.rows] == ["PyTorch", "ONNX", "ONNX int8"]
    assert exact.same_top1 == record.n == 359
    assert exact.top1 == original.top1
    assert quantised.same_top1 > 0.9 * record.n
    assert 1e-4 < quantised.largest_difference < 0.2
    assert record.calibration_images == 64
    assert quantised.file_bytes == int8_file(exported / "model.onnx").stat().st_size
    assert min(row.milliseconds for row in record.rows) > 0
    import onnx

    types = {tensor.data_type for tensor in onnx.load(exported / "model-int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types


def test_what_int8_costs_is_said(exported: Path) -> None:
    record = ExportRecord.model_validate_json(record_file(exported / "model.onnx").read_text())
    worse = record.rows[2].model_copy(update={"top1": record.rows[0].top1 - 0.02, "milliseconds": 0.0})
    (said,) = remarks(record.model_copy(update={"rows": (*record.rows[:2], worse)}))
    assert "int8 loses 2.0 points of accuracy: try more --calibration-images" in said
    good = worse.model_copy(update={"top1": record.rows[0].top1 - 0.005})
    assert remarks(record.model_copy(update={"rows": (*record.rows[:2], good)})) == []
    slow = good.model_copy(update={"milliseconds": 1e6})
    assert "not faster" in remarks(record.model_copy(update={"rows": (*record.rows[:2], slow)}))[0]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    digits = load_dataset(DataRecipe(name="digits"))
    Image.fromarray(digits.test.pixels(torch.tensor([0]))[0, 0].numpy()).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def test_every_command_takes_a_file(exported: Path, picture: Path, run: Run) -> None:
    for name in ("model.onnx", "model-int8.onnx"):
        file = exported / name
        code, out, _ = run("predict", file, picture, "--json")
        assert code == 0
        (answer,) = json.loads(out)
        assert answer["readout"] == "joint"
        code, out, _ = run("evaluate", file, "--data", "digits", "--json")
        assert code == 0
        assert [row["readout"] for row in json.loads(out)["readouts"]] == ["joint"]
        code, out, _ = run("verify", file, "--json")
        assert code == 0, out
        assert json.loads(out)["recorded"] == json.loads(out)["measured"]
        code, out, _ = run("bench", "infer", "--model", file, "--repeats", "1", "--steps", "1", "--json")
        assert code == 0
        assert json.loads(out)["images_per_second"] > 0
    folder = load_model(exported).predict(picture)[0]["classes"]
    file_answer = load_model(exported / "model.onnx").predict(picture)[0]["classes"]
    assert [name for name, _ in folder] == [name for name, _ in file_answer]
    assert [share for _, share in file_answer] == pytest.approx([share for _, share in folder], abs=0.02)


def test_verify_notices_another_accuracy(exported: Path, tmp_path: Path, run: Run) -> None:
    record = json.loads(record_file(exported / "model.onnx").read_text())
    record["rows"][1]["top1"] += 0.02
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
    (tmp_path / "model.onnx.json").write_text(json.dumps(record))
    code, out, _ = run("verify", tmp_path / "model.onnx")
    assert code == 1
    assert "NO" in out
    (tmp_path / "model.onnx").rename(tmp_path / "renamed.onnx")
    (tmp_path / "model.onnx.json").rename(tmp_path / "renamed.onnx.json")
    code, _, errors = run("verify", tmp_path / "renamed.onnx")
    assert code == 2
    assert "give it the name that it was written with" in errors
    (tmp_path / "renamed.onnx.json").write_text("{")
    assert "renamed.onnx.json is damaged" in run("verify", tmp_path / "renamed.onnx")[2]
    (tmp_path / "renamed.onnx.json").unlink()
    assert "has no record beside it" in run("verify", tmp_path / "renamed.onnx")[2]


@cases(1.2)
@given(data=st.data())
def test_a_changed_file_never_reaches_onnx_runtime(exported: Path, data: st.DataObject) -> None:
    content = (exported / "model.onnx").read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(("cut", "flip", "insert", "drop", "twice")))
    changed = {
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :],
        "insert": content[:place] + data.draw(st.binary(min_size=1, max_size=9)) + content[place:],
        "drop": content[:place] + content[place + data.draw(st.integers(1, 99)) :],
        "twice": content + content,
    }[kind]
    file = exported / "changed.onnx"
    file.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"was not written by deitkit|is damaged or was changed"):
        read_sealed(file)


def test_other_files_are_refused_in_a_sentence(
    exported: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    model = onnx.load(exported / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "theirs.onnx")
    (tmp_path / "empty.onnx").touch()
    monkeypatch.setattr(onnx_file, "open_session", lambda content: pytest.fail("a file of others was opened"))
    for name, sentence in {
        "theirs.onnx": "was not written by deitkit: export a model with deitkit export MODEL --to onnx",
        "empty.onnx": "was not written by deitkit",
        "none.onnx": "cannot be read",
    }.items():
        code, _, errors = run("evaluate", tmp_path / name, "--data", "digits")
        assert code == 2
        assert sentence in errors
        assert "Traceback" not in errors


def test_a_file_of_a_later_format_is_refused(exported: Path, tmp_path: Path) -> None:
    import onnx

    from deitkit.export.graph import finish

    model = onnx.load(exported / "model.onnx")
    card = json.loads(next(entry.value for entry in model.metadata_props if entry.key == CARD_KEY))
    (tmp_path / "later.onnx").write_bytes(finish(model, card | {"onnx_format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this deitkit reads format 1"):
        read_onnx(tmp_path / "later.onnx")


def test_mistakes_are_told_before_anything_is_built(
    exported: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deitkit.export.export.build_onnx", lambda *_: pytest.fail("built"))
    out = tmp_path / "out.onnx"
    for arguments, sentence in (
        ((exported, "--out", exported / "model.onnx"), "already exists: name a new file"),
        ((exported,), "already exists: name a new file"),
        ((exported, "--out", tmp_path / "out.pt"), "give a name that ends in .onnx"),
        ((exported, "--out", out, "--readout", "both"), "readout both: this model has class, distillation, joint"),
        ((exported, "--out", out, "--data", "cifa10"), "data.name=cifa10 is not a data set: did you mean cifar10?"),
        ((tmp_path, "--out", out), "contains no model.json"),
        ((exported / "model.onnx", "--out", out), "is an ONNX file already"),
    ):
        code, _, errors = run("export", *arguments)
        assert code == 2, arguments
        assert sentence in errors
    nameless = saved(tmp_path / "nameless", student(("class",)), dataset=None)
    with pytest.raises(RecipeError, match="names no data set to check the file on: give one with --data"):
        export_onnx(nameless, out, ExportOptions())
    assert not out.exists()


def test_a_file_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    for name in DIGITS:
        for split in ("train", "test"):
            (tmp_path / "two words" / split / name).mkdir(parents=True)
            for index in range(4):
                image = Image.new("L", (8, 8), 20 * int(name) + index + (10 if split == "test" else 0))
                image.save(tmp_path / "two words" / split / name / f"{index}.png")
    data = f"folder:{tmp_path / 'two words'}"
    folder = saved(tmp_path / "model", student(("class",)), dataset=data)
    record = export_onnx(folder, tmp_path / "out.onnx", ExportOptions())
    assert str(tmp_path).encode() not in (tmp_path / "out.onnx").read_bytes()
    assert read_onnx(tmp_path / "out.onnx")[1].dataset == "folder:two words"
    assert record.dataset == data  # by which `verify` finds the images here


def test_calibration_images_without_int8_are_refused(exported: Path, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("export", exported, "--out", tmp_path / "out.onnx", "--calibration-images", 5)
    assert code == 2
    assert "--calibration-images 5 is for int8 only: add --int8, or leave it out" in errors


def test_a_failed_write_does_not_block_the_next(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deitkit.export import export as module

    def stopped(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(exported, tmp_path / "out.onnx", ExportOptions())
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    export_onnx(exported, tmp_path / "out.onnx", ExportOptions())


def test_an_old_onnxscript_and_too_little_memory_have_their_own_remedies(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def export(*arguments: Any, **options: Any) -> None:
            try:
                raise error
            except ImportError as cause:
                raise RuntimeError("Failed to export the model") from cause

        return export

    missing = ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_2_11'")
    missing.name = "onnxscript._framework_apis.torch_2_11"
    monkeypatch.setattr(torch.onnx, "export", failing(missing))
    with pytest.raises(RecipeError, match=r"onnxscript is too old for torch .*: pip install --upgrade onnxscript"):
        export_onnx(exported, tmp_path / "out.onnx", ExportOptions())
    monkeypatch.setattr(torch.onnx, "export", failing(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        export_onnx(exported, tmp_path / "out.onnx", ExportOptions())
    monkeypatch.setattr(torch.onnx, "export", failing(RuntimeError("no such operation")))
    with pytest.raises(CheckpointError, match=r"cannot write .* as ONNX \(no such operation\)"):
        export_onnx(exported, tmp_path / "out.onnx", ExportOptions())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(
    package: str, exported: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    code, _, errors = run("export", exported, "--out", tmp_path / "out.onnx")
    assert code == 2
    assert f"deitkit export needs the package {package}: pip install 'deitkit[export]'" in errors
    if package == "onnxruntime":
        code, _, errors = run("evaluate", exported / "model.onnx", "--data", "digits")
        assert code == 2
        assert "an ONNX file needs ONNX Runtime: pip install 'deitkit[export]'" in errors


def test_a_file_that_answers_otherwise_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deitkit.export import export as module

    build = module.build_onnx

    def wrong(deployed: Any, card: dict[str, Any], source: Path) -> bytes:
        with torch.no_grad():
            deployed.classifier.model.head.bias[3] += 0.5
        content = build(deployed, card, source)
        with torch.no_grad():
            deployed.classifier.model.head.bias[3] -= 0.5
        return content

    monkeypatch.setattr(module, "build_onnx", wrong)
    with pytest.raises(DeitkitError, match=r"would not answer as .* does: a probability differs by .* nothing was"):
        export_onnx(exported, tmp_path / "out.onnx", ExportOptions())
    assert not (tmp_path / "out.onnx").exists()
    assert not record_file(tmp_path / "out.onnx").exists()


def test_features_are_not_in_a_file(exported: Path, picture: Path, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("predict", exported / "model.onnx", picture, "--embeddings", tmp_path / "features.parquet")
    assert code == 2
    assert "an ONNX file gives only its probabilities; use the model folder it came from" in errors
