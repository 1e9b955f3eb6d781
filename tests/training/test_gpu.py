"""What only a CUDA device shows: that a step waits for nothing, and that replayed and compiled steps train the same."""

import itertools
import warnings

import pytest
import torch

from conftest import striped_dataset
from deitkit.models.accelerate import accelerate
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.metrics import EpochMetrics
from deitkit.system.device import Precision
from deitkit.system.ranks import ALONE
from deitkit.teachers.frozen import FrozenTeacher
from deitkit.teachers.prepare import teacher_cohort, teacher_student
from deitkit.training.build import build_students
from deitkit.training.cohort import Cohort
from deitkit.training.cuda_graph import WARM_UP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
FAST_OFF = (
    "speed.compile=false", "speed.cuda_graphs=false", "speed.channels_last=false", "speed.attention=plain",
)  # fmt: skip


def recipe(*overrides: str) -> Recipe:
    return load_recipe(
        None,
        [
            "model.width=64", "model.depth=2", "model.heads=2", "model.patch_px=4", "train.batch_size=32",
            "methods=[none, soft, hard, token-hard]", "train.epochs=8", "train.precision=fp32", "train.ema_decay=0.9",
            "train.clip_norm=1", "augment.randaugment=2,9", "augment.erase=0.25", "augment.mixup=0.8",
            "augment.cutmix=1", "device=cuda", *overrides,
        ],
    )  # fmt: skip


def cohort(chosen: Recipe) -> Cohort:
    data = striped_dataset(per_class=64, image_px=16)
    precision = Precision.choose(chosen.train.precision, DEVICE)
    torch.manual_seed(0)
    teacher = Classifier(CifarResNet(20, classes=3), mean=data.mean, std=data.std)
    return Cohort(
        build_students(chosen, data, 0, precision),
        teacher=FrozenTeacher(accelerate(teacher, chosen.speed, precision.device)),
        dataset=data, augment=chosen.augment, train=chosen.train,
        speed=chosen.speed, precision=precision, seed=0,
    )  # fmt: skip


def cnn_cohort(chosen: Recipe) -> Cohort:
    """Return a teacher in its own training: BatchNorm, SGD, and labels alone."""
    data = striped_dataset(per_class=64, image_px=16)
    precision = Precision.choose(chosen.train.precision, DEVICE)
    torch.manual_seed(0)
    classifier = Classifier(CifarResNet(20, classes=3), mean=data.mean, std=data.std)
    accelerate(classifier, chosen.speed, DEVICE)
    student = teacher_student("teacher", classifier, chosen.teacher, precision)
    return teacher_cohort(student, chosen, data, precision, ALONE)


def losses(trained: Cohort) -> list[EpochMetrics]:
    return [record for records in trained.fit() for record in records]


def assert_same_losses(fast: list[EpochMetrics], plain: list[EpochMetrics], tolerance: float) -> None:
    assert len(fast) == len(plain) > 0
    for one, other in zip(fast, plain, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=tolerance, abs=tolerance / 2)
    # Six steps an epoch: most were replayed.
    assert fast[0].step is not None
    assert fast[0].step > WARM_UP


def test_blocks_are_compiled_by_default() -> None:
    for student in cohort(recipe()).students:
        assert all(block._compiled_call_impl is not None for block in student.classifier.model.blocks)


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        (["train.optimizer=adamw"], 0.02),
        (["train.optimizer=muon"], 0.02),
        (["train.optimizer=lamb"], 0.02),
        (["train.optimizer=sgd"], 0.02),
        (["train.optimizer=muon", "train.precision=bf16"], 0.05),
        (["train.optimizer=adamw", "speed.micro_batch_size=8"], 0.02),
    ],
    ids=str,
)
def test_fast_steps_train_as_plain_ones(fields: list[str], tolerance: float) -> None:
    fast, plain = (losses(cohort(recipe(*fields, *more))) for more in ((), FAST_OFF))
    assert_same_losses(fast, plain, tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fast_step_of_a_cnn_trains_as_a_plain_one(precision: str) -> None:
    chosen = ("teacher.train.epochs=8", "teacher.train.batch_size=32", "teacher.train.learning_rate=0.005",
              f"train.precision={precision}")  # fmt: skip
    fast, plain = (losses(cnn_cohort(recipe(*chosen, *more))) for more in ((), FAST_OFF))
    assert_same_losses(fast, plain, 0.02 if precision == "fp32" else 0.1)


def test_a_saved_training_goes_on_as_one_that_was_never_saved() -> None:
    whole = losses(cohort(recipe()))
    begun = cohort(recipe())
    first = [record for records in itertools.islice(begun.fit(), 3) for record in records]
    again = cohort(recipe())
    again.load_state_dict(begun.state_dict())
    assert_same_losses([*first, *losses(again)], whole, 0.02)


def test_a_step_waits_for_nothing() -> None:
    trained = cohort(recipe())
    for student in trained.students:
        student.classifier.train()
    batches = trained.batches.epoch(0)
    for _ in range(WARM_UP + 1):
        trained.next_step(batches)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        trained.next_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replayed_student_follows_its_learning_rate_and_its_dropout() -> None:
    chosen = recipe("model.dropout=0.2", "model.drop_path=0.1", "methods=[none]", "train.warmup_epochs=2")
    first, second = losses(cohort(chosen)), losses(cohort(chosen))
    assert [record.train_loss for record in first] == [record.train_loss for record in second]
    still = losses(cohort(recipe("methods=[none]", "train.learning_rate=1e-12", "train.warmup_learning_rate=0")))
    assert still[-1].train_loss is not None
    assert first[-1].train_loss is not None
    assert still[-1].train_loss > first[-1].train_loss


def test_students_share_the_memory_of_their_activations() -> None:
    def peak(methods: str) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        chosen = recipe(f"methods={methods}", "train.batch_size=128", "train.ema_decay=null", "speed.compile=false")
        list(cohort(chosen).fit())
        return torch.cuda.max_memory_allocated() - before

    one, four = peak("[none]"), peak("[none, soft, hard, token-hard]")
    assert four < 2 * one
