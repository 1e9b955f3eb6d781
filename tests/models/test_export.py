"""``deitkit convert``: what it writes is opened as it says, by timm and by transformers, and answers as before."""

import json
import textwrap
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from deitkit.data.duplicates import merge_sketches, sketch
from deitkit.evaluation.classify import Classification
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier
from deitkit.models.vit import DeiT
from deitkit.models.weights.initialise import read_weights
from deitkit.system.words import without_folders

BOTH = ("class", "distillation")
NAMES = ["cat", "dog", "Blaumeise", "two words", "ünï"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert(run: Run) -> Run:
    """Return a function that runs ``deitkit convert``."""
    return partial(run, "convert")


def saved(
    folder: Path, tokens: tuple[str, ...] = BOTH, channels: int = 3, *, layers: Any = None, **card: Any
) -> Classifier:
    """Write a student with random values everywhere, whose two heads no shape tells."""
    torch.manual_seed(0)
    model = DeiT(
        image_px=16, patch_px=4, channels=channels, classes=5, width=64, depth=2, heads=2, tokens=tokens, drop_path=0.1,
        **(layers or {}),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    classifier = Classifier(model, mean=MEAN[:channels], std=STD[:channels]).eval()
    save_classifier(folder, classifier, {"channels": channels, "class_names": NAMES, "input_px": [16, 16], **card})
    return classifier


def mean_logits(classifier: Classifier, images: Tensor) -> Tensor:
    output = classifier.model(images)
    heads = [head for head in (output.class_logits, output.distillation_logits) if head is not None]
    return torch.stack(heads).mean(dim=0)


def opened(output: str, line: str = "model = ") -> Any:
    """Run the lines that were printed, up to the first of that beginning, and return the model."""
    scope: dict[str, Any] = {}
    printed = [text.strip() for text in output.partition("open it with\n")[2].splitlines()]
    for text in printed:
        if text.startswith(line) or not text.startswith(("model", "image", "logits")):
            exec(text, scope)
    return scope["model"] if "model" in scope else scope["classifier"]


SKETCHES = (sketch(torch.randint(2**62, (300,), generator=torch.Generator().manual_seed(seed))) for seed in count())
SKETCH, BEFORE = (next(text for text in SKETCHES if text != without_folders(text)) for _ in range(2))


def test_a_published_card_hides_folders_and_keeps_sketches() -> None:
    card = ModelCard(
        kind="deit",
        mean=(0.5,),
        std=(0.5,),
        class_names=("a",),
        trained_on=SKETCH,
        dataset="folder:/home/someone/photos",
    )
    assert (card.published().trained_on, card.published().dataset) == (SKETCH, "folder:photos")
    assert card.published().trained_before_on is None


def test_a_published_card_keeps_names_of_classes_that_look_like_paths() -> None:
    names = ("/m/01g317", "/animals/cat", "/toys/cat")
    card = ModelCard(mean=(0.5,), std=(0.5,), class_names=names, initial="from /home/someone/w.pth")  # type: ignore[call-arg]
    assert card.published().class_names == names
    assert card.published().written()["initial"] == "from w.pth"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tokens", [("class",), BOTH, ("distillation",), ()])
@pytest.mark.parametrize("to", ["timm", "released", "transformers", "ours"])
def test_what_is_written_opens_as_printed_and_answers_as_before(
    to: str, tokens: tuple[str, ...], channels: int, convert: Run, tmp_path: Path
) -> None:
    source, out = tmp_path / "model", tmp_path / ("out.pth" if to == "released" else "out")
    classifier = saved(source, tokens, channels, trained_on=SKETCH, trained_before_on=BEFORE, labelled_share=0.25)
    code, output, errors = convert(source, "--to", to, "--out", out, "--check")
    if to == "transformers" and not tokens:
        assert code == 2
        assert "averages its patches" in errors
        return
    assert code == 0, errors
    assert "checked: on 8 random images the logits differ by" in output
    images = torch.randn(3, channels, 16, 16)
    theirs, expected = opened(output), mean_logits(classifier, images)
    logits = mean_logits(theirs, images) if to == "ours" else theirs(images)
    torch.testing.assert_close(getattr(logits, "logits", logits), expected, rtol=1e-4, atol=1e-4)
    back = read_weights(out)
    assert back.architecture.width == 64
    if to != "released":
        assert back.architecture.heads == 2
        assert back.class_names == tuple(NAMES)
        assert back.mean == pytest.approx(MEAN[:channels])
    if to == "ours":
        assert back.card is not None
        assert (back.card.trained_on, back.card.trained_before_on) == (SKETCH, BEFORE)
        assert back.card.labelled_share == 0.25


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("to", ["timm", "released", "transformers", "ours"])
def test_all_that_is_printed_runs_as_it_is(
    to: str, channels: int, fit: str, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "model", channels=channels, fit=fit)
    out = tmp_path / ("out.pth" if to == "released" else "out")
    code, output, errors = convert(tmp_path / "model", "--to", to, "--out", out)
    assert code == 0, errors
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(output.partition("open it with\n")[2]), scope)
    assert "model" in scope or "classifier" in scope
    if to == "transformers":
        assert scope["logits"].shape == (1, 5)


def test_other_heads_and_too_little_memory_are_said_in_its_own_words(convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    to_ours = (tmp_path / "model", "--to", "ours", "--out", tmp_path / "out")
    code, _, errors = convert(*to_ours, "--heads", 4)
    assert code == 2
    assert errors == f"error: --heads 4: {tmp_path / 'model'} has 2, which its files say: drop --heads\n"
    code, _, errors = convert(*to_ours, "--mean", "0,0,0", "--std", "1,1,1")
    assert code == 2
    assert f"--mean and --std: {tmp_path / 'model'}/model.safetensors was trained with a mean of [" in errors
    assert not (tmp_path / "out").exists()
    code, _, errors = convert(*to_ours, "--image-px", 10_000_000, "--patch-px", 1)
    assert code == 2
    assert errors == "error: out of memory: choose a smaller --image-px, a larger --patch-px or fewer --classes\n"


@pytest.mark.parametrize("to", ["timm", "transformers", "released", "ours"])
def test_layer_scale_goes_along(to: str, convert: Run, tmp_path: Path) -> None:
    classifier = saved(tmp_path / "model", layers={"layer_scale": 0.1})
    out = tmp_path / ("out.pth" if to == "released" else "out")
    code, output, errors = convert(tmp_path / "model", "--to", to, "--out", out, "--check")
    assert code == 0, errors
    images = torch.randn(3, 3, 16, 16)
    theirs = opened(output)
    logits = mean_logits(theirs, images) if to == "ours" else theirs(images)
    expected = mean_logits(classifier, images)
    torch.testing.assert_close(getattr(logits, "logits", logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["timm", "transformers", "released"])
def test_a_stem_of_convolutions_stays_at_home(to: str, convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "model", layers={"stem": "conv"})
    code, _, errors = convert(tmp_path / "model", "--to", to, "--out", tmp_path / "out.pth")
    assert code == 2
    assert "a stem of convolutions" in errors
    assert convert(tmp_path / "model", "--to", "ours", "--out", tmp_path / "ours", "--check")[0] == 0


@pytest.mark.parametrize("to", ["timm", "transformers", "released", "ours"])
def test_there_and_back_is_the_same_bit_for_bit(to: str, convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    between = tmp_path / ("b.pth" if to == "released" else "b")
    assert convert(tmp_path / "a", "--to", to, "--out", between)[0] == 0
    assert convert(between, "--to", "ours", "--out", tmp_path / "c", "--heads", 2)[0] == 0
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "c"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_timm_opens_the_folder_with_its_arguments_normalisation_and_names(convert: Run, tmp_path: Path) -> None:
    classifier = saved(tmp_path / "a", channels=1)
    _, output, _ = convert(tmp_path / "a", "--to", "timm", "--out", tmp_path / "b")
    model = opened(output, "model = timm.create_model('local-dir:")
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(model(images), mean_logits(classifier, images), rtol=1e-4, atol=1e-4)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["mean"], data["std"]) == (
        (1, 16, 16),
        pytest.approx((0.5,)),
        pytest.approx((0.2,)),
    )
    assert model.pretrained_cfg["label_names"] == NAMES


@pytest.mark.parametrize(("size", "mode"), [((16, 16), "RGB"), ((40, 24), "RGB"), ((11, 30), "L")])
@pytest.mark.parametrize("eval_crop", [1.0, 0.7])
def test_transformers_and_timm_see_a_file_as_predict_does(
    eval_crop: float, size: tuple[int, int], mode: str, convert: Run, tmp_path: Path
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    saved(tmp_path / "a", eval_crop=eval_crop)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).convert(mode)
    image.save(tmp_path / "image.png")
    (ours,) = list(Classification(tmp_path / "a", [tmp_path / "image.png"], readout="joint-logits", top=5))

    _, output, _ = convert(tmp_path / "a", "--to", "transformers", "--out", tmp_path / "b")
    model = opened(output)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "b")
    shares = model(**processor(image, return_tensors="pt")).logits.softmax(dim=-1)[0]
    agree(dict(zip(model.config.id2label.values(), shares.tolist(), strict=True)), ours)

    _, output, _ = convert(tmp_path / "a", "--to", "timm", "--out", tmp_path / "c")
    model = opened(output, "model = timm.create_model('local-dir:")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    shares = model(transform(image.convert("RGB"))[None]).softmax(dim=-1)[0]
    agree(dict(zip(model.pretrained_cfg["label_names"], shares.tolist(), strict=True)), ours)


def agree(theirs: dict[str, float], ours: dict[str, Any]) -> None:
    assert theirs == pytest.approx(dict(ours["classes"]), abs=0.02)  # resizing rounds to whole grey levels in between
    assert max(theirs, key=theirs.__getitem__) == ours["classes"][0][0]


def test_changes_on_the_way_are_told_and_kept_in_the_card(convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "a", ("class",), readout="class", test_top1=0.9)
    arguments = ("--image-px", 48, "--patch-px", 8, "--channels", 1, "--tokens", "class+distillation")
    code, output, _ = convert(tmp_path / "a", "--to", "ours", "--out", tmp_path / "b", *arguments, "--check")
    assert code == 0
    for word in ("normalisation", "channels", "patch", "resolution", "tokens"):
        assert f"\n{word}: " in f"\n{output}"
    classifier, card = load_classifier(tmp_path / "b", torch.device("cpu"))
    assert (card.input_px, card.channels, card.class_names) == ((48, 48), 1, tuple(NAMES))
    assert card.config is not None
    assert card.config["tokens"] == ["class", "distillation"]
    changes = card.written()["changes"]
    assert "\n".join(changes) in output
    assert len(changes) == 5
    assert card.test_top1 is None  # what it scored as it was is no longer true
    assert classifier(torch.rand(1, 1, 48, 48)).distillation_logits.shape == (1, 5)


TRAINING = {
    "dataset": "folder:photos", "split": {"split_seed": 3, "test_fraction": 0.5}, "trained_on": SKETCH,
    "labelled_share": 0.5, "trained_before_on": BEFORE,
}  # fmt: skip


@pytest.mark.parametrize("change", [("--tokens", "class"), ("--patch-px", 8), ("--classes", 7)])
def test_a_card_tells_from_which_images_a_changed_model_learned(
    change: tuple[Any, ...], convert: Run, tmp_path: Path
) -> None:
    saved(tmp_path / "a", **TRAINING, readout="joint", method="token-hard", seed=0, test_top1=0.9)
    assert convert(tmp_path / "a", "--to", "ours", "--out", tmp_path / "b", *change)[0] == 0
    _, card = load_classifier(tmp_path / "b", torch.device("cpu"))
    assert {name: card.written()[name] for name in TRAINING} == TRAINING
    assert card.test_top1 is None
    same_heads = change[0] == "--patch-px"
    assert (card.readout, card.method, card.seed) == (("joint", "token-hard", 0) if same_heads else (None, None, None))


@pytest.mark.parametrize("change", [("--image-px", 32), ("--channels", 1)])
def test_a_card_tells_how_a_model_saw_its_images_before_it_took_them_otherwise(
    change: tuple[Any, ...], convert: Run, tmp_path: Path
) -> None:
    saved(tmp_path / "a", **TRAINING)
    assert convert(tmp_path / "a", "--to", "ours", "--out", tmp_path / "b", *change)[0] == 0
    _, card = load_classifier(tmp_path / "b", torch.device("cpu"))
    seen, view = merge_sketches([SKETCH, BEFORE]), {"image_px": 16, "channels": 3, "fit": "crop"}
    assert (card.dataset, card.split) == (TRAINING["dataset"], TRAINING["split"])
    assert (card.trained_on, card.seen) == (None, None)  # of other pixels, whose hashes would not be found
    assert card.seen_otherwise == (seen, view)
    assert convert(tmp_path / "b", "--to", "ours", "--out", tmp_path / "c", "--image-px", 48)[0] == 0
    _, again = load_classifier(tmp_path / "c", torch.device("cpu"))
    assert again.seen_otherwise == (seen, view)
    assert again.written()["changes"][0] == card.written()["changes"][0]
    assert again.written()["source"].startswith("a (sha256 ")
    back = ("--image-px", 16, "--channels", 3)
    assert convert(tmp_path / "b", "--to", "ours", "--out", tmp_path / "d", *back)[0] == 0
    _, back_again = load_classifier(tmp_path / "d", torch.device("cpu"))
    assert (back_again.seen, back_again.seen_otherwise) == (seen, None)


def test_a_grey_copy_sees_grey_images_as_the_colour_model_does(convert: Run, tmp_path: Path) -> None:
    colour = saved(tmp_path / "a")
    assert convert(tmp_path / "a", "--to", "ours", "--out", tmp_path / "b", "--channels", 1)[0] == 0
    grey, _ = load_classifier(tmp_path / "b", torch.device("cpu"))
    view = torch.rand(2, 1, 16, 16)
    expected = colour(view.expand(-1, 3, -1, -1)).class_logits
    torch.testing.assert_close(grey(view).class_logits, expected, rtol=1e-4, atol=1e-4)


def test_what_a_card_tells_stays_where_nothing_changes(convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "run" / "winner", readout="joint", test_top1=0.9, method="token-hard")
    assert convert(tmp_path / "run", "--to", "ours", "--out", tmp_path / "b")[0] == 0
    card = json.loads((tmp_path / "b" / "model.json").read_text(encoding="utf-8"))
    assert (card["readout"], card["test_top1"], card["method"]) == ("joint", 0.9, "token-hard")
    assert card["source"].startswith("run (sha256 ")


def test_a_bare_file_gets_what_it_does_not_tell(convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    bare = tmp_path / "bare.safetensors"
    (tmp_path / "a" / "model.safetensors").rename(bare)
    code, output, _ = convert(bare, "--to", "ours", "--out", tmp_path / "b", "--classes", 7, "--check")
    assert code == 0
    assert "normalisation: missing in the source; ImageNet's is written" in output
    assert "class names: missing in the source; class 0 to class 6 are written" in output
    assert "not checked: the classifier is new" in output
    assert convert(bare, "--to", "ours", "--out", tmp_path / "c", "--mean", "0.5,0.5,0.5", "--std", "1,1,1")[0] == 0
    assert json.loads((tmp_path / "c" / "model.json").read_text())["std"] == [1, 1, 1]


def test_json_is_for_another_program(convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    _, output, _ = convert(
        tmp_path / "a", "--to", "timm", "--out", tmp_path / "b", "--image-px", 32, "--check", "--json"
    )
    result = json.loads(output)
    assert result["architecture"]["image_px"] == [32, 32]
    assert result["largest_difference"] < 1e-4
    assert result["changes"][0].startswith("resolution: 16 x 16 -> 32 x 32 px")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "tensorflow", "--out", "b"), "--to tensorflow: choose ours, timm, released, transformers"),
        (("--to", "released", "--out", "b"), "give a name that ends in .pth"),
        (("--to", "timm", "--out", "a"), "already exists: name a new folder"),
        (("--to", "timm", "--out", "b", "--patch-px", 5), "--patch-px 5 does not divide images of 16 px: choose from"),
        (("--to", "timm", "--out", "b", "--tokens", "distillation+class"), "choose class, distillation, class+"),
        (("--to", "timm", "--out", "b", "--channels", 2), "--channels 2: choose 1 or 3"),
        (("--to", "timm", "--out", "b", "--mean", "0.5"), "--mean and --std belong together"),
        (("--to", "timm", "--out", "b", "--mean", "0.5", "--std", "1"), "need 3 values each"),
        (("--to", "timm", "--out", "b", "--mean", "124,116,104", "--std", "58,57,57"), "divide them by 255"),
        (("--to", "timm", "--out", "b", "--mean", "grey"), "--mean grey: give numbers with commas"),
        (("--to", "timm", "--out", "b", "--mean", "nan,0,0", "--std", "1,1,1"), "need 3 values each, all finite"),
        (("--to", "timm", "--out", "b", "--mean", "0,0,0", "--std", "1,inf,1"), "need 3 values each, all finite"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[Any, ...], words: str, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("a"))
    code, _, errors = convert("a", *arguments)
    assert code == 2
    assert words in errors
    assert len(errors.strip().splitlines()) == 1
    assert not Path("b").exists()


def test_a_check_that_fails_says_so(convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a")
    create = timm.create_model

    def other_epsilon(*names: Any, **arguments: Any) -> Any:
        model = create(*names, **arguments)
        model.norm.eps = 1.0
        return model

    monkeypatch.setattr(timm, "create_model", other_epsilon)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for to, out in (("timm", "b"), ("timm", "link"), ("released", "b.pth")):
        for _ in range(2):  # what failed does not block the next try
            code, _, errors = convert(tmp_path / "a", "--to", to, "--out", tmp_path / out, "--check")
            assert code == 2
            assert "its logits differ by up to" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "link"]
    assert not any((tmp_path / "empty").iterdir())


def test_a_check_opens_a_folder_as_its_users_do(convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a")
    create, opened_by = timm.create_model, []

    def remembered(name: str, **arguments: Any) -> Any:
        opened_by.append((name, arguments))
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", remembered)
    assert convert(tmp_path / "a", "--to", "timm", "--out", tmp_path / "b", "--check")[0] == 0
    assert (f"local-dir:{tmp_path / 'b'}", {"pretrained": True}) in opened_by


def test_a_card_is_of_the_standard_file_of_weights_only(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    other = tmp_path / "a" / "other.safetensors"
    other.write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    assert read_weights(tmp_path / "a" / "model.safetensors").card is not None
    weights = read_weights(other)
    assert (weights.card, weights.class_names, weights.assumes_heads) == (None, None, True)


@pytest.mark.parametrize("to", ["timm", "transformers", "released"])
@pytest.mark.parametrize(("eval_crop", "fit"), [(0.8, "crop"), (0.8, "squash"), (1.0, "crop")])
def test_how_test_images_are_cropped_goes_there_and_back(
    to: str, eval_crop: float, fit: str, convert: Run, tmp_path: Path
) -> None:
    saved(tmp_path / "a", eval_crop=eval_crop, fit=fit)
    there = tmp_path / ("b.pth" if to == "released" else "b")
    assert convert(tmp_path / "a", "--to", to, "--out", there)[0] == 0
    code, output, _ = convert(there, "--to", "ours", "--out", tmp_path / "c")
    assert code == 0
    assert "test images: how they are cropped" not in output
    card = json.loads((tmp_path / "c" / "model.json").read_text(encoding="utf-8"))
    assert (card["eval_crop"], card["fit"]) == (pytest.approx(eval_crop), fit)


@pytest.mark.parametrize("told", [{"crop_pct": 7}, {"crop_pct": "wide"}, {"crop_pct": 0.9, "crop_mode": ["odd"]}, {}])
def test_a_crop_that_cannot_be_is_not_known(told: dict[str, Any], convert: Run, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert convert(tmp_path / "a", "--to", "timm", "--out", tmp_path / "b")[0] == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))
    for name in ("crop_pct", "crop_mode"):
        config["pretrained_cfg"].pop(name)
    config["pretrained_cfg"] |= told
    (tmp_path / "b" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, output, _ = convert(tmp_path / "b", "--to", "ours", "--out", tmp_path / "c")
    assert code == 0
    assert "the largest centre square is written" in output
