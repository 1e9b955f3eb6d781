"""Ablations: what variants change and share, how they stop and go on, and that their differences are those by hand."""

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest, ttest_rel

from conftest import poisoned_gradient, write_empty_report
from deitkit.comparison import ablation
from deitkit.comparison.ablation import compare_variants
from deitkit.comparison.verify import verify_run
from deitkit.data.dataset import load_dataset
from deitkit.errors import CheckpointError, DataError, Interrupted, RecipeError
from deitkit.models.saved import load_classifier
from deitkit.recipe.load import expand_variants, load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.report.write import write_report
from deitkit.run.observer import Watcher
from deitkit.run.results import read_results, write_results
from deitkit.training.student import Student

TinyRecipe = Callable[..., Recipe]
ONE_EPOCH = ("methods=[none]", "train.epochs=1", "data.train_images=160", "train.learning_rate=0.004")
LEARNS = ("train.epochs=6", "train.optimizer=adamw", "augment.cutmix=0", "augment.crop=none", "train.precision=fp32")
TWO = ("variants.sgd.train.optimizer=sgd", "variants.shallow={model: {depth: 1}}")


class Counting(Watcher):
    """Remembers what was said and trained, and stops after some steps."""

    def __init__(self, stop_after: float = math.inf) -> None:
        self.said: list[str] = []
        self.titles: list[str] = []
        self.steps_left = stop_after

    def say(self, text: str) -> None:
        self.said.append(text)

    def epoch(self, title: str, records: list[dict[str, Any]]) -> None:
        self.titles.append(title)

    def should_stop(self) -> bool:
        self.steps_left -= 1
        return self.steps_left < 0


pytestmark = pytest.mark.reports  # the table of all variants


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here: each variant's own pictures are left out where nothing looks at them."""
    monkeypatch.setattr("deitkit.comparison.prepare.draw_views", lambda *_: None)
    if "report" not in request.node.name:
        monkeypatch.setattr("deitkit.comparison.compare.write_report", write_empty_report)
        monkeypatch.setattr("deitkit.report.write.write_curves", lambda *_: [])
        monkeypatch.setattr("deitkit.report.write.write_differences", lambda *_: [])
        monkeypatch.setattr("deitkit.report.write.write_page", lambda *_: [])


def hits_by_hand(run: Path, recipe: Recipe, variant: str) -> torch.Tensor:
    """Ask a variant's saved student about the test images, and say which it gets right."""
    classifier, _ = load_classifier(run / "variants" / variant / "seed-0" / "none", torch.device("cpu"))
    test = load_dataset(recipe.data).test
    with torch.no_grad():
        logits = classifier(test.images.float() / 255).class_logits
    return logits.argmax(dim=1) == test.labels


def test_the_difference_is_that_of_the_saved_predictions(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(*ONE_EPOCH, *LEARNS, *TWO)
    results = compare_variants(recipe, tmp_path / "run", watcher=Watcher())
    assert [row.variant for row in results.rows] == ["base", "sgd", "shallow"]
    assert "base" not in results.rows[0].differences
    base = hits_by_hand(tmp_path / "run", recipe, "base")
    for row in results.rows[1:]:
        hits = hits_by_hand(tmp_path / "run", recipe, row.variant)
        gained, lost = int((hits & ~base).sum()), int((base & ~hits).sum())
        assert gained != lost, "these two show nothing: choose others"
        assert list(row.top1) == [pytest.approx(int(hits.sum()) / 100)]
        assert row.differences["base"].mean == pytest.approx((gained - lost) / 100)
        assert row.differences["base"].p == pytest.approx(binomtest(gained, gained + lost).pvalue)
        # Bonett and Price's interval of a difference of paired shares
        centre, differ = (gained - lost) / 102, (gained + lost + 2) / 102
        half = 1.96 * math.sqrt((differ - centre**2) / 102)
        assert row.differences["base"].ci95 == pytest.approx((centre - half, centre + half))
    found = verify_run(tmp_path / "run", Watcher())
    assert found.holds
    assert [(row.row, [row.measured]) for row in found.rows] == [
        (row.row, pytest.approx(row.top1)) for row in results.rows
    ]
    told = json.loads((tmp_path / "run" / "results.json").read_text())
    told["rows"][2]["top1"][0] += 0.01
    (tmp_path / "run" / "results.json").write_text(json.dumps(told))
    found = verify_run(tmp_path / "run", Watcher())
    assert [row.row for row in found.rows if not row.holds] == [results.rows[2].row]
    assert results.variants == {
        "base": {}, "sgd": {"train.optimizer": ("adamw", "sgd")}, "shallow": {"model.depth": (2, 1)},
    }  # fmt: skip


def test_over_seeds_the_difference_is_paired_by_seed(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(*ONE_EPOCH, *LEARNS, TWO[0], "seeds=[0, 1]", "train.epochs=4")
    base, sgd = compare_variants(recipe, tmp_path / "run", watcher=Watcher()).rows
    assert sgd.differences["base"].p == pytest.approx(ttest_rel(sgd.top1, base.top1).pvalue)
    assert sgd.differences["base"].mean == pytest.approx(sgd.top1_mean - base.top1_mean)


def test_stopped_in_the_second_variant_it_goes_on_there(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe, run = tiny_recipe(*ONE_EPOCH, *TWO), tmp_path / "run"
    whole = compare_variants(recipe, tmp_path / "whole", watcher=Watcher())
    with pytest.raises(Interrupted):
        compare_variants(recipe, run, watcher=Counting(stop_after=15))  # 10 steps each
    assert (run / "variants" / "base" / "results.json").exists()
    assert (run / "variants" / "sgd" / "seed-0" / "checkpoint.safetensors").exists()
    assert not (run / "variants" / "shallow" / "seed-0").exists()
    before = (run / "variants" / "base" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="add --resume"):
        compare_variants(recipe, run, watcher=Watcher())
    watcher = Counting()
    resumed = compare_variants(recipe, run, watcher=watcher, resume=True)
    assert len(watcher.titles) == 2, "the base was trained again"
    assert (run / "variants" / "base" / "metrics.jsonl").read_bytes() == before
    assert [row.top1 for row in resumed.rows] == [row.top1 for row in whole.rows]
    for name in ("base", "sgd", "shallow"):
        weights = [load_file(place / "variants" / name / "seed-0/none/model.safetensors") for place in
                   (run, tmp_path / "whole")]  # fmt: skip
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_run_takes_more_variants_and_no_other_ones(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    compare_variants(tiny_recipe(*ONE_EPOCH, TWO[0]), tmp_path / "run", watcher=Watcher())
    watcher = Counting()
    results = compare_variants(tiny_recipe(*ONE_EPOCH, *TWO), tmp_path / "run", watcher=watcher, resume=True)
    assert len(watcher.titles) == 1
    assert [row.variant for row in results.rows] == ["base", "sgd", "shallow"]
    other = tiny_recipe(*ONE_EPOCH, "variants.sgd.train.optimizer=adamw")
    with pytest.raises(CheckpointError, match=r"train\.optimizer was sgd, now adamw"):
        compare_variants(other, tmp_path / "run", watcher=Watcher(), resume=True)


def test_a_new_variant_trains_only_on_the_images_of_the_others(
    tiny_recipe: TinyRecipe, write_images: Callable[..., Path], tmp_path: Path
) -> None:
    photos = write_images(tmp_path / "photos")
    own = ("data.train_images=null", "data.test_images=null", "data.image_px=8", f"data.name=folder:{photos}")
    compare_variants(tiny_recipe(*ONE_EPOCH, *own, TWO[0]), tmp_path / "run", watcher=Watcher())
    one, other = sorted((photos / "train" / "cat").iterdir())[0], sorted((photos / "train" / "dog").iterdir())[0]
    one.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"variant base: .* was begun with other images or labels"):
        compare_variants(tiny_recipe(*ONE_EPOCH, *own, *TWO), tmp_path / "run", watcher=Watcher(), resume=True)


def test_a_teacher_is_trained_once_and_shared_where_it_is_the_same(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        *ONE_EPOCH, "methods=[none, token-hard]", "variants.sgd.train.optimizer=sgd",
        "variants.larger.teacher.name=cifar/resnet32",
    )  # fmt: skip
    watcher = Counting()
    results = compare_variants(recipe, tmp_path / "run", watcher=watcher)
    assert watcher.titles.count("teacher") == 4  # two teachers of two epochs
    last_teacher = max(index for index, title in enumerate(watcher.titles) if title == "teacher")
    assert last_teacher == 3, "a student trained before all teachers had passed the gate"
    weights = {name: (tmp_path / "run/variants" / name / "teacher/model.safetensors").read_bytes()
               for name in ("base", "sgd", "larger")}  # fmt: skip
    assert weights["base"] == weights["sgd"] != weights["larger"]
    taught = {row.variant: row for row in results.rows if row.method == "token-hard"}
    assert {name: row.teacher_name for name, row in taught.items()} == {
        "base": "cifar/resnet20", "sgd": "cifar/resnet20", "larger": "cifar/resnet32",
    }  # fmt: skip
    assert all(row.readout == "joint" for row in taught.values())
    rows = {row.row: row for row in results.rows}
    assert rows["larger: none/class"].differences["base"].mean == 0, "a student without teacher noticed the teacher"
    assert rows["larger: none/class"].teacher_name is None


def test_averaged_weights_stand_beside_the_base_without(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(*ONE_EPOCH, "variants.ema.train.ema_decay=0.9")
    rows = compare_variants(recipe, tmp_path / "run", watcher=Watcher()).rows
    assert [row.row for row in rows] == ["base: none/class", "ema: none/class", "ema: none/class+ema"]
    assert rows[1].differences["base"].mean == 0
    assert rows[2].differences["base"].mean == pytest.approx(rows[2].top1_mean - rows[0].top1_mean)


def test_a_student_that_stopped_keeps_a_row_that_says_so(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "backward", poisoned_gradient("none", 13))
    results = compare_variants(tiny_recipe(*ONE_EPOCH, *TWO), tmp_path / "run", watcher=Watcher())
    base, sgd, shallow = results.rows
    assert sgd.status.startswith("seed 0 stopped at step 4")
    assert "base" not in sgd.differences
    assert (base.status, shallow.status) == ("ok", "ok")
    text = (tmp_path / "run" / "table.md").read_text()
    assert "| sgd | train.optimizer: muon → sgd | stopped† |" in text
    assert text.count("stopped: lower train.learning") == 1
    assert results.verdict.startswith("0 of 1 rows differ from the base")
    assert "(p < 0.05), 1 could not be compared." in results.verdict


def test_the_report_is_rebuilt_from_the_folder(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    compare_variants(tiny_recipe(*ONE_EPOCH, *TWO), run, watcher=Watcher())
    names = {"table.md", "table.csv", "table.tex", "curves.png", "curves.svg", "differences.png", "differences.svg",
             "report.html"}  # fmt: skip
    before = {name: (run / name).read_bytes() for name in names}
    for name in names:
        (run / name).unlink()
    assert {path.name for path in write_report(run)} == names
    assert {name: (run / name).read_bytes() for name in names} == before
    page = before["report.html"].decode()
    for name in ("base", "sgd", "shallow"):
        assert f'href="variants/{name}/report.html"' in page
        assert (run / "variants" / name / "report.html").exists()
        assert f"{name}: none" in page, "its curve is missing"
    lines = csv.DictReader((run / "table.csv").read_text().splitlines())
    line = next(line for line in lines if line["variant"] == "sgd")
    row = json.loads((run / "results.json").read_text())["rows"][1]
    assert float(line["difference_vs_base"]) == row["differences"]["base"]["mean"]
    assert float(line["difference_vs_base_ci95_low"]) == row["differences"]["base"]["ci95"][0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["variants.sgd.train.optimiser=sgd"], "variants.sgd: unknown key 'train.optimiser': did you mean train.optim"),
        (["variants.sgd.train.epochs=many"], "variants.sgd: train.epochs='many'"),
        (["variants.long.train.warmup_epochs=999"], "variants.long: train.warmup_epochs=999 exceeds"),
        (["variants.No-Mixup.augment.mixup=0"], "variants: 'No-Mixup' names a folder"),
        (["variants.base.train.epochs=3"], "variants: 'base' names a folder"),
        (["variants.other.data.name=cifar10"], "variants.other: data.name='cifar10' must stay 'digits'"),
        (["variants.other.seeds=[4]"], "over the same seeds"),
        (["variants.same.model.name=micro"], "variants.same: changes nothing"),
        (["variants.a.variants.b.train.epochs=3"], "variants.a: a variant has no variants"),
        (["variants.a=3"], "variants.a=3"),
    ],
)
def test_mistakes_name_variant_and_field(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", overrides)
    assert words in str(error.value)


def test_fields_of_variants_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "variants:\n  a: {teacher: {name: cifar/resnet32}, teacher.fit: full, baseline: teacher}\n  b: {flip: 1}\n"
    )
    changes = [
        "variants.a.teacher.fit=head",
        "variants.a.teacher.name=cifar/resnet44",
        "variants.b=null",
        "model.depth=3",
    ]
    recipe = load_recipe(str(tmp_path / "mine.yaml"), changes)
    variant = expand_variants(recipe)["a"]
    assert (variant.teacher.name, variant.teacher.fit, variant.model.depth) == ("cifar/resnet44", "head", 3)
    assert variant.baseline is not None
    assert variant.variants == {}
    assert list(recipe.variants) == ["a"]


def test_mistakes_that_data_and_models_show_are_told_before_anything_trains(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    watcher = Counting()
    for change, error, words in (
        ("variants.patch.model.patch_px=3", RecipeError, "variant patch: .*patch"),
        ("variants.batch.train.batch_size=999", RecipeError, "variant batch: train.batch_size=999"),
        ("variants.weak={methods: [hard], teacher: {checkpoint: nowhere.th}}", Exception, "variant weak: .*nowhere"),
    ):
        with pytest.raises(error, match=words):
            compare_variants(tiny_recipe(*ONE_EPOCH, change), tmp_path / change[9:13], watcher=watcher)
    assert watcher.titles == []


def test_other_test_images_are_refused(
    tiny_recipe: TinyRecipe, write_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(
        tmp_path / "photos", parts=("",), count=24
    )  # listed by class: every division has the same labels

    def load(recipe: Any, progress: Any = None, **settings: Any) -> Any:
        return load_dataset(recipe.model_copy(update={"split_seed": recipe.image_px or 0}), progress, **settings)

    monkeypatch.setattr("deitkit.comparison.ablation.load_dataset", load)
    with pytest.raises(DataError, match=r"variant larger: .*test images"):
        compare_variants(
            tiny_recipe(*ONE_EPOCH, "variants.larger.data.image_px=12"), tmp_path / "one", watcher=Watcher()
        )
    own = (f"data.name=folder:{photos}", "data.image_px=8", "data.train_images=null", "data.test_images=null")
    with pytest.raises(DataError, match=r"variant larger: its \d+ test images are not the base's"):
        compare_variants(
            tiny_recipe(*ONE_EPOCH, *own, "variants.larger.data.image_px=12"), tmp_path / "other", watcher=Watcher()
        )

    def with_other_labels(recipe: Any, progress: Any = None, **settings: Any) -> Any:
        data = load_dataset(recipe, progress, **settings)
        labels = data.test.labels if recipe.image_px is None else data.test.labels.flip(0)
        return replace(data, test=replace(data.test, labels=labels))

    monkeypatch.setattr("deitkit.comparison.ablation.load_dataset", with_other_labels)
    with pytest.raises(DataError, match=r"variant larger: .*test images"):
        compare_variants(
            tiny_recipe(*ONE_EPOCH, "variants.larger.data.image_px=12"), tmp_path / "two", watcher=Watcher()
        )
    monkeypatch.undo()
    recipe = tiny_recipe(*ONE_EPOCH, "variants.larger.data.image_px=12")
    rows = compare_variants(recipe, tmp_path / "run", watcher=Watcher()).rows
    assert "base" in rows[1].differences


def test_rows_of_the_base_do_not_differ_from_it(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    fields = ("train.ema_decay=0.99", "variants.none.train.momentum=0.5")
    results = compare_variants(tiny_recipe(*ONE_EPOCH, *fields), tmp_path, watcher=Watcher())
    averaged = next(row for row in results.rows if row.row == "base: none/class+ema")
    sure = replace(averaged.differences["base"], p=1e-9, p_holm=1e-9)
    rows = [row.model_copy(update={"differences": {"base": sure}}) if row is averaged else row for row in results.rows]
    assert ablation._verdict(rows).startswith("0 of 2 rows differ from the base"), "its average is one of its own rows"


def test_a_variant_whose_report_was_interrupted_gets_one(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> list[Path]:
        if folder.name == "shallow":
            raise CheckpointError("the disk is full")
        return write_report(folder)

    recipe = tiny_recipe(*ONE_EPOCH, *TWO)
    monkeypatch.setattr("deitkit.comparison.compare.write_report", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        compare_variants(recipe, tmp_path, watcher=Watcher())
    monkeypatch.setattr("deitkit.comparison.compare.write_report", write_report)
    watcher = Counting()
    compare_variants(recipe, tmp_path, watcher=watcher, resume=True)
    assert watcher.titles == []
    assert (tmp_path / "variants" / "shallow" / "report.html").exists()


def test_notes_of_the_data_and_weak_teachers_are_those_of_the_table(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    fields = ("methods=[none, soft]", "train.epochs=1", "variants.sgd.train.optimizer=sgd", "teacher.min_top1=0.999")
    results = compare_variants(tiny_recipe(*fields), tmp_path, watcher=Watcher())
    (weak,) = [note for note in results.notes if note.startswith("teacher cifar/resnet20: weak")]
    base = read_results(tmp_path / "variants" / "base")
    assert weak == f"teacher cifar/resnet20: {base.teachers[0].verdict}."
    noted = base.model_copy(update={"notes": ("2 test images equal a training image.",)})
    write_results(noted, tmp_path / "variants" / "base")
    again = compare_variants(tiny_recipe(*fields), tmp_path, watcher=Watcher(), resume=True)
    assert again.notes == ("2 test images equal a training image.", weak)
    assert "2 test images equal a training image." in (tmp_path / "table.md").read_text()


def test_a_policy_that_does_not_exist_is_told_before_anything_trains(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    for field in ("augment", "teacher.augment"):
        recipe = tiny_recipe("methods=[hard]", f"variants.v.{field}.randaugment='2.9'")
        with pytest.raises(RecipeError, match=rf"variant v: {re.escape(field)}\.randaugment='2\.9' is neither"):
            compare_variants(recipe, tmp_path / field, watcher=Watcher())
        assert not (tmp_path / field).exists()


def test_a_variant_changes_one_of_several_teachers() -> None:
    two = "teachers=[{name: cifar/resnet20}, {name: cifar/resnet32}]"
    recipes = expand_variants(load_recipe("digits", [two, "variants.v={teachers.1.fit: full}"]))
    assert [teacher.fit for teacher in recipes["v"].teachers] == ["auto", "full"]
    assert [teacher.fit for teacher in recipes["base"].teachers] == ["auto", "auto"]
