"""Fine-tuning: what a checkpoint decides, that students start from it, and its own row beside theirs."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from timm.models.vision_transformer import VisionTransformer

from conftest import CPU_FP32, TINY
from deitkit.comparison.ablation import compare_variants
from deitkit.comparison.compare import compare
from deitkit.comparison.finetune import _obstacle, start_from
from deitkit.data.dataset import load_dataset
from deitkit.data.duplicates import share_in_sketch, sketch
from deitkit.errors import CheckpointError, RecipeError
from deitkit.evaluation.apply import evaluate_model
from deitkit.evaluation.seen_images import images_before
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.saved import read_card, save_classifier
from deitkit.models.vit import DeiT
from deitkit.models.weights.formats import Architecture
from deitkit.models.weights.initialise import Weights
from deitkit.models.zoo import create_classifier
from deitkit.recipe.load import load_recipe, shipped_recipes
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.report.table_layout import lay_out
from deitkit.run.observer import Watcher
from deitkit.run.state import load_tree
from deitkit.training.build import build_students
from source_helpers import write_classes

# The size is the checkpoint's, and all test images are asked.
OPEN = [field for field in TINY if not field.startswith(("model.", "data.test_images"))]
NAMES = tuple("0123456789")
FROZEN = ("train.optimizer=sgd", "train.learning_rate=1e-12", "train.weight_decay=0", "train.epochs=1",
          "train.precision=fp32")  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose winner is a student with a class token that learnt the digits somewhat."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    learns = [
        "methods=[none]",
        "model.patch_px=4",
        "data.train_images=400",
        "train.epochs=8",
        "augment.cutmix=0",
        "augment.crop=none",
    ]
    compare(load_recipe("digits", [*TINY, *learns]), folder, watcher=Watcher())
    return folder


def recipe_of(tmp_path: Path, *overrides: str) -> Recipe:
    """The digits recipe without what it says of the student."""
    text = "\n".join(line for line in shipped_recipes()["digits"].splitlines() if not line.startswith("model:"))
    (tmp_path / "open.yaml").write_text(text)
    return load_recipe(str(tmp_path / "open.yaml"), [*OPEN, *overrides])


def finetune(checkpoint: Path, tmp_path: Path, *overrides: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Run it, and return the rows by name and all results."""
    recipe = start_from(recipe_of(tmp_path, *overrides), checkpoint)
    results = compare(recipe, tmp_path / "tuned", watcher=Watcher())
    return {row.row: row for row in results.rows}, results


@pytest.mark.reports
def test_the_row_before_is_what_evaluate_says_and_gains_are_paired_with_it(plain: Path, tmp_path: Path) -> None:
    rows, results = finetune(plain, tmp_path, "methods=[none, token-hard]", "data.image_px=12")
    (expected,) = evaluate_model(plain / "winner", "digits")["readouts"]
    before = rows["before/class"]
    assert before.top1 == (expected["top1"],)
    assert before.top1_ci95 == expected["top1_ci95"]
    assert before.top5 == (expected["top5"],)
    assert 0.3 < expected["top1"] < 0.99, "a model that is neither new nor perfect tells rows apart"

    test = load_dataset(recipe_of(tmp_path).data).test
    predictions = load_tree(tmp_path / "tuned" / "seed-0" / "token-hard" / "predictions.safetensors")
    after = predictions["scores"]["last"]["test"]["joint"].argmax(-1) == test.labels
    row = rows["token-hard/joint"]
    gain = row.differences["before"]
    assert gain.mean == pytest.approx(after.double().mean().item() - expected["top1"])
    assert gain.test == "McNemar"
    low, high = gain.ci95
    assert low < gain.mean < high

    layout = lay_out(results)
    assert layout.lines[0].name == "before/class"
    assert {"vs before", "p (before)"} <= {column.title for column in layout.columns}
    assert "from the model before fine-tuning" in layout.verdict
    for name, shown in (("table.md", "vs before"), ("table.csv", "before/class"), ("table.tex", "vs before")):
        assert shown in (tmp_path / "tuned" / name).read_text()
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert re.search(r"<th[^>]*>\s*(?:<[^>]*>)?\s*vs before", page)


def test_students_start_from_the_checkpoint(plain: Path, tmp_path: Path) -> None:
    rows, _ = finetune(plain, tmp_path, "methods=[none, hard, token-hard]", *FROZEN)
    before = rows["before/class"].top1_mean
    for name in ("none/class", "hard/class"):
        assert rows[name].top1_mean == before, name
        gain = rows[name].differences["before"]
        assert (gain.mean, gain.p) == (0, 1)
    for name in ("token-hard/class", "token-hard/distillation"):  # one token more for all to attend to
        assert rows[name].top1_mean == pytest.approx(before, abs=0.1), name


def test_two_seeds_are_compared_with_one_model(plain: Path, tmp_path: Path) -> None:
    rows, results = finetune(plain, tmp_path, "methods=[none]", "seeds=[0, 1]", "train.epochs=1")
    before, after = rows["before/class"], rows["none/class"]
    assert len(before.top1) == 1
    differences = [value - before.top1[0] for value in after.top1]
    gain = after.differences["before"]
    assert gain.mean == pytest.approx(sum(differences) / 2)
    assert gain.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert gain.test == "paired t"
    assert lay_out(results).lines[0].cells["top1"].endswith("]")


def test_other_classes_get_a_new_head_and_a_sentence(
    plain: Path, tmp_path: Path, write_images: Callable[..., Path]
) -> None:
    photos = write_images(tmp_path / "photos", px=8)
    fields = (f"data.name=folder:{photos}", "data.train_images=null", "train.batch_size=4", "methods=[none]")
    rows, results = finetune(plain, tmp_path, *fields)
    assert set(rows) == {"none/class"}
    assert "before" not in results.to_json()["rows"][0]["differences"]
    (note,) = [note for note in results.notes if "no row of its own" in note]
    assert "its 10 classes (0, 1, 2, 3 and 6 more) are not the 2 of folder:" in note
    assert note in lay_out(results).footnotes


def test_a_released_file_is_asked_as_timm_would(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=10).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    torch.save({"model": model.state_dict()}, tmp_path / "released.pth")
    sees = ("data.image_px=16", "data.channels=3")
    rows, results = finetune(tmp_path / "released.pth", tmp_path, *sees, "methods=[none]", *FROZEN)
    data = load_dataset(recipe_of(tmp_path, *sees).data)
    assert any("nothing names its classes" in note for note in results.notes)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        answers = model((data.test.images / 255 - mean) / std).argmax(-1)
    expected = (answers == data.test.labels).double().mean().item()
    assert rows["before/class"].top1 == (expected,)
    assert list(rows["none/class"].top1) == [pytest.approx(expected, abs=0.01)], "another normalisation, taken up"
    assert results.recipe["model"]["patch_px"] == 8
    assert len(set(answers.tolist())) > 3, "an answer that never changes would agree with anything"


def test_the_row_before_is_of_the_view_that_timms_files_tell(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=10).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    (tmp_path / "timms").mkdir()
    save_file(model.state_dict(), tmp_path / "timms" / "model.safetensors")
    told = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.5, "crop_mode": "center"}
    config = {"image_size": 16, "num_attention_heads": 1, "pretrained_cfg": told}
    (tmp_path / "timms" / "config.json").write_text(json.dumps(config))
    sees = ("data.image_px=16", "data.channels=3")
    rows, _ = finetune(tmp_path / "timms", tmp_path, *sees, "methods=[none]", *FROZEN)
    accuracies = []
    for eval_crop in (0.5, 1.0):
        test = load_dataset(recipe_of(tmp_path, *sees, f"data.eval_crop={eval_crop}").data).test
        with torch.no_grad():
            answers = model((test.images / 255 - 0.5) / 0.25).argmax(-1)
        accuracies.append((answers == test.labels).double().mean().item())
    assert accuracies[0] != accuracies[1]
    assert rows["before/class"].top1 == (accuracies[0],)


def test_the_architecture_is_the_checkpoints(plain: Path, tmp_path: Path) -> None:
    recipe = start_from(recipe_of(tmp_path), plain)
    found = recipe.model.model_dump()
    card = json.loads((plain / "winner" / "model.json").read_text())["config"]
    for field in ("width", "depth", "heads", "patch_px"):
        assert found[field] == card[field]
    assert recipe.model.checkpoint == plain
    (tmp_path / "again.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert start_from(load_recipe(str(tmp_path / "again.yaml")), plain) == recipe
    other = start_from(recipe_of(tmp_path, "model.patch_px=2"), plain)
    assert other.model.patch_px == 2, "the patch may be another, to which the embedding is resized"


def test_layer_scale_and_a_stem_of_convolutions_are_the_checkpoints_too(plain: Path, tmp_path: Path) -> None:
    assert start_from(recipe_of(tmp_path), plain).model.layer_scale is None
    added = start_from(recipe_of(tmp_path, "model.layer_scale=0.0001"), plain).model
    assert added.layer_scale == 1e-4, "a plain student may get it: its factors start at 1"
    config = json.loads((plain / "winner" / "model.json").read_text())["config"]
    model = DeiT(**config | {"layer_scale": 0.1, "stem": "conv"})
    names = {"channels": 1, "class_names": [str(digit) for digit in range(10)], "input_px": [8, 8]}
    save_classifier(tmp_path / "more", Classifier(model, mean=(0.5,), std=(0.5,)), names)
    recipe = start_from(recipe_of(tmp_path), tmp_path / "more")
    assert (recipe.model.stem, recipe.model.layer_scale is None) == ("conv", False)
    dataset = load_dataset(recipe.data)
    (student,) = build_students(recipe.model_copy(update={"methods": ("none",)}), dataset, 0, CPU_FP32)
    for name, value in model.state_dict().items():
        assert torch.equal(student.classifier.model.state_dict()[name], value), name
    with pytest.raises(RecipeError, match=r"model.stem=patch in the recipe, but .* has .*model.stem=conv"):
        start_from(recipe_of(tmp_path, "model.stem=patch"), tmp_path / "more")


def test_contradictions_are_one_sentence(plain: Path, tmp_path: Path) -> None:
    for overrides, told in (
        (("model.width=32",), ("model.width=32 in the recipe", "model.width=16 model.depth=2 model.heads=2")),
        (("model.name=deit_tiny",), ("model.depth=12", "model.heads=3", "set these")),
        (("model.checkpoint=elsewhere",), ("model.checkpoint=elsewhere", str(plain))),
    ):
        with pytest.raises(RecipeError) as caught:
            start_from(recipe_of(tmp_path, *overrides), plain)
        for part in told:
            assert part in str(caught.value)
    start_from(recipe_of(tmp_path, "model.name=deit_tiny", "model.width=16", "model.depth=2", "model.heads=2"), plain)
    with pytest.raises(CheckpointError, match="nowhere"):
        start_from(recipe_of(tmp_path), tmp_path / "nowhere")
    built = create_classifier("cifar/resnet20", classes=10, channels=1)
    cnn = Classifier(built.model, mean=(0.5,), std=(0.5,))
    save_classifier(tmp_path / "cnn", cnn, {"architecture": "cifar/resnet20", "class_names": []})
    with pytest.raises(CheckpointError, match="vision transformer"):
        start_from(recipe_of(tmp_path), tmp_path / "cnn")


def test_training_images_of_the_checkpoint_are_no_test_images(plain: Path, tmp_path: Path) -> None:
    told = r"(\d\d) % of the test images of digits are training images of .*data.split_seed=0 data.test_fraction=0.4"
    for px in (8, 12):
        with pytest.raises(RecipeError, match=told):
            finetune(plain, tmp_path, "data.split_seed=7", f"data.image_px={px}")
    assert not (tmp_path / "tuned").exists()
    older = tmp_path / "older"
    shutil.copytree(plain / "winner", older)
    card = json.loads((older / "model.json").read_text())
    (older / "model.json").write_text(json.dumps({key: card[key] for key in card if key != "trained_on"}))
    with pytest.raises(RecipeError, match=r"data.split_seed=0 data.test_fraction=0.4; .*tested on its training images"):
        start_from(recipe_of(tmp_path, "data.split_seed=7"), older)


def test_the_same_images_are_recognised_wherever_they_lie(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(30):
            pixels = (level + generator.integers(0, 40, (8, 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    for number, path in enumerate(sorted((tmp_path / "copy").rglob("*.png"))):
        path.rename(path.with_name(f"renamed-{number * 7 % 60:02}.png"))
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    counts = ("data.test_fraction=0.4", "data.train_images=30", "data.test_images=null")
    fields = ("methods=[none]", "data.image_px=8", *counts)
    photos = f"data.name=folder:{tmp_path / 'photos'}"
    compare(load_recipe("digits", [*TINY, *fields, photos]), tmp_path / "run", watcher=Watcher())
    for spelt in (f"{tmp_path}/photos/../photos", str(tmp_path / "link"), str(tmp_path / "copy")):
        with pytest.raises(RecipeError, match=r"of the test images of folder:.* are training images of"):
            finetune(tmp_path / "run", tmp_path, *fields, f"data.name=folder:{spelt}", "data.split_seed=3")
    again = f"data.name=folder:{tmp_path / 'link'}"
    rows, _ = finetune(tmp_path / "run", tmp_path, *fields, again, "train.epochs=1")
    assert "before/class" in rows
    measured = evaluate_model(tmp_path / "run" / "winner", f"folder:{tmp_path / 'link'}")
    assert measured["trained_on"] == 0


@pytest.mark.parametrize(
    ("changes", "names", "obstacle"),
    [
        ({}, NAMES, None),
        ({}, None, None),
        ({"classes": 0}, None, "it has no classifier"),
        ({"classes": 9}, None, "its 9 classes are not the 10 of digits"),
        ({}, tuple("abcdefghij"), "its 10 classes (a, b, c, d and 6 more) are not the 10 of digits"),
        ({"image_px": (8, 16)}, NAMES, "it takes images of 8 x 16 px, and these are square"),
    ],
)
def test_only_a_model_of_the_same_classes_is_measured_before(
    changes: dict[str, Any], names: tuple[str, ...] | None, obstacle: str | None
) -> None:
    dataset = load_dataset(DataRecipe(name="digits"))
    model = DeiT(image_px=8, patch_px=4, channels=1, classes=10, width=16, depth=1, heads=2, tokens=("class",))
    architecture = replace(Architecture.of(model), **changes)
    weights = Weights(Path("x"), {}, architecture, names, None, None, None, ())
    assert _obstacle(weights, dataset) == obstacle


def test_a_model_has_seen_the_images_of_those_that_it_started_from() -> None:
    hashes, digits = torch.arange(0, 30), load_dataset(DataRecipe(name="digits"))
    card = ModelCard(mean=(0.5,), std=(0.5,), class_names=NAMES, input_px=(8, 8))
    first = card.model_copy(update={"trained_on": sketch(hashes[:10])})
    other_size = card.model_copy(update={"input_px": (16, 16), "trained_on": sketch(hashes[10:20])})
    assert images_before(digits, [card]) == {}
    before = images_before(digits, [first, other_size, card])
    second = card.model_copy(update={"trained_on": sketch(hashes[20:])} | before)
    assert second.trained_before_on == first.trained_on
    assert second.seen == sketch(torch.cat([hashes[:10], hashes[20:]]))
    assert share_in_sketch(hashes, second.seen) == pytest.approx(20 / 30)
    assert images_before(digits, [second]) == {"trained_before_on": second.seen}, "through two models"


def test_a_fine_tuned_student_records_the_images_of_its_checkpoint_too(plain: Path, tmp_path: Path) -> None:
    finetune(plain, tmp_path, "methods=[none]", "data.train_images=20", "train.epochs=1")
    tuned, first = read_card(tmp_path / "tuned" / "winner"), read_card(plain / "winner")
    assert tuned.trained_before_on == first.trained_on
    assert tuned.trained_on not in (None, first.trained_on), "twenty of the same images"
    assert tuned.seen == first.trained_on


def test_training_images_of_other_classes_are_no_test_images(tmp_path: Path) -> None:
    fine = write_classes(tmp_path / "fine", {"a": 30, "b": 30, "c": 30, "d": 30})
    for name, parts in {"first": "ab", "second": "cd"}.items():
        (tmp_path / "coarse" / name).mkdir(parents=True)
        for file in (file for part in parts for file in sorted((fine / part).iterdir())):
            shutil.copy2(file, tmp_path / "coarse" / name / f"{file.parent.name}{file.name}")
    fields = ("methods=[none]", "data.train_images=null", "data.test_images=null", "data.image_px=8")
    compare(load_recipe("digits", [*TINY, *fields, f"data.name=folder:{fine}"]), tmp_path / "run", watcher=Watcher())
    coarse = f"data.name=folder:{tmp_path / 'coarse'}"
    with pytest.raises(RecipeError, match=r"of the test images of folder:.*coarse are training images of"):
        finetune(tmp_path / "run", tmp_path, *fields, coarse, "data.split_seed=3")


def test_a_sketch_estimates_the_share_of_trained_images() -> None:
    generator = torch.Generator().manual_seed(0)
    hashes = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=generator)
    train, new = hashes[:10_000], hashes[10_000:]
    text = sketch(train)
    assert len(text) == 2732
    assert share_in_sketch(new, text) == 0
    assert share_in_sketch(train, text) == 1
    half = torch.cat([train[:2_000], new[:2_000]])
    assert share_in_sketch(half, text) == pytest.approx(0.5, abs=0.15)
    assert share_in_sketch(new, sketch(train[:100])) == 0
    assert share_in_sketch(torch.cat([train[:3], new[:1]]), sketch(train[:100])) == 0.75
    assert share_in_sketch(new, "") == 0
    for damaged in ("no base64!", "AAAA"):
        with pytest.raises(ValueError, match=r"base64|buffer size"):
            share_in_sketch(new, damaged)


def test_an_ablation_of_a_fine_tuning_compares_its_students(plain: Path, tmp_path: Path) -> None:
    open_recipe = recipe_of(tmp_path, "methods=[none]", "train.epochs=1", "variants.slow.train.learning_rate=1e-5")
    results = compare_variants(start_from(open_recipe, plain), tmp_path / "tuned", watcher=Watcher())
    assert [row.row for row in results.rows] == ["base: none/class", "slow: none/class"]
    assert results.rows[1].differences.get("base") is not None
    assert all(row.differences.get("before") is not None for row in results.rows)
