"""The verdict in words: wins, ties, and how far the winner is from labels alone, the teacher and a CNN."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deitkit.comparison.rows import StudentPredictions, Summary, summarise
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.data.split import Split
from deitkit.recipe.schema import Recipe
from deitkit.teachers.resolution import TeacherLogits

TinyRecipe = Callable[..., Recipe]


def scores_of(labels: Tensor, right: float) -> Tensor:
    """Return scores by which this share of the images, spread over all of them, is classified correctly."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = (labels + 1) % 10
    hits = order[: round(right * len(labels))]
    chosen[hits] = labels[hits]
    return torch.nn.functional.one_hot(chosen, 10).float()


def student(dataset: Dataset, validation: float, test: float) -> StudentPredictions:
    splits = {"validation": (dataset.validation, validation), "test": (dataset.test, test)}
    scores = {name: {"class": scores_of(split.labels, right)} for name, (split, right) in splits.items()}
    return StudentPredictions(None, 1, {"last": scores})


def judge(recipe: Recipe, teacher: float | None, **students: tuple[float, float]) -> Summary:
    """Summarise students, each with its accuracy on the validation and the test images."""
    dataset = load_dataset(recipe.data)
    logits = None if teacher is None else scores_of(dataset.test.labels, teacher)
    trained = {name.replace("_", "-"): student(dataset, *both) for name, both in students.items()}
    teacher_logits = None if logits is None else TeacherLogits(logits, logits)
    return summarise(recipe, dataset, {0: trained}, teacher_logits, [])


@pytest.mark.parametrize(
    ("none", "hard", "teacher", "words"),
    [
        # A clear win over labels alone, far from the teacher.
        ((0.4, 0.4), (0.8, 0.7), 0.95,
         ["hard/class wins on the validation images and scores 70.00 % on the test images (one seed, n = 20), "
          "+30.00 points against labels alone", "The teacher scores 95.00 %"]),
        # Ahead by one of 108 images: chance may explain it, whatever the test images say.
        ((0.70, 0.60), (0.71, 0.55), 0.95,
         ["hard/class is best on the validation images and scores 55.00 %",
          "On 108 validation images alone it is statistically indistinguishable from none/class.",
          "-5.00 points against labels alone (p = 1, McNemar: chance may explain it)",
          "On the test images none/class is higher (60.00 %), but nothing is chosen there"]),
        # As good on the validation images: nobody leads.
        ((0.9, 0.7), (0.9, 0.9), 0.95,
         ["none/class ties for first place on the validation images and scores 70.00 % on the test images",
          "hard/class is as good on 108 validation images; the first of the methods is taken."]),
        # Labels alone win.
        ((0.8, 0.7), (0.4, 0.4), 0.7,
         ["none/class wins on the validation images", "no distilled student beat labels alone",
          "The teacher scores 70.00 %, as much."]),
        ((0.8, 0.7), (0.4, 0.4), 0.75,
         ["The teacher scores 75.00 %, 5.00 points more (p = 1, McNemar: chance may explain it)."]),
        # Better than its teacher.
        ((0.4, 0.4), (0.9, 0.9), 0.2, ["The teacher scores 20.00 %, 70.00 points less (p = "]),
        ((0.4, 0.4), (0.9, 0.2), 0.9, ["The teacher scores 90.00 %, 70.00 points more (p = "]),
    ],
)  # fmt: skip
def test_the_verdict_weighs(
    none: tuple[float, float], hard: tuple[float, float], teacher: float, words: list[str], tiny_recipe: TinyRecipe
) -> None:
    recipe = tiny_recipe("methods=[none, hard]", "data.test_images=20")
    verdict = judge(recipe, teacher, none=none, hard=hard).verdict
    for part in words:
        assert part in verdict, verdict


def test_the_cnn_baseline_is_in_the_verdict(tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe("methods=[none]", "baseline.name=cifar/resnet20", "data.test_images=100")
    summary = judge(recipe, None, none=(0.4, 0.4), cnn_baseline=(0.9, 0.9))
    assert summary.winner is not None
    assert summary.winner.row == "none/class"
    assert "The CNN baseline scores 90.00 %, 50.00 points more (p = " in summary.verdict
    assert summary.verdict.startswith("none/class scores 40.00 %")


def test_chance_may_explain_what_several_seeds_do_not_agree_on(tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe("methods=[none, hard]", "seeds=[0, 1, 2]")
    dataset = load_dataset(recipe.data)
    hard = {seed: student(dataset, right, right) for seed, right in enumerate((0.5, 0.9, 0.6))}
    none = {seed: student(dataset, 0.55, 0.55) for seed in range(3)}
    predictions = {seed: {"none": none[seed], "hard": hard[seed]} for seed in range(3)}
    verdict = summarise(recipe, dataset, predictions, None, []).verdict
    assert verdict.startswith("hard/class is best on the validation images and scores")
    assert "On 108 validation images alone it is statistically indistinguishable from none/class" in verdict
    assert "(mean of 3 seeds, n = " in verdict


@pytest.mark.parametrize(
    ("frequent", "rare", "outcome"), [(830, 80, "hard/class wins on"), (869, 52, "hard/class is best on")]
)
def test_the_lead_is_tested_by_what_the_winner_was_chosen_by(
    frequent: int, rare: int, outcome: str, tiny_recipe: TinyRecipe
) -> None:
    """Of 900 and 100 images 'none' has 870 and 48 right, and 'hard', of 830 and 80, is ahead by class alone."""
    recipe = tiny_recipe("methods=[none, hard]", "compare.by=balanced")
    labels = torch.tensor([0] * 900 + [1] * 100)
    split = Split(torch.zeros(1000, 1, 8, 8, dtype=torch.uint8), labels)
    dataset = replace(load_dataset(recipe.data), validation=split, test=split)

    def of(frequent: int, rare: int) -> StudentPredictions:
        right = torch.cat([torch.arange(900) < frequent, torch.arange(100) < rare])
        scores = torch.nn.functional.one_hot(torch.where(right, labels, 2), 10).float()
        return StudentPredictions(None, 1, {"last": {key: {"class": scores} for key in ("validation", "test")}})

    summary = summarise(recipe, dataset, {0: {"none": of(870, 48), "hard": of(frequent, rare)}}, None, [])
    assert summary.verdict.startswith(outcome), summary.verdict
    told_apart = (
        "On 1,000 validation images alone it is statistically indistinguishable from none/class" not in summary.verdict
    )
    assert told_apart == (rare == 80)
    won = summary.winner
    assert won is not None
    found, plain = won.balanced_differences["labels"], won.differences["labels"]
    assert found.mean == pytest.approx((rare / 100 + frequent / 900 - 48 / 100 - 870 / 900) / 2)
    assert found.mean > max(plain.mean, 0)
    own, words = 100 * (rare / 100 + frequent / 900) / 2, "" if rare == 80 else ": chance may explain it"
    gain = f"{100 * found.mean:+.2f} points against labels alone (p = {found.p:.2g}, McNemar by class{words})"
    assert f"It was chosen by balanced accuracy, {own:.2f} % on the test images: {gain}" in summary.verdict


def test_labels_alone_that_win_are_compared_with_the_other_labels_alone(tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe("methods=[mean-pool-none, class-only, soft]")
    students = {"mean_pool_none": (0.4, 0.4), "class_only": (0.9, 0.9), "soft": (0.5, 0.5)}
    verdict = judge(recipe, 0.95, **students).verdict
    assert "+50.00 points against mean-pool-none/class (p" in verdict, verdict
    assert "; on the validation images no distilled student beat labels alone." in verdict


def test_a_lead_that_other_images_may_undo_is_no_win(tiny_recipe: TinyRecipe) -> None:
    """Five seeds agree on one image of 108: significant over the seeds, and not for other images."""
    recipe = tiny_recipe("methods=[none, hard]", "seeds=[0, 1, 2, 3, 4]")
    dataset = load_dataset(recipe.data)
    n = len(dataset.validation)
    right = [(70 + seed % 2) / n for seed in range(5)]
    predictions = {
        seed: {"none": student(dataset, share, 0.5), "hard": student(dataset, share + (2 + (seed == 4)) / n, 0.5)}
        for seed, share in enumerate(right)
    }
    verdict = summarise(recipe, dataset, predictions, None, []).verdict
    assert verdict.startswith("hard/class is best on the validation images"), verdict
    assert "it is statistically indistinguishable from none/class" in verdict


@pytest.mark.parametrize(
    ("sampling", "frequent_in_training", "learnt"),
    [
        ("all", True, "it has learnt only which class is frequent; data.sampling=balanced trains on all"),
        ("all", False, "it has learnt nothing yet; train longer (train.epochs)"),
        ("balanced", True, "it has learnt nothing yet; train longer (train.epochs)"),
    ],
)
def test_a_student_that_always_answers_the_frequent_class_is_called_that(
    tiny_recipe: TinyRecipe, sampling: str, frequent_in_training: bool, learnt: str
) -> None:
    recipe = tiny_recipe("methods=[none]", f"data.sampling={sampling}")
    dataset = load_dataset(recipe.data)
    if frequent_in_training:
        labels = dataset.train.labels.clone()
        labels[len(labels) // 3 :] = 0
        dataset = replace(dataset, train=replace(dataset.train, labels=labels))
    frequent = torch.arange(len(dataset.test)) % 20 == 0
    test = replace(dataset.test, labels=torch.where(frequent, 1, 0))
    constant = {
        name: {"class": torch.eye(10)[0].expand(len(split), 10)}
        for name, split in (("validation", dataset.validation), ("test", test))
    }
    predictions = {0: {"none": StudentPredictions(None, 1, {"last": constant})}}
    summary = summarise(recipe, replace(dataset, test=test), predictions, None, [])
    assert f"It answers '0' to every test image: {learnt}" in summary.verdict
    (row,) = summary.rows
    assert row.top1_mean == pytest.approx(0.95, abs=0.01)
    assert row.balanced_accuracy == pytest.approx(0.5)  # of the two classes that have test images


def test_equal_sums_over_seeds_are_equal_accuracies(tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe("methods=[none, hard]", "data.test_images=108", "seeds=[0, 1, 2]")
    dataset = load_dataset(recipe.data)
    hits = {"none": (92, 95, 104), "hard": (93, 96, 102)}  # of 108, whose means differ by rounding
    trained = {
        seed: {name: student(dataset, right[seed] / 108, right[seed] / 108) for name, right in hits.items()}
        for seed in range(3)
    }
    summary = summarise(recipe, dataset, trained, None, [])
    assert summary.winner is not None
    assert summary.winner.method == "none"
    assert summary.verdict.startswith("none/class ties for first place on the validation images")
    assert "is higher" not in summary.verdict
