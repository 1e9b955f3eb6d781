"""Classes of unequal size: weights of the labels, balanced epochs, and a winner by balanced accuracy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import CPU_FP32, striped_dataset
from deitkit.comparison.compare import compare
from deitkit.data.augment.mix import balanced_weights, smoothed_one_hot, weigh_images
from deitkit.data.batches import Batches
from deitkit.data.dataset import Dataset
from deitkit.data.split import Split
from deitkit.distillation.methods import METHODS
from deitkit.errors import RecipeError
from deitkit.evaluation.readouts import balanced_accuracy, macro_f1
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.vit import Output
from deitkit.recipe.schema import AugmentRecipe, DistillationRecipe, Recipe, TrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.observer import Watcher
from deitkit.system.ranks import ALONE
from deitkit.teachers.prepare import teacher_cohort, teacher_student
from deitkit.training.build import build_cohort, build_students
from deitkit.training.cohort import Cohort

CPU = torch.device("cpu")


def unequal() -> Dataset:
    """Return three classes of 24, 6 and 3 training images."""
    data = striped_dataset()
    kept = torch.cat(
        [(data.train.labels == label).nonzero().flatten()[:count] for label, count in enumerate((24, 6, 3))]
    )
    return replace(data, train=Split(data.train.images[kept], data.train.labels[kept]))


def cohort(data: Dataset, train: TrainRecipe) -> Cohort:
    return Cohort(
        [], teacher=None, dataset=data, augment=AugmentRecipe(mixup=0.8), train=train, speed=SpeedRecipe(),
        precision=CPU_FP32, seed=0,
    )  # fmt: skip


def test_weights_are_scikit_learns_and_the_loss_is_torchs() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    data = unequal()
    weights = balanced_weights(data.train.labels, 3)
    labels = data.train.labels.numpy()
    assert weights.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels).tolist())
    trained = cohort(data, TrainRecipe(batch_size=16, class_weight="balanced"))
    assert trained.views.class_weights is not None
    assert torch.equal(trained.views.class_weights, weights)
    _, dense = trained.make_view(*trained.batches.batch(0, 0), 0)
    logits, teacher = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    weighted = weigh_images(dense, weights, 0.0)  # without smoothing, torch weighs images too
    terms = METHODS["dkd"].loss_terms(Output(logits), teacher, dense, DistillationRecipe(), weighted)
    torch.testing.assert_close(terms["labels"], F.cross_entropy(logits, dense, weight=weights))
    plain = METHODS["dkd"].loss_terms(Output(logits), teacher, dense, DistillationRecipe())
    assert torch.equal(terms["teacher"], plain["teacher"]), "its target class is that of the labels, not of the weights"


@given(st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 2**16))
def test_a_weight_scales_the_whole_target_of_an_image(smoothing: float, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, others = torch.randint(4, (2, 9), generator=generator)
    weights = torch.rand(4, generator=generator) + 0.1
    both = [smoothed_one_hot(of, 4, smoothing) for of in (labels, others)]
    mixed = share * both[0] + (1 - share) * both[1]
    expected = share * weights[labels, None] * both[0] + (1 - share) * weights[others, None] * both[1]
    torch.testing.assert_close(weigh_images(mixed, weights, smoothing), expected)


def test_smoothing_teaches_no_frequent_image_the_rare_class() -> None:
    """Of 20 to 1 images, a column's weight would put more of a smoothed target on the rare class than on its own."""
    weights = balanced_weights(torch.tensor([0] * 20 + [1]), 2)
    target = weigh_images(smoothed_one_hot(torch.tensor([0]), 2, 0.1), weights, 0.1)[0]
    assert target[0] / target.sum() == pytest.approx(0.95)
    assert (smoothed_one_hot(torch.tensor([0]), 2, 0.1) * weights)[0].argmax() == 1


@given(st.integers(2, 7), st.integers(1, 50))
def test_equal_classes_weigh_exactly_one(classes: int, count: int) -> None:
    assert balanced_weights(torch.arange(classes).repeat(count), classes).tolist() == [1.0] * classes


def test_equal_classes_are_not_weighed() -> None:
    assert cohort(striped_dataset(), TrainRecipe(batch_size=16, class_weight="balanced")).views.class_weights is None


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(0, 3))
def test_a_balanced_epoch_has_as_many_images_of_every_class(counts: list[int], epoch: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    split = Split(torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None], labels)
    order = Batches(split, 1, 0, CPU, balanced=True)._shuffled(epoch)
    assert len(order) == len(labels)
    drawn = labels[order].bincount(minlength=len(counts))
    assert int(drawn.max() - drawn.min()) <= 1
    for label in range(len(counts)):  # no image comes twice more often than another of its class
        times = order[labels[order] == label].bincount(minlength=len(labels))[labels == label]
        assert int(times.max() - times.min()) <= 1


def test_with_equal_classes_every_image_comes_once() -> None:
    order = Batches(striped_dataset().train, 8, 0, CPU, balanced=True)._shuffled(0)
    assert order.sort().values.tolist() == list(range(72))


def test_balanced_epochs_differ_and_repeat_themselves() -> None:
    batches = Batches(unequal().train, 8, 0, CPU, balanced=True)
    assert torch.equal(batches._shuffled(1), Batches(unequal().train, 8, 0, CPU, balanced=True)._shuffled(1))
    assert not torch.equal(batches._shuffled(0), batches._shuffled(1))


def test_figures_of_a_constant_answer() -> None:
    scores, labels = torch.tensor([[1.0, 0.0, 0.0]]).repeat(10, 1), torch.tensor([0] * 8 + [1, 2])
    assert balanced_accuracy(scores, labels) == pytest.approx(1 / 3)
    assert macro_f1(scores, labels) == pytest.approx(2 * 0.8 / 1.8 / 3)
    assert balanced_accuracy(scores, torch.zeros(10, dtype=torch.long)) == 1.0


SAMPLING, WEIGHTS = ["data.sampling=balanced"], ["train.class_weight=balanced", "teacher.train.class_weight=balanced"]


@pytest.mark.parametrize("weight", [0, 1])
def test_classes_are_not_balanced_twice(weight: int, tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=rf"{WEIGHTS[weight]} together count rare classes twice: keep one"):
        tiny_recipe(*SAMPLING, WEIGHTS[weight])


@pytest.mark.parametrize("fields", [SAMPLING, WEIGHTS])
def test_sampling_and_weights_reach_students_and_teacher(fields: list[str], tiny_recipe: Callable[..., Recipe]) -> None:
    recipe, data = tiny_recipe("methods=[none]", *fields), unequal()
    students = build_students(recipe, data, 0, CPU_FP32)
    model = Classifier(CifarResNet(20, classes=3), mean=data.mean, std=data.std)
    alone = teacher_student("teacher", model, recipe.teacher, CPU_FP32)
    for trained in (
        build_cohort(students, recipe, data, teacher=None, seed=0, precision=CPU_FP32),
        teacher_cohort(alone, recipe, data, CPU_FP32, ALONE),
    ):
        drawn = torch.cat([labels for _, labels in trained.batches.epoch(0)]).bincount(minlength=3)
        assert (int(drawn.max() - drawn.min()) <= 2) == (fields == SAMPLING)
        (student,) = trained.students
        student.classifier.train()
        view, targets = trained.make_view(*trained.batches.batch(0, 0), 0)
        state = {name: value.clone() for name, value in student.classifier.state_dict().items()}
        with torch.no_grad():
            logits = student.classifier(view).class_logits
        student.classifier.load_state_dict(state)  # BatchNorm's averages
        trained.train_step(*trained.batches.batch(0, 0))
        (loss,) = student.term_sums.values()
        weights = balanced_weights(data.train.labels, 3) if fields == WEIGHTS else torch.ones(3)
        own = weigh_images(targets, weights, trained.train_recipe.label_smoothing)
        expected = -(own * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        torch.testing.assert_close(loss.squeeze(), expected.to(loss.dtype))


def test_the_winner_by_balanced_accuracy_is_said(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    results = compare(tiny_recipe("methods=[none, hard]", "compare.by=balanced"), tmp_path / "run", watcher=Watcher())
    assert "It was chosen by balanced accuracy" in results.verdict
    assert all(row.macro_f1 is not None for row in results.rows)
