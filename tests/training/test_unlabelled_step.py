"""A step with images without labels: which terms see them, with what weight, and that they change nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CPU_FP32, StopAfter, striped_dataset
from deitkit.comparison.compare import compare
from deitkit.comparison.describe import describe_students
from deitkit.comparison.seed_run import _student_card
from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import sketch
from deitkit.data.split import Split
from deitkit.distillation.methods import METHODS, Method
from deitkit.errors import Interrupted
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import AugmentRecipe, DistillationRecipe, Recipe, TrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.observer import Watcher
from deitkit.training.cohort import Cohort
from deitkit.training.student import Student

BATCH, UNLABELLED, CLASSES = 12, 20, 4
TAUGHT = [method for method in METHODS.values() if method.teacher_signal]


def data_with(count: int = UNLABELLED) -> Dataset:
    data, other = striped_dataset(classes=CLASSES, per_class=5), striped_dataset(classes=CLASSES, per_class=30)
    hashes = other.train.hashes
    assert hashes is not None
    return replace(data, unlabelled=Split(other.train.images[:count], torch.full((count,), -1), hashes=hashes[:count]))


def student(method: Method, weight: float = 1.0, micro_batch_size: int | None = None) -> Student:
    torch.manual_seed(0)
    model = DeiT(
        image_px=8, patch_px=4, channels=3, classes=CLASSES, width=16, depth=2, heads=2, tokens=method.tokens
    )  # fmt: skip
    return Student(
        method.name, method, Classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3), TrainRecipe(batch_size=BATCH),
        precision=CPU_FP32, batch_size=max(BATCH, UNLABELLED),
        distillation=DistillationRecipe(unlabelled_weight=weight),
        speed=SpeedRecipe(micro_batch_size=micro_batch_size),
    )  # fmt: skip


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a view of all images, the targets of those with labels, and the teacher's logits for all."""
    generator = torch.Generator().manual_seed(1)
    view = torch.rand(BATCH + UNLABELLED, 3, 8, 8, generator=generator)
    targets = torch.rand(BATCH, CLASSES, generator=generator).softmax(-1)
    return view, targets, torch.randn(len(view), CLASSES, generator=generator) * 3


def gradient(trained: Student) -> list[torch.Tensor]:
    return [value.grad.clone() for value in trained.classifier.parameters() if value.grad is not None]


@pytest.mark.parametrize("method", TAUGHT, ids=lambda method: method.name)
def test_with_weight_zero_they_are_not_there_to_the_bit(method: Method) -> None:
    view, targets, logits = tensors()
    without, ignoring = student(method), student(method, weight=0.0)
    terms = without.backward(view[:BATCH], targets, logits[:BATCH])
    same = ignoring.backward(view, targets, logits)
    assert {name: float(term) for name, term in terms.items()} == {name: float(term) for name, term in same.items()}
    for one, other in zip(gradient(without), gradient(ignoring), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", TAUGHT, ids=lambda method: method.name)
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_labels_are_a_mean_over_the_labelled_and_the_teacher_over_all(method: Method, weight: float) -> None:
    view, targets, logits = tensors()
    found = student(method, weight).backward(view, targets, logits)
    reference = student(method)
    known = reference.method.loss_terms(
        reference.classifier(view[:BATCH]), logits[:BATCH], targets, reference.distillation
    )
    more = reference.method.loss_terms(reference.classifier(view[BATCH:]), logits[BATCH:], None, reference.distillation)
    assert list(more) == ["teacher"]
    if method.uses_labels:
        torch.testing.assert_close(found["labels"], known["labels"].detach())
    total = BATCH + weight * UNLABELLED
    expected = (BATCH * known["teacher"] + weight * UNLABELLED * more["teacher"]) / total
    torch.testing.assert_close(found["teacher"], expected.detach())


@pytest.mark.parametrize("method", [METHODS["soft"], METHODS["token-hard"], METHODS["dkd"]], ids=lambda one: one.name)
def test_micro_batches_give_the_gradient_of_the_whole(method: Method) -> None:
    whole, divided = student(method), student(method, micro_batch_size=7)
    whole.backward(*tensors())
    divided.backward(*tensors())
    for one, other in zip(gradient(whole), gradient(divided), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_target_class_of_an_image_without_a_label_is_the_teachers_decision() -> None:
    view, _, logits = tensors()
    one = student(METHODS["dkd"])
    output = one.classifier(view)
    decided = torch.nn.functional.one_hot(logits.argmax(-1), CLASSES).float()
    free = one.method.loss_terms(output, logits, None, one.distillation)["teacher"]
    told = one.method.loss_terms(output, logits, decided, one.distillation)["teacher"]
    assert torch.equal(free, told)


class Teacher(torch.nn.Module):
    def forward(self, view: torch.Tensor) -> torch.Tensor:
        return torch.stack([-(view.mean(dim=(1, 2, 3)) - level).abs() * 20 for level in (0.1, 0.3, 0.5, 0.7)], dim=1)


def cohort_of(names: list[str], data: Dataset, count: int) -> Cohort:
    students = [student(METHODS[name]) for name in names]
    return Cohort(
        students, teacher=Teacher(), dataset=data, augment=AugmentRecipe(mixup=0.8, erase=0.5),
        train=TrainRecipe(batch_size=BATCH, epochs=3), speed=SpeedRecipe(), precision=CPU_FP32, seed=3,
        unlabelled_in_step=count,
    )  # fmt: skip


def test_views_with_labels_and_students_without_a_teacher_stay_as_they_are() -> None:
    with_them, without = cohort_of(["none", "soft"], data_with(), UNLABELLED), cohort_of(["none"], data_with(), 0)
    for cohort in (with_them, without):
        for _ in cohort.fit():
            pass
    ours, theirs = (cohort.students[0].classifier.state_dict() for cohort in (with_them, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_image_comes_once_before_any_comes_again() -> None:
    cohort = cohort_of(["soft"], data_with(count=50), 10)
    seen = []
    for step in range(5):  # of the run: more than the steps of an epoch with labels
        cohort.epoch, cohort.step = divmod(step, cohort.batches.steps_per_epoch)
        images = cohort.views.unlabelled_images(cohort.global_step)
        assert images is not None
        seen += [bytes(image.numpy()) for image in images]
    assert len(set(seen)) == 50


def test_fewer_images_than_a_step_has_room_for_are_all_used() -> None:
    cohort = cohort_of(["soft"], data_with(count=5), 64)
    assert cohort.images_in_step == BATCH + 5
    cohort.next_step(cohort.batches.epoch(0, 0))
    assert cohort_of(["none"], data_with(count=5), 64).views.unlabelled is None, "nobody there learns from a teacher"


def test_a_run_resumes_with_them_and_tells_of_them(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    more = ("data.unlabelled=rest", "train.unlabelled_batch_size=24", "methods=[none, soft, consistent]")
    recipe = tiny_recipe(*more, "teacher.cache=true")
    whole = compare(recipe, tmp_path / "whole", watcher=Watcher())
    with pytest.raises(Interrupted):
        compare(recipe, tmp_path / "run", watcher=StopAfter(11))
    resumed = compare(recipe, tmp_path / "run", watcher=Watcher(), resume=True)
    assert [row.top1 for row in whole.rows] == [row.top1 for row in resumed.rows]
    assert whole.dataset.unlabelled == 906
    assert "64 training images and 906 without labels" in (tmp_path / "run" / "table.md").read_text()
    plain = compare(tiny_recipe("methods=[none]"), tmp_path / "plain", watcher=Watcher())
    assert plain.rows[0].top1 == whole.rows[0].top1


@pytest.mark.parametrize("field", ["methods=[none]", "distillation.unlabelled_weight=0"])
def test_images_that_nobody_uses_are_named(field: str) -> None:
    recipe = load_recipe("digits", ["data.unlabelled=rest", field])
    assert "the images without labels are not used" in " ".join(describe_students(recipe, data_with(), {}))
    used = load_recipe("digits", ["data.unlabelled=rest"])
    assert "a step has 32 images with labels and 20 without" in list(describe_students(used, data_with(), {}))


def test_they_are_read_for_students_with_a_teacher_alone_until_the_last_has_stopped() -> None:
    cohort, without = cohort_of(["none", "soft"], data_with(), UNLABELLED), cohort_of(["none"], data_with(), 0)
    views: list[int] = []
    make_view = cohort.make_view

    def watching(*given: Any) -> Any:
        made = make_view(*given)
        views.append(len(made[0]))
        return made

    cohort.make_view = watching  # type: ignore[method-assign]
    for each in (cohort, without):
        each.next_step(each.batches.epoch(0))
        each.students[-1].stopped = "stopped" if each is cohort else None
        each.next_step(each.batches.epoch(0))
    assert views == [BATCH + UNLABELLED, BATCH]
    for one, other in zip(gradient(cohort.students[0]), gradient(without.students[0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "fields", "learns"),
    [("soft", (), True), ("consistent", (), True), ("none", (), False),
     ("soft", ("distillation.unlabelled_weight=0",), False)],
)  # fmt: skip
def test_only_students_that_learn_from_them_say_so_in_their_card(
    method: str, fields: tuple[str, ...], learns: bool
) -> None:
    data = data_with()
    assert data.unlabelled is not None
    recipe = load_recipe("digits", ["data.unlabelled=rest", *fields])
    card = _student_card(recipe, data, student(METHODS[method]), 0)
    splits = [data.train, data.unlabelled] if learns else [data.train]
    assert card["trained_on"] == sketch(torch.cat([split.hashes for split in splits]))
    assert card.get("labelled_share", 1.0) == (len(data.train) / (len(data.train) + UNLABELLED) if learns else 1.0)
