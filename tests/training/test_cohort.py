"""The cohort: that students do not disturb each other, resume exactly, and stop alone."""

import itertools
import re
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from conftest import CPU_FP32, poisoned_gradient
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import METHODS
from deitkit.errors import Interrupted, OutOfMemory
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.schema import AugmentRecipe, StudentTrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.metrics import EpochMetrics
from deitkit.run.observer import StepProgress
from deitkit.run.state import load_tree, save_tree
from deitkit.training.cohort import Cohort
from deitkit.training.student import Student

TRAIN = StudentTrainRecipe(epochs=2, batch_size=16, learning_rate=2e-3, ema_decay=0.9, clip_norm=1.0)
AUGMENT = AugmentRecipe(randaugment="2,9", erase=0.25, mixup=0.4, cutmix=0.4)


class Teacher(nn.Module):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.stack([-(view.mean(dim=(1, 2, 3)) - level).abs() * 20 for level in (0.1, 0.4, 0.6)], dim=1)


def student(name: str, dataset: Dataset, train: StudentTrainRecipe = TRAIN) -> Student:
    torch.manual_seed(0)
    model = DeiT(
        image_px=8, patch_px=4, channels=3, classes=3, width=16, depth=2, heads=2,
        tokens=METHODS[name].tokens, drop_path=0.2, dropout=0.1,
    )  # fmt: skip
    classifier = Classifier(model, mean=dataset.mean, std=dataset.std)
    return Student(
        name, METHODS[name], classifier, train,
        precision=CPU_FP32, batch_size=train.batch_size, ema_decay=train.ema_decay,
    )  # fmt: skip


def cohort(
    names: list[str],
    dataset: Dataset,
    teacher: nn.Module | None = None,
    train: StudentTrainRecipe = TRAIN,
    augment: AugmentRecipe = AUGMENT,
) -> Cohort:
    return Cohort(
        [student(name, dataset, train) for name in names],
        teacher=teacher or Teacher(),
        dataset=dataset,
        augment=augment,
        train=train,
        speed=SpeedRecipe(),
        precision=CPU_FP32,
        seed=5,
    )


def weights(trained: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trained.classifier.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def without_times(metrics: list[EpochMetrics]) -> list[dict[str, Any]]:
    times = {"seconds", "images_per_second", "cohort_images_per_second", "shares"}
    return [line.model_dump(exclude=times) for line in metrics]


def test_a_student_learns_the_same_alone_as_beside_others(stripes: Dataset) -> None:
    together = cohort(["none", "hard", "token-soft"], stripes)
    list(together.fit())
    for place, name in enumerate(["none", "hard", "token-soft"]):
        alone = cohort([name], stripes)
        list(alone.fit())
        assert_equal(weights(alone.students[0]), weights(together.students[place]))


def test_the_teacher_is_asked_once_per_step_and_not_at_all_without_need(stripes: Dataset) -> None:
    teacher = Teacher()
    together = cohort(["none", "soft", "hard", "token-hard"], stripes, teacher)
    list(together.fit())
    assert teacher.asked == 2 * together.batches.steps_per_epoch
    teacher = Teacher()
    list(cohort(["none"], stripes, teacher).fit())
    assert teacher.asked == 0


@pytest.mark.parametrize(
    ("optimizer", "stop_after"),  # asked after each step, and after the batch of each validation
    [("adamw", asked) for asked in (1, 4, 5, 6, 9, 10)] + [("lamb", 6), ("muon", 6), ("sgd", 6)],
)
def test_a_stopped_run_goes_on_to_the_same_weights_and_metrics(
    stripes: Dataset, tmp_path: Any, optimizer: str, stop_after: int
) -> None:
    train = TRAIN.model_copy(update={"optimizer": optimizer})
    whole = cohort(["none", "token-hard"], stripes, train=train)
    expected = [record for records in whole.fit() for record in records]

    first = cohort(["none", "token-hard"], stripes, train=train)
    asked = itertools.count(1)
    records = []
    with suppress(Interrupted):
        for told in first.fit(should_stop=lambda: next(asked) == stop_after):
            records += told
    steps = first.batches.steps_per_epoch
    epoch, before = divmod(stop_after - 1, steps + 1)
    assert (first.epoch, first.step) == (epoch, min(before + 1, steps))
    save_tree(tmp_path / "state.safetensors", first.state_dict())
    second = cohort(["none", "token-hard"], stripes, train=train)
    second.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    records += [record for rs in second.fit() for record in rs]

    assert without_times(records) == without_times(expected)
    for one, other in zip(whole.students, second.students, strict=True):
        assert_equal(weights(one), weights(other))
        assert_equal(one.average.classifier.state_dict(), other.average.classifier.state_dict())


def test_a_stopped_student_leaves_the_shares_of_time(stripes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "backward", poisoned_gradient("none", 1))
    epochs = list(cohort(["none", "hard"], stripes).fit())
    assert [line.student for line in epochs[1]] == ["hard"]
    assert sum(epochs[1][0].shares.values()) <= 1


def test_a_student_whose_last_update_leaves_no_numbers_returns_to_the_epoch_before(
    stripes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = cohort(["none", "hard"], stripes)
    steps = trained.batches.steps_per_epoch
    update, calls = Student.optimizer_step, itertools.count(1)

    def infinite_at_the_end(self: Student) -> None:
        update(self)
        if self.name == "none" and next(calls) == 2 * steps:
            next(self.classifier.parameters()).data.fill_(torch.inf)

    monkeypatch.setattr(Student, "optimizer_step", infinite_at_the_end)
    epochs = trained.fit()
    next(epochs)
    after_first = weights(trained.students[0])
    assert [line.student for line in next(epochs)] == ["hard"]
    assert trained.students[0].stopped is not None
    assert f"stopped at step {2 * steps}: the loss or a weight is not finite" in trained.students[0].stopped
    assert_equal(weights(trained.students[0]), after_first)


def test_progress_reports_the_speed_of_the_last_steps_not_of_a_pause(stripes: Dataset) -> None:
    paused = cohort(["none"], stripes)
    paused.next_step(paused.batches.epoch(0))
    state = paused.state_dict()
    state["seconds"]["step"] = 1e6  # as if the process had been stopped for eleven days
    resumed = cohort(["none"], stripes)
    resumed.load_state_dict(state)
    seen: list[StepProgress] = []
    metrics = [line for lines in resumed.fit(on_step=seen.append) for line in lines]
    assert len(seen) == 2 * resumed.batches.steps_per_epoch - 1
    assert max(progress.seconds_left for progress in seen) < 1000
    assert min(progress.images_per_second for progress in seen) > 1
    assert metrics[0].cohort_images_per_second < 0.01, "an epoch's own figure counts all of its time"


def test_the_average_follows_every_step(stripes: Dataset) -> None:
    trained = cohort(["none"], stripes)
    (student,) = trained.students
    expected, steps = weights(student), 0

    def follow(_: StepProgress) -> None:
        nonlocal steps
        decay = min(0.9, (1 + steps) / (10 + steps))
        for name, value in weights(student).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
        steps += 1

    list(trained.fit(on_step=follow))
    assert steps == 2 * trained.batches.steps_per_epoch
    average = student.average.classifier.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value)
    moved = [name for name, value in weights(student).items() if not torch.allclose(value, average[name])]
    assert "model.blocks.0.mlp.fc1.weight" in moved


def test_it_learns(stripes: Dataset) -> None:
    train = StudentTrainRecipe(epochs=12, batch_size=8, learning_rate=3e-3)
    plain = AugmentRecipe(flip=0.0, crop="none")
    *_, last = cohort(["none", "token-hard"], stripes, train=train, augment=plain).fit()
    assert all(min(record.validation.values()) > 0.8 for record in last), "every head"


def test_a_loss_that_is_not_finite_stops_that_student_alone(stripes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = cohort(["none", "hard"], stripes)
    list(healthy.fit())
    steps = healthy.batches.steps_per_epoch
    monkeypatch.setattr(Student, "backward", poisoned_gradient("none", steps + 1))  # second step, second epoch
    sick = cohort(["none", "hard"], stripes)
    records = list(sick.fit())
    stopped, unharmed = sick.students
    assert stopped.stopped is not None
    assert f"stopped at step {steps + 2}" in stopped.stopped
    assert "learning rate" in stopped.stopped
    assert [record.student for record in records[-1]] == ["hard"]
    assert all(torch.isfinite(value).all() for value in weights(stopped).values())
    assert_equal(weights(unharmed), weights(healthy.students[1]))

    only_first = cohort(["none", "hard"], stripes)
    next(only_first.fit())
    assert_equal(weights(stopped), weights(only_first.students[0]))


def test_a_cohort_whose_students_have_all_stopped_ends(stripes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "backward", poisoned_gradient("none", 0))
    sick = cohort(["none"], stripes)
    views: list[int] = []
    made = sick.make_view
    monkeypatch.setattr(sick, "make_view", lambda *given: views.append(given[2]) or made(*given))
    assert sum(len(records) for records in sick.fit()) == 0
    assert sick.students[0].stopped
    assert views == [0], "no image is read any more"


def test_the_teacher_answers_in_the_micro_batches_that_are_set(stripes: Dataset) -> None:
    view, sizes = torch.rand(10, 3, 8, 8), []

    class Counting(Teacher):
        def forward(self, view: torch.Tensor) -> torch.Tensor:
            sizes.append(len(view))
            return super().forward(view)

    answers = []
    for size in ("auto", None, 4):
        trained = Cohort(
            [student("soft", stripes)], teacher=Counting(), dataset=stripes, augment=AUGMENT, train=TRAIN,
            speed=SpeedRecipe(micro_batch_size=size), precision=CPU_FP32, seed=5,
        )  # fmt: skip
        answers.append(trained.teacher_forward(view))
    assert sizes == [10, 10, 4, 4, 2]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


def out_of_memory(dataset: Dataset, *names: str, **speed: Any) -> str:
    """Return what is said when students run out of memory."""
    chosen = SpeedRecipe(**speed)
    students = [student(name, dataset) for name in names]
    for one in students:
        one.classifier.model.checkpoint_activations = chosen.checkpoint_activations
    sized = [
        Student(one.name, one.method, one.classifier, TRAIN, precision=CPU_FP32, batch_size=16, speed=chosen)
        for one in students
    ]
    trained = Cohort(
        sized, teacher=Teacher(), dataset=dataset, augment=AUGMENT, train=TRAIN, speed=chosen, precision=CPU_FP32,
        seed=5,
    )  # fmt: skip
    trained.train_step = fail  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory) as caught:
        trained.next_step(trained.batches.epoch(0))
    return str(caught.value)


def fail(*_: Any) -> None:
    raise MemoryError


def test_what_is_said_of_full_memory_halves_the_setting_in_use_and_leaves_out_what_cannot_help(
    stripes: Dataset,
) -> None:
    parts = [re.findall(r"speed\.micro_batch_size=(\d+)", out_of_memory(stripes, "none", micro_batch_size=size))
             for size in (None, 64, 16, 8, 2, 1)]  # fmt: skip
    assert parts == [["8"], ["8"], ["8"], ["4"], ["1"], []]
    whole = out_of_memory(stripes, "dist", checkpoint_activations=True)
    assert whole == (
        "out of memory with batches of 16 images: set train.batch_size=8 "
        "(teacher.train.batch_size=8 if the teacher was training)"
    )
    assert "micro_batch_size=2 " in out_of_memory(stripes, "dist", "soft", micro_batch_size=4)
    assert "checkpoint_activations" in out_of_memory(stripes, "dist")
    assert str(OutOfMemory(1, 1)).startswith("out of memory with batches of 1 images: use a smaller model or smaller ")
