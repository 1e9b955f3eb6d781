"""That speed changes nothing else: with every fast path off, training gives the same losses."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CPU_FP32, striped_dataset
from deitkit.errors import OutOfMemory, RecipeError, is_lost_process, is_out_of_memory
from deitkit.models.accelerate import accelerate, compiles_blocks, lacks_compiler
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.teachers.frozen import FrozenTeacher
from deitkit.training.build import build_students
from deitkit.training.cohort import Cohort

CPU = torch.device("cpu")
PLAIN = SpeedRecipe(
    compile=False, cuda_graphs=False, attention="fused", channels_last=False, micro_batch_size=None
)  # fmt: skip


def recipe(*overrides: str) -> Recipe:
    return load_recipe(
        None,
        [
            "model.width=32", "model.depth=2", "model.heads=2", "model.patch_px=4", "train.batch_size=24",
            "methods=[none, soft, hard, token-hard]", "train.epochs=3",
            # A CNN at its usual rate multiplies a rounding a thousandfold in twenty steps.
            "baseline.name=cifar/resnet20", "baseline.learning_rate=0.001",
            "augment.randaugment=2,9", "augment.erase=0.25", "augment.mixup=0.8", *overrides,
        ],
    )  # fmt: skip


@functools.cache
def plain_losses(optimizer: str) -> list[float]:
    return losses(recipe(f"train.optimizer={optimizer}"), PLAIN)


def losses(chosen: Recipe, speed: SpeedRecipe) -> list[float]:
    """Train 24 steps and return the loss of every student in every epoch."""
    chosen = chosen.model_copy(update={"speed": speed})
    data = striped_dataset(per_class=64, image_px=16)
    torch.manual_seed(0)
    teacher = Classifier(CifarResNet(20, classes=3), mean=data.mean, std=data.std)
    cohort = Cohort(
        build_students(chosen, data, 0, CPU_FP32), teacher=FrozenTeacher(accelerate(teacher, speed, CPU)),
        dataset=data, augment=chosen.augment, train=chosen.train,
        speed=speed, precision=CPU_FP32, seed=0,
    )  # fmt: skip
    return [record.train_loss for records in cohort.fit() for record in records]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "fast",
    [
        {},
        {"micro_batch_size": 7},
        {"checkpoint_activations": True},
        {"attention": "plain"},
    ],
)
def test_fast_paths_give_the_same_losses(optimizer: str, fast: dict[str, Any]) -> None:
    plain = plain_losses(optimizer)
    assert len(plain) == 15
    trained = losses(recipe(f"train.optimizer={optimizer}"), SpeedRecipe(**fast))
    assert trained == pytest.approx(plain, rel=2e-3)


def test_fast_paths_give_the_same_losses_with_layer_scale_and_a_stem_of_convolutions() -> None:
    chosen = recipe(
        "model.layer_scale=0.1", "model.stem=conv", "train.optimizer=muon", "train.ema_decay=0.9",
        "train.learning_rate=0.0003",
    )  # fmt: skip
    assert losses(chosen, SpeedRecipe(micro_batch_size=7)) == pytest.approx(losses(chosen, PLAIN), rel=2e-3)


def test_cnns_are_laid_out_with_channels_last_and_answer_the_same() -> None:
    def classifier(speed: SpeedRecipe) -> Classifier:
        torch.manual_seed(0)
        built = Classifier(CifarResNet(20, classes=3), mean=(0.5,) * 3, std=(0.5,) * 3)
        return accelerate(built, speed, CPU).eval()

    fast, plain = classifier(SpeedRecipe()), classifier(PLAIN)
    assert fast.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    view = torch.rand(4, 3, 16, 16)
    assert torch.allclose(fast(view).class_logits, plain(view).class_logits, atol=1e-5)


def test_running_out_of_memory_names_a_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Cohort, "train_step", fail)
    with pytest.raises(OutOfMemory, match=r"batches of 24 images: set speed\.micro_batch_size=12"):
        losses(recipe(), SpeedRecipe())


@pytest.mark.parametrize(
    ("device", "variable", "words"), [("cuda", "CC", "a C compiler"), ("cpu", "CXX", r"a C\+\+ compiler")]
)
def test_blocks_are_compiled_where_a_compiler_is(
    device: str, variable: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = torch.device(device)
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles_blocks(SpeedRecipe(), chosen)
    assert not compiles_blocks(SpeedRecipe(compile=False), chosen)
    with pytest.raises(RecipeError, match=rf"speed\.compile=true needs {words} \(.*\): install it, or drop the field"):
        compiles_blocks(SpeedRecipe(compile=True), chosen)
    monkeypatch.setenv(variable, "/usr/bin/compiler")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert compiles_blocks(SpeedRecipe(), chosen) is (device == "cuda")
    assert compiles_blocks(SpeedRecipe(compile=True), chosen)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert compiles_blocks(SpeedRecipe(compile="auto"), chosen) is False
    assert (lacks_compiler(chosen) or "").startswith("the headers of Python") == (device == "cuda")


def test_of_several_processes_a_part_is_smaller_than_that_of_one() -> None:
    said = str(OutOfMemory(1024, 128))
    assert "batches of 1024 images, 128 of them in this process: set speed.micro_batch_size=64 " in said
    assert "train.batch_size=512" in said


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_a_full_gpu_is_known_by_any_of_its_words(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    later = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    later.__context__ = RuntimeError(text)
    assert is_out_of_memory(later), "while a recording is given up"
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(
    "text", ["ncclRemoteError: A call failed", "[Rank 0] Watchdog caught collective operation timeout"]
)
def test_a_lost_process_is_known_by_ncclss_words_too(text: str) -> None:
    assert is_lost_process(RuntimeError(text))
    assert not is_lost_process(RuntimeError("ncclInvalidUsage"))


def test_other_errors_of_a_step_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Cohort, "train_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        losses(recipe(), SpeedRecipe())


def test_epochs_say_where_their_time_went() -> None:
    chosen = recipe()
    data = striped_dataset()
    cohort = Cohort(
        build_students(chosen, data, 0, CPU_FP32), teacher=None, dataset=data, augment=chosen.augment,
        train=chosen.train,speed=SpeedRecipe(), precision=CPU_FP32, seed=0,
    )  # fmt: skip
    cohort.students = cohort.students[:1]
    shares = next(cohort.fit())[0].shares
    assert set(shares) == {"waiting", "views", "teacher", "students", "optimizers"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert 0.5 < sum(shares.values()) <= 1
    assert shares["students"] > shares["teacher"]
