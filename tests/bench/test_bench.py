"""The bench commands: what they print can be read by a program, and adds up."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import CPU_FP32
from deitkit.bench import training_speed
from deitkit.bench.measure import count_flops, machine_limit
from deitkit.bench.training_speed import Bench
from deitkit.cli.main import app
from deitkit.errors import RecipeError, TeacherError
from deitkit.models.catalogue import CatalogueModel
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.saved import save_classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.system.timer import time_in_turn
from deitkit.training.student import Student

TINY = [
    "data.image_px=16", "model=micro", "model.patch_px=4", "train.batch_size=16", "teacher=cifar/resnet20",
    "augment.randaugment=2,9", "device=cpu",
]  # fmt: skip
FEW = ["--repeats", "2", "--steps", "1"]


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.bench.measure.CPU_SIDE", 128)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_says_where_the_time_goes() -> None:
    result = json.loads(run("train", *TINY, "method=token-hard", "--synthetic", *FEW, "--json"))
    assert result["methods"] == ["token-hard"]
    low, high = result["images_per_second_range"]
    assert 0 < low <= result["images_per_second"] <= high
    assert result["images_per_second"] == pytest.approx(16 / result["seconds_per_step"])
    assert 0.5 < sum(result["shares"].values()) <= 1
    expected = result["images_per_second"] * result["gflop_per_image"]
    assert result["gflop_per_second"] == pytest.approx(expected)
    assert result["share_of_limit"] == pytest.approx(expected / result["limit_gflop_per_second"])
    assert result["peak_memory_gib"] > 0


def test_images_without_labels_take_time_and_are_not_counted() -> None:
    few = ["method=soft", "--synthetic", *FEW, "--repeats", "5", "--json"]
    alone = json.loads(run("train", *TINY, *few))
    both = json.loads(run("train", *TINY, "data.unlabelled=folder:x", "train.unlabelled_batch_size=160", *few))
    fastest = both["images_per_second_range"][1], alone["images_per_second_range"][1]  # other work disturbs the others
    assert fastest[0] < fastest[1] / 2, "eleven times as many images in a step"
    assert both["images_per_second"] == pytest.approx(16 / both["seconds_per_step"])


def test_train_takes_a_real_data_set_and_prints_for_people() -> None:
    shown = run("train", "data=digits", "model=micro", "model.patch_px=2", "train.batch_size=16",
                "teacher=cifar/resnet20", "device=cpu", *FEW)  # fmt: skip
    assert "images/s" in shown
    assert "share of it" in shown


def test_data_reads_and_augments() -> None:
    result = json.loads(run("data", *TINY, "--synthetic", *FEW, "--json"))
    assert result["read_images_per_second"] > result["images_per_second"] > 0


def test_cohort_compares_with_the_same_students_alone() -> None:
    result = json.loads(run("cohort", *TINY, "methods=[none, soft, hard]", "--synthetic", *FEW, "--json"))
    seconds = {name: timing["median"] for name, timing in result["seconds_per_step"].items()}
    alone = seconds["none"] + seconds["soft"] + seconds["hard"]
    assert result["ratio"] == pytest.approx(seconds["cohort"] / alone)
    assert result["ratio_cached"] == pytest.approx(seconds["cohort, cached logits"] / alone)
    assert len(result["peak_memory_gib"]) == 3
    assert result["peak_memory_gib"] == sorted(result["peak_memory_gib"])


def test_cohort_caches_logits_of_images_without_labels_too() -> None:
    unlabelled = ("data.unlabelled=folder:x", "train.unlabelled_batch_size=8")
    result = json.loads(run("cohort", *TINY, "methods=[none, hard]", *unlabelled, "--synthetic", *FEW, "--json"))
    assert result["ratio_cached"] > 0


def test_a_baseline_is_no_part_of_the_students_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[list[str]] = []

    def students(bench: Bench, methods: tuple[str, ...]) -> list[Student]:
        found = build(bench, methods)
        built.append([student.name for student in found])
        return found

    build = Bench.students
    monkeypatch.setattr(Bench, "students", students)
    run(
        "cohort",
        *TINY,
        "methods=[none, soft]",
        "baseline.name=cifar/resnet20",
        "--synthetic",
        "--repeats",
        "1",
        "--json",
    )
    assert {name for names in built for name in names} == {"none", "soft"}


def test_a_student_of_pretrained_weights_is_timed_at_their_size_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = json.loads(run("infer", "model.pretrained=timm/vit_tiny_patch16_224", "data.image_px=32", *FEW, "--json"))
    assert (timed["model"]["width"], timed["model"]["depth"], timed["model"]["heads"]) == (192, 12, 3)
    assert timed["model"]["pretrained"] is None


def test_a_saved_model_is_a_teacher_of_synthetic_images_too(tmp_path: Path) -> None:
    names = list("abcde")
    model = Classifier(CifarResNet(20, classes=5), mean=(0.5,) * 3, std=(0.5,) * 3)
    card = {"architecture": "cifar/resnet20", "class_names": names, "channels": 3, "input_px": [16, 16]}
    save_classifier(tmp_path / "teacher", model, card)
    tiny = [field for field in TINY if not field.startswith("teacher")]
    given = (f"teacher.name={tmp_path / 'teacher'}", "methods=[hard]")
    timed = json.loads(run("train", *tiny, *given, "--synthetic", *FEW, "--json"))
    assert timed["teacher"] == str(tmp_path / "teacher")
    assert timed["shares"]["teacher"] > 0


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_a_pretrained_teacher_is_timed_at_its_resolution_without_its_weights(name: str) -> None:
    given = [*TINY, f"teacher.name={name}", "teacher.pretrained=true", "data.channels=3"]
    (teacher,) = Bench(load_recipe("digits", given), synthetic=True).teachers.classifiers
    assert teacher.image_px == 224


@pytest.mark.parametrize("name", ["torchvision/resnet1", "timm/resnet18.nope", "timm/resnet1"])
def test_a_mistyped_pretrained_teacher_is_one_sentence(name: str) -> None:
    with pytest.raises(TeacherError, match=name):
        Bench(load_recipe("digits", [*TINY, f"teacher.name={name}", "teacher.pretrained=true"]), synthetic=True)


def test_a_student_with_one_head_is_a_teacher_to_time(tmp_path: Path) -> None:
    names = list("abcde")
    size = {"image_px": 16, "patch_px": 4, "channels": 3, "classes": 5, "width": 16, "depth": 1, "heads": 2}
    model = Classifier(DeiT(tokens=("distillation",), **size), mean=(0.5,) * 3, std=(0.5,) * 3)
    save_classifier(tmp_path / "teacher", model, {"class_names": names, "channels": 3, "input_px": [16, 16]})
    tiny = [field for field in TINY if not field.startswith("teacher")]
    given = ("data.channels=3", f"teacher.name={tmp_path / 'teacher'}")
    bench = Bench(load_recipe("digits", [*tiny, *given]), synthetic=True)
    assert bench.teachers(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_the_memory_of_a_training_is_read_before_anything_else_uses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("peak_memory_gib", "step_flops", "machine_limit"):
        real = getattr(training_speed, name)
        monkeypatch.setattr(
            training_speed, name, lambda *given, name=name, real=real: (order.append(name), real(*given))[1]
        )
    run("train", *TINY, "methods=[none]", "--synthetic", *FEW)
    assert order[0] == "peak_memory_gib"


def test_infer_times_a_student() -> None:
    result = json.loads(run("infer", "data.image_px=32", "model=micro", "train.batch_size=2", "device=cpu", *FEW,
                            "--json"))  # fmt: skip
    assert result["images_per_second"] > 0
    assert result["share_of_limit"] > 0


def test_the_papers_table_names_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (
        CatalogueModel("small", 32, teacher="timm/resnet18", images_per_second=1.0),
        CatalogueModel("large", 32, teacher="timm/resnet34", images_per_second=2.0),
        CatalogueModel("ours", 32, "deit_tiny", tokens=("class", "distillation"), images_per_second=3.0),
        CatalogueModel("unmeasured", 32, "micro", 8),
    )
    build = CatalogueModel.build

    def crowded(model: CatalogueModel) -> torch.nn.Module:
        if model.row == "large":
            raise RuntimeError("CUDA out of memory")
        return build(model)

    monkeypatch.setattr("deitkit.bench.inference_speed.CATALOGUE", few)
    monkeypatch.setattr(CatalogueModel, "build", crowded)
    rows = json.loads(run("infer", "--table", "zoo", "train.batch_size=2", "device=cpu", *FEW, "--json"))
    assert [row["row"] for row in rows] == ["small", "large", "ours", "unmeasured"]
    assert rows[1]["problem"] == "does not fit in memory at batch 2"
    assert rows[0]["images_per_second"] > 0
    assert [row["published_images_per_second"] for row in rows] == [1.0, 2.0, 3.0, None]
    shown = run("infer", "--table", "paper", "train.batch_size=2", "device=cpu", *FEW)
    assert "does not fit" in shown
    assert "unmeasured" not in shown


def test_operations_of_a_student_are_those_counted_by_hand() -> None:
    width, depth, tokens, patches = 16, 2, 17, 16
    model = DeiT(image_px=8, patch_px=2, channels=3, classes=5, width=width, depth=depth, heads=2, tokens=("class",))
    block = 2 * tokens * width * width * 12 + 2 * 2 * tokens * tokens * width
    last = 2 * tokens * width * width * 3 + 2 * 2 * tokens * width + 2 * width * width * 9  # only the token is read
    expected = 2 * patches * 12 * width + (depth - 1) * block + last + 2 * width * 5
    assert count_flops(model, (3, 8, 8), backward=False) == expected
    # The backward pass costs twice the forward pass, but for the pixels, whose gradient nobody needs.
    assert count_flops(model, (3, 8, 8), backward=True) == 3 * expected - 2 * patches * 12 * width
    assert next(model.parameters()).grad is None


def test_operations_of_a_cnn_are_positive_and_leave_it_alone() -> None:
    model = CifarResNet(20, classes=10).eval()
    before = model.bn1.running_mean.clone()
    assert count_flops(model, (3, 32, 32), backward=False) == pytest.approx(2 * 40.8e6, rel=0.02)  # He et al. 2016
    assert torch.equal(model.bn1.running_mean, before)


def test_functions_are_timed_in_turn() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}  # type: ignore[misc]
    timings = time_in_turn(functions, device=torch.device("cpu"), repeats=2, calls=2, warm_up=1)
    assert "".join(calls) == "ab" + "aabb" * 2
    assert all(0 <= timing.fastest <= timing.median <= timing.slowest for timing in timings.values())


def test_the_machines_limit_is_a_rate() -> None:
    assert machine_limit(CPU_FP32) > 1e7


@pytest.mark.parametrize(
    ("recipe", "shape", "classes"),
    [("digits", (1, 8, 8), 10), ("fashion-mnist", (1, 28, 28), 10), ("imagenet-deit-tiny", (3, 224, 224), 1000),
     ("own-images", (3, 64, 64), 10)],
)  # fmt: skip
def test_random_images_are_like_those_of_the_recipe(recipe: str, shape: tuple[int, ...], classes: int) -> None:
    data = training_speed.synthetic_dataset(load_recipe(recipe, ["train.batch_size=3"]))
    assert (tuple(data.train.images.shape[1:]), data.classes) == (shape, classes)
    assert training_speed.view_of_recipe(load_recipe(recipe, []).data) == shape[:2]


def test_an_epoch_of_one_step_cannot_be_compared(tmp_path: Path) -> None:
    few = ["--recipe", "digits", "data.train_images=60", "train.batch_size=32"]
    result = CliRunner().invoke(app, ["bench", "cohort", *few, *FEW])
    assert isinstance(result.exception, RecipeError)
    assert "train.batch_size=32: an epoch of 60 images is one step" in str(result.exception)
