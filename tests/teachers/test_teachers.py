"""Several teachers: the mean of their outputs, what a run keeps of each, and that it resumes after a stop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import CPU_FP32, TINY
from deitkit.comparison import teachers_only
from deitkit.comparison.compare import compare
from deitkit.comparison.teachers_only import train_teachers
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import CheckpointError, Interrupted, RecipeError, TeacherError
from deitkit.models.classifier import Classifier
from deitkit.recipe.load import field_names, load_recipe
from deitkit.recipe.schema import DataRecipe
from deitkit.report.table_layout import lay_out
from deitkit.run.observer import StepProgress, Watcher
from deitkit.run.results import TESTED
from deitkit.teachers.frozen import FrozenTeacher, Teachers, mean_teacher_logits
from deitkit.teachers.logit_cache import open_logit_cache
from deitkit.teachers.prepare import common_card, prepare_teachers

ONE = "{name: cifar/resnet20, allow_weak: true, train: {epochs: 1, batch_size: 16, warmup_epochs: 0}}"
TWO = f"teachers=[{ONE}, {ONE}]"


def naive_softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def test_the_mean_answer_is_the_mean_of_the_probabilities() -> None:
    answers = list(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 3)
    mean = mean_teacher_logits(answers)
    for index in range(5):
        rows = [naive_softmax(answer[index].tolist()) for answer in answers]
        expected = [sum(values) / 3 for values in zip(*rows, strict=True)]
        assert naive_softmax(mean[index].tolist()) == pytest.approx(expected, rel=1e-5)


def test_a_single_answer_is_passed_on_as_it_is_and_huge_ones_stay_finite() -> None:
    answer = torch.randn(5, 4)
    assert mean_teacher_logits([answer]) is answer
    sure = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16)
    mean = mean_teacher_logits([sure, sure.roll(1, dims=1)])
    assert mean.isfinite().all()
    assert mean.softmax(dim=-1)[0].tolist() == pytest.approx([0.5, 0.5, 0.0])


class Constant(torch.nn.Module):
    """LogitCache the same to everything, in its own order of the classes."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


def frozen(*logits: float) -> FrozenTeacher:
    return FrozenTeacher(Classifier(Constant(*logits), mean=(0.5,) * 3, std=(0.5,) * 3))


def test_teachers_answer_as_one_without_gradients_and_stay_in_evaluation_mode() -> None:
    teachers = Teachers([frozen(4.0, 0.0, 0.0), frozen(0.0, 4.0, 0.0), frozen(0.0, 4.0, 0.0)])
    answer = teachers.train()(torch.rand(2, 3, 8, 8))
    assert answer.argmax(dim=-1).tolist() == [1, 1]
    assert not answer.requires_grad
    assert not any(classifier.training for classifier in teachers.classifiers)


@pytest.mark.reports
def test_a_run_keeps_and_reports_every_teacher(tiny_recipe: Any, tmp_path: Path) -> None:
    results = compare(tiny_recipe("methods=[none, soft]", TWO), tmp_path, watcher=Watcher())
    first, second = results.teachers
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "teacher-2")]
    assert not torch.equal(weights[0]["conv1.weight"], weights[1]["conv1.weight"]), (
        "each starts from weights of its own"
    )
    for home, card in (("teacher", first), ("teacher-2", second)):
        kept = json.loads((tmp_path / home / "card.json").read_text())
        assert card.model_dump(mode="json", exclude=TESTED) == kept
    assert results.teacher.name == "cifar/resnet20 + cifar/resnet20"
    assert results.teacher.parameters == first.parameters + second.parameters
    assert (results.teacher.image_px, results.teacher.mean) == (None, ())
    names = [line.name for line in lay_out(results).lines if line.group == "teacher"]
    assert names == ["teacher: cifar/resnet20", "teacher: cifar/resnet20", "teachers: mean of their outputs"]
    page = (tmp_path / "report.html").read_text()
    assert "Teacher 1" in page
    assert "Teacher 2" in page
    assert "mean of the 2 teachers" in page


def test_accuracies_are_those_of_the_mean_answer(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[hard]", "train.precision=fp32", TWO)
    results = compare(recipe, tmp_path, watcher=Watcher())
    dataset = load_dataset(recipe.data)
    teachers, cards = prepare_teachers(recipe, dataset, folder=tmp_path, precision=CPU_FP32, watcher=Watcher())
    for split, accuracy in (("validation", results.teacher.top1), ("test", results.teacher.test_top1)):
        images = getattr(dataset, split)
        view = images.images.float() / 255
        with torch.no_grad():
            each = [classifier(view).class_logits.softmax(dim=-1) for classifier in teachers.classifiers]
        hits = (sum(each).argmax(dim=-1) == images.labels).double().mean().item()
        assert accuracy == pytest.approx(hits)
    assert [card.top1 for card in cards] == [card.top1 for card in results.teachers]
    cards = [card.model_copy(update={"own_px_top1": 0.9, "view_px_top1": 0.8}) for card in cards]
    together = common_card(teachers, cards, dataset, CPU_FP32)
    assert (together.own_px_top1, together.view_px_top1) == (None, None), "those of one of them"


def test_each_passes_the_gate_on_its_own(tiny_recipe: Any, tmp_path: Path) -> None:
    untrained = f"teachers=[{ONE}, {{name: cifar/resnet20, fit: none}}]"
    with pytest.raises(TeacherError, match=r"^teachers\.1: teacher .* scores .* teachers\.1\.allow_weak=true"):
        compare(tiny_recipe("methods=[soft]", untrained), tmp_path, watcher=Watcher())
    assert (tmp_path / "teacher" / "card.json").exists()
    assert not (tmp_path / "teacher-2" / "card.json").exists()


def test_a_teacher_that_the_gate_refused_is_asked_again_and_not_trained_again(tiny_recipe: Any, tmp_path: Path) -> None:
    strict = f"teachers=[{ONE}, {ONE.replace('allow_weak: true', 'min_top1: 1.0')}]"
    with pytest.raises(TeacherError, match=r"^teachers\.1: "):
        compare(tiny_recipe("methods=[soft]", strict), tmp_path, watcher=Watcher())
    kept = load_file(tmp_path / "teacher-2" / "trained.safetensors")
    assert not (tmp_path / "teacher-2" / "checkpoint.safetensors").exists(), "its optimizer's state is of no more use"
    compare(tiny_recipe("methods=[soft]", TWO), tmp_path, watcher=Watcher(), resume=True)
    taught = load_file(tmp_path / "teacher-2" / "model.safetensors")
    assert all(torch.equal(taught[name], value) for name, value in kept.items())
    assert not (tmp_path / "teacher-2" / "trained.safetensors").exists()
    more = tiny_recipe("methods=[soft]", TWO.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(CheckpointError, match=r"teachers\.train\.epochs was 1, now 2"):
        compare(more, tmp_path, watcher=Watcher(), resume=True)


class StopsIn(Watcher):
    """Asks to stop after the first step of a stage."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.reached = False

    def step(self, title: str, progress: StepProgress) -> None:
        self.reached = title == self.title

    def should_stop(self) -> bool:
        return self.reached


def test_a_run_that_was_stopped_in_the_second_teacher_ends_the_same(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[soft, hard]", TWO)
    whole = compare(recipe, tmp_path / "whole", watcher=Watcher())
    with pytest.raises(Interrupted):
        compare(recipe, tmp_path / "parts", watcher=StopsIn("teacher-2"))
    assert (tmp_path / "parts" / "teacher-2" / "checkpoint.safetensors").exists()
    with pytest.raises(Interrupted):
        compare(recipe, tmp_path / "parts", watcher=StopsIn("seed 0"), resume=True)
    parts = compare(recipe, tmp_path / "parts", watcher=Watcher(), resume=True)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert (one.row, one.top1) == (other.row, other.top1)
    cards = [[card.model_dump(exclude={"cost"}) for card in run.teachers] for run in (whole, parts)]
    assert cards[0] == cards[1]
    paths = [tmp_path / run / "seed-0" / "soft" / "model.safetensors" for run in ("whole", "parts")]
    weights = [load_file(path) for path in paths]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_recorded_answers_belong_to_all_teachers(tiny_recipe: Any) -> None:
    recipe = tiny_recipe()
    dataset = load_dataset(recipe.data)

    def folder(*teachers: FrozenTeacher) -> Path:
        return open_logit_cache(recipe, dataset, Teachers(teachers), 0, CPU_FP32).folder

    first, second = frozen(1.0, 2.0), frozen(3.0, 4.0)
    folders = [folder(first), folder(second), folder(first, second), folder(first, frozen(3.0, 4.5))]
    assert len(set(folders)) == 4
    assert folder(first, second) == folder(first, frozen(3.0, 4.0))


def test_the_list_is_one_field_and_others_keep_their_dotted_keys() -> None:
    assert [teacher.train.epochs for teacher in load_recipe("digits", [TWO]).all_teachers] == [1, 1]
    (only,) = load_recipe("digits", ["teacher.train.epochs=7"]).all_teachers
    assert only.train.epochs == 7
    assert [name for name in field_names() if name.startswith("teachers")] == ["teachers"]


def test_teachers_alone_are_trained_on_square_images_streamed_as_when_they_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, level in (("ant", 20), ("bee", 200)):
        for kind, size in (("wide", (24, 8)), ("square", (8, 8))):
            (tmp_path / kind / name).mkdir(parents=True)
            for index in range(12):
                Image.new("RGB", size, (level, index, 0)).save(tmp_path / kind / name / f"{index}.png")
    fields = [*TINY, "data.train_images=null", "data.test_images=null", "teacher.train.batch_size=4", "data.workers=0"]
    kinds = ("wide", "square")
    wide, square = (load_recipe("digits", [*fields, f"data.name=folder:{tmp_path / kind}"]) for kind in kinds)
    with pytest.raises(RecipeError, match=r"are 8 x 24 px, but models are used on square ones: set data\.image_px=8"):
        train_teachers(wide, tmp_path / "refused", watcher=Watcher())
    assert not (tmp_path / "refused").exists()
    square = square.model_copy(update={"data": square.data.model_copy(update={"image_px": 8})})
    train_teachers(square, tmp_path / "run", watcher=Watcher())
    monkeypatch.setattr("deitkit.data.survey._MOST_MEMORY", 0.0)  # everything that may be streamed now is
    streamed, load = [], teachers_only.load_labelled

    def watched(data: DataRecipe, *given: Any, **more: Any) -> Dataset:
        dataset = load(data, *given, **more)
        streamed.append(dataset.streamed)
        return dataset

    monkeypatch.setattr(teachers_only, "load_labelled", watched)
    train_teachers(square, tmp_path / "run", watcher=Watcher(), resume=True)
    assert streamed == [False]
