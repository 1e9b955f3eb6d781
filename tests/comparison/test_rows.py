"""The table as a pure function of predictions: zeros, ties and stopped students."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deitkit.comparison.rows import StudentPredictions, summarise
from deitkit.data.dataset import load_dataset
from deitkit.recipe.schema import Recipe


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
    teacher_logits = scores_of(splits["test"], 0.0)
    summary = summarise(recipe, dataset, {0: {"none": student, "soft": student}}, teacher_logits, [])
    none, soft = summary.rows
    assert none.top1 == none.validation_top1 == (right,)
    assert none.top1_mean == right
    assert none.teacher_agreement == 1 - right
    difference = soft.difference_to("none")
    assert difference is not None
    assert (difference.mean, difference.p) == (0, 1)
    assert summary.winner == none
    first = "none/class shares the first place on the validation images"
    assert summary.verdict.startswith(f"{first} and scores {100 * right:.2f} % on the test images")
    assert "soft/class is as good on 108 validation images; the first of the methods is taken." in summary.verdict
    assert "no teaching beat labels alone" in summary.verdict


def test_a_comparison_of_stopped_students_alone_has_no_winner(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("methods=[none]")
    dataset = load_dataset(recipe.data)
    splits = {name: {"class": scores_of(getattr(dataset, name).labels, 1.0)} for name in ("validation", "test")}
    stopped = StudentPredictions("stopped at step 3: the loss is not finite", 1, {"last": splits})
    summary = summarise(recipe, dataset, {0: {"none": stopped}}, None, [])
    assert summary.winner is None
    assert summary.rows[0].top1 == (None,)
    assert summary.rows[0].top1_mean is None
