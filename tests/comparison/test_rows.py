"""The table as a pure function of predictions: zeros, ties and stopped students."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score, top_k_accuracy_score
from torch import Tensor

from deitkit.comparison.rows import StudentPredictions, _speed, note_on_stops, summarise
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.evaluation.statistics import holm
from deitkit.recipe.schema import Recipe
from deitkit.run.layout import BASELINE
from deitkit.run.metrics import EpochMetrics
from deitkit.teachers.resolution import TeacherLogits


def scores_of(labels: Tensor, right: float) -> Tensor:
    """Return scores by which a share of the images is classified correctly, and the others as the next class."""
    chosen = (labels + 1) % 10
    count = round(right * len(labels))
    chosen[:count] = labels[:count]
    return torch.nn.functional.one_hot(chosen, 10).float()


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_an_accuracy_of_zero_is_a_value_and_not_an_absence(tiny_recipe: Callable[..., Recipe], right: float) -> None:
    recipe = tiny_recipe("methods=[none, soft]")
    dataset = load_dataset(recipe.data)
    splits = {name: getattr(dataset, name).labels for name in ("validation", "test")}
    student = StudentPredictions(
        None, 1, {"last": {name: {"class": scores_of(labels, right)} for name, labels in splits.items()}}
    )
    wrong = scores_of(splits["test"], 0.0)
    summary = summarise(recipe, dataset, {0: {"none": student, "soft": student}}, TeacherLogits(wrong, wrong), [])
    none, soft = summary.rows
    assert none.top1 == none.validation_top1 == (right,)
    assert none.top1_mean == right
    assert none.teacher_agreement == 1 - right
    difference = soft.differences.get("labels")
    assert difference is not None
    assert (difference.mean, difference.p) == (0, 1)
    assert summary.winner == none
    first = "none/class ties for first place on the validation images"
    assert summary.verdict.startswith(f"{first} and scores {100 * right:.2f} % on the test images")
    assert "soft/class is as good on 108 validation images; the first of the methods is taken." in summary.verdict
    assert "no distilled student beat labels alone" in summary.verdict


def test_a_comparison_of_stopped_students_alone_has_no_winner(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("methods=[none]")
    dataset = load_dataset(recipe.data)
    splits = {name: {"class": scores_of(getattr(dataset, name).labels, 1.0)} for name in ("validation", "test")}
    stopped = StudentPredictions("stopped at step 3: the loss is not finite", 1, {"last": splits})
    summary = summarise(recipe, dataset, {0: {"none": stopped}}, None, [])
    assert summary.winner is None
    assert summary.rows[0].top1 == (None,)
    assert summary.rows[0].top1_mean is None


def drawn(dataset: Dataset, seed: int, bonus: float) -> StudentPredictions:
    """Return drawn scores, the more often right the larger the bonus of the true class."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for split in ("validation", "test"):
        labels = getattr(dataset, split).labels
        values = torch.randn(len(labels), 10, generator=generator)
        scores[split] = {"class": values + bonus * torch.nn.functional.one_hot(labels, 10)}
    return StudentPredictions(None, 1, {"last": scores})


def hits_of(student: StudentPredictions, dataset: Dataset) -> Tensor:
    return (student.scores["last"]["test"]["class"].argmax(dim=1) == dataset.test.labels).double()


def test_a_seed_in_which_a_student_stopped_leaves_its_statistics(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("methods=[none, hard]", "seeds=[0, 1, 2]")
    dataset = load_dataset(recipe.data)
    predictions = {
        seed: {"none": drawn(dataset, seed, 1.0), "hard": drawn(dataset, 10 + seed, 1.5)} for seed in recipe.seeds
    }
    predictions[1]["hard"] = replace(predictions[1]["hard"], status="stopped at step 3: the loss is not finite")
    none, hard = summarise(recipe, dataset, predictions, None, []).rows
    accuracies = {
        name: [float(hits_of(predictions[seed][name], dataset).mean()) for seed in recipe.seeds]
        for name in ("none", "hard")
    }
    assert none.top1 == pytest.approx(accuracies["none"])
    left = [accuracies["hard"][0], accuracies["hard"][2]]
    assert hard.top1 == (left[0], None, left[1])
    assert hard.validation_top1[1] is None
    assert hard.top5 is not None
    assert hard.top5[1] is None
    assert hard.top1_mean == pytest.approx(np.mean(left))
    assert hard.top1_std == pytest.approx(np.std(left, ddof=1))
    assert hard.top1_ci95 == pytest.approx(stats.t.interval(0.95, 1, np.mean(left), stats.sem(left)))
    assert hard.status == "seed 1 stopped at step 3: the loss is not finite"
    difference = hard.differences.get("labels")
    assert difference is not None
    both = [accuracies["none"][0], accuracies["none"][2]]
    assert difference.mean == pytest.approx(np.mean(left) - np.mean(both))
    assert difference.p == pytest.approx(stats.ttest_rel(left, both).pvalue)
    summary = summarise(recipe, dataset, predictions, None, [])
    assert summary.winner == none, "a stopped student does not win"
    advice = {"fp32": "", "bf16": ", or set train.precision=fp32"}
    for precision, more in advice.items():
        notes = note_on_stops(summary.rows, tiny_recipe(f"train.precision={precision}"))
        assert notes == (f"hard stopped: lower train.learning_rate{more}.",)
    assert note_on_stops(summary.rows[:1], recipe) == ()


def test_accuracies_and_intervals_are_those_of_other_libraries(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("methods=[none]", "seeds=[0, 1, 2]")
    dataset = load_dataset(recipe.data)
    predictions = {seed: {"none": drawn(dataset, seed, 1.0)} for seed in recipe.seeds}
    (row,) = summarise(recipe, dataset, predictions, None, []).rows
    labels = dataset.test.labels.numpy()
    scores = [predictions[seed]["none"].scores["last"]["test"]["class"].numpy() for seed in recipe.seeds]
    assert row.top1 == pytest.approx([top_k_accuracy_score(labels, each, k=1) for each in scores])
    assert row.top5 == pytest.approx([top_k_accuracy_score(labels, each, k=5) for each in scores])
    assert row.macro_f1 == pytest.approx(
        np.mean([f1_score(labels, each.argmax(axis=1), average="macro") for each in scores])
    )
    assert row.top1_ci95 == pytest.approx(stats.t.interval(0.95, 2, np.mean(row.top1), stats.sem(row.top1)))
    alone = recipe.model_copy(update={"seeds": (0,)})
    (row,) = summarise(alone, dataset, {0: predictions[0]}, None, []).rows
    right, n = round(float(hits_of(predictions[0]["none"], dataset).sum())), len(labels)
    assert row.top1_ci95 == pytest.approx(stats.binomtest(right, n).proportion_ci(method="wilson"))


def test_p_values_are_corrected_for_the_rows_that_are_compared(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("methods=[none, soft, hard]", "baseline.name=cifar/resnet20")
    dataset = load_dataset(recipe.data)
    bonuses = {"none": 1.0, "soft": 1.4, "hard": 1.8, BASELINE: 1.2}
    students = {name: drawn(dataset, 7 * place, bonuses[name]) for place, name in enumerate(bonuses)}
    teacher_logits = drawn(dataset, 99, 1.5).scores["last"]["test"]["class"]
    rows = summarise(recipe, dataset, {0: students}, TeacherLogits(teacher_logits, teacher_logits), []).rows
    compared = {}
    for reference, other in (("labels", students["none"]), ("baseline", students[BASELINE]), ("teacher", None)):
        right = (
            (teacher_logits.argmax(dim=1) == dataset.test.labels).double() if other is None else hits_of(other, dataset)
        )
        found = {row.method: row.differences.get(reference) for row in rows}
        compared[reference] = [name for name, difference in found.items() if difference is not None]
        expected = []
        for name in compared[reference]:
            gained = hits_of(students[name], dataset) - right
            better, worse = int((gained > 0).sum()), int((gained < 0).sum())
            expected.append(stats.binomtest(better, better + worse).pvalue)
            assert found[name].p == pytest.approx(expected[-1])
        assert [found[name].p_holm for name in compared[reference]] == pytest.approx(holm(expected))
    assert compared == {
        "labels": ["soft", "hard", BASELINE],
        "baseline": ["none", "soft", "hard"],
        "teacher": ["none", "soft", "hard", BASELINE],
    }


@pytest.mark.parametrize(("by", "winner"), [("accuracy", "none"), ("balanced", "soft")])
def test_the_winner_is_chosen_by_what_the_recipe_says(tiny_recipe: Callable[..., Recipe], by: str, winner: str) -> None:
    recipe = tiny_recipe("methods=[none, soft]", f"compare.by={by}")
    dataset = load_dataset(recipe.data)
    labels = dataset.validation.labels
    kept = torch.cat([(labels == 0).nonzero()[:2], (labels > 0).nonzero()]).flatten()  # two images of a rare class
    validation = replace(dataset.validation, images=dataset.validation.images[kept], labels=labels[kept])
    dataset = replace(dataset, validation=validation)

    def student(wrong: int, count: int) -> StudentPredictions:
        scores = {}
        for split in ("validation", "test"):
            chosen = getattr(dataset, split).labels.clone()
            places = (chosen == wrong).nonzero().flatten()[:count]
            chosen[places] = (wrong + 1) % 10
            scores[split] = {"class": torch.nn.functional.one_hot(chosen, 10).float()}
        return StudentPredictions(None, 1, {"last": scores})

    summary = summarise(recipe, dataset, {0: {"none": student(0, 2), "soft": student(1, 3)}}, None, [])
    n, ones = len(kept), int((validation.labels == 1).sum())
    assert [row.validation_top1 for row in summary.rows] == [
        pytest.approx(((n - 2) / n,)),
        pytest.approx(((n - 3) / n,)),
    ]
    assert [row.validation_balanced for row in summary.rows] == [
        pytest.approx((0.9,)), pytest.approx(((9 + (ones - 3) / ones) / 10,))
    ]  # fmt: skip
    assert summary.winner is not None
    assert summary.winner.method == winner


def test_a_students_speed_is_its_own_over_its_epochs_and_seeds() -> None:
    def line(seed: int, epoch: int, seconds: float, pace: float) -> EpochMetrics:
        return EpochMetrics(
            seed=seed, student="none", epoch=epoch, step=1, train_loss=1.0, seconds=seconds, images_per_second=pace
        )

    lines = [line(0, 1, 2.0, 100.0), line(0, 2, 4.0, 50.0), line(1, 1, 3.0, 100.0), line(1, 2, 3.0, 100.0)]
    assert _speed(lines) == {"none": {"images_per_second": pytest.approx(1000 / 12), "train_seconds": 6.0}}


def test_a_seed_under_which_a_student_stopped_is_no_part_of_its_seconds() -> None:
    def line(student: str, seed: int, epoch: int) -> EpochMetrics:
        return EpochMetrics(student=student, seed=seed, epoch=epoch, epochs=2, seconds=50.0, images_per_second=10.0)

    lines = [line(student, 0, epoch) for student in ("none", "hard") for epoch in (1, 2)]
    lines += [line("none", 1, 1), line("none", 1, 2)]  # hard stopped in its first epoch
    assert {name: speed["train_seconds"] for name, speed in _speed(lines).items()} == {"none": 100.0, "hard": 100.0}
    lines += [line("hard", 1, 1)]  # or in its second
    assert _speed(lines)["hard"]["train_seconds"] == 100.0
