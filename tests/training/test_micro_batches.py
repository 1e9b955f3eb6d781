"""Micro-batches: how large they are, and that their gradient is the whole batch's."""

from typing import Any

import pytest
import torch

from conftest import CPU_FP32
from deitkit.distillation.methods import METHODS
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.vit import DeiT
from deitkit.recipe.schema import TrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.system.device import Precision
from deitkit.training.micro_batches import CACHE_BYTES, LEAST_ROWS, choose_micro_batch_size, has_batch_norm
from deitkit.training.student import Student

BF16 = Precision(torch.device("cpu"), torch.bfloat16)
CUDA = Precision(torch.device("cuda"), torch.bfloat16)


def student(image_px: int = 32, width: int = 192, **options: Any) -> Classifier:
    torch.manual_seed(0)
    model = DeiT(**{
        "image_px": image_px, "patch_px": 4, "channels": 3, "classes": 3, "width": width, "depth": 2, "heads": 3,
        "tokens": ("class",), **options,
    })  # fmt: skip
    return Classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def two_cores() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_cores")
def test_on_a_cpu_they_fit_its_caches() -> None:
    auto = SpeedRecipe()
    size = choose_micro_batch_size(student(), 128, auto, BF16)
    assert size == 64
    elements = size * student().model.pos_embed.numel()
    assert 2 * elements <= 2 * CACHE_BYTES < 4 * elements
    assert choose_micro_batch_size(student(), 128, auto, CPU_FP32) == 32
    wide = student(width=1536)
    assert choose_micro_batch_size(wide, 128, auto, BF16) == 16 == -(-LEAST_ROWS // 65), "products need rows too"


@pytest.mark.usefixtures("two_cores")
def test_small_batches_are_not_divided() -> None:
    assert choose_micro_batch_size(student(image_px=8, width=30), 64, SpeedRecipe(), CPU_FP32) == 64


@pytest.mark.usefixtures("two_cores")
def test_who_sees_whole_batches() -> None:
    auto, given = SpeedRecipe(), SpeedRecipe(micro_batch_size=50)
    assert choose_micro_batch_size(student(), 128, auto, CUDA) == 128
    assert choose_micro_batch_size(student(), 128, SpeedRecipe(micro_batch_size=None), BF16) == 128
    assert choose_micro_batch_size(student(), 128, given, BF16, whole_batch=True) == 128
    assert choose_micro_batch_size(student(drop_path=0.1), 128, auto, BF16) == 128
    assert choose_micro_batch_size(student(dropout=0.1), 128, given, BF16) == 50
    assert choose_micro_batch_size(student(), 128, given, BF16) == 50
    assert choose_micro_batch_size(student(), 128, given, CUDA) == 50
    cnn = Classifier(CifarResNet(20, classes=3), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert choose_micro_batch_size(cnn, 128, given, BF16) == 128
    assert choose_micro_batch_size(student(stem="conv"), 128, given, BF16) == 128, "its BatchNorm must see all images"


def trained(classifier: Classifier, method: str, batch_size: int, speed: SpeedRecipe) -> Student:
    return Student(
        method, METHODS[method], classifier, TrainRecipe(), precision=CPU_FP32, batch_size=batch_size, speed=speed
    )


@pytest.mark.parametrize(("count", "size"), [(10, 3), (4, 2), (5, 4), (3, 5)])
@pytest.mark.parametrize("method", ["none", "soft", "hard", "dkd"])
def test_the_gradient_of_the_micro_batches_is_the_batchs(count: int, size: int, method: str) -> None:
    images, targets = torch.rand(count, 3, 8, 8), torch.rand(count, 3).softmax(dim=-1)
    logits = None if method == "none" else torch.randn(count, 3)
    whole = trained(student(8, 30), method, count, SpeedRecipe(micro_batch_size=None))
    parted = trained(student(8, 30), method, count, SpeedRecipe(micro_batch_size=size))
    assert parted.micro_batch_size == min(size, count)
    expected, terms = (one.backward(images, targets, logits) for one in (whole, parted))
    assert terms == {name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()}
    for mine, other in zip(whole.classifier.parameters(), parted.classifier.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    parted.backward(images, targets, logits)
    for mine, other in zip(whole.classifier.parameters(), parted.classifier.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg="an old gradient was left")


def test_patches_of_two_pixels_have_the_batchs_gradient() -> None:
    assert choose_micro_batch_size(student(patch_px=2), 64, SpeedRecipe(), CPU_FP32) < 64
    images, targets = torch.rand(6, 3, 32, 32), torch.rand(6, 3).softmax(dim=-1)
    small = [student(patch_px=2, width=12, layer_scale=0.5) for _ in range(2)]
    whole, parted = (
        trained(one, "none", 6, SpeedRecipe(micro_batch_size=size)) for one, size in zip(small, (None, 2), strict=True)
    )
    whole.backward(images, targets, None)
    parted.backward(images, targets, None)
    for mine, other in zip(whole.classifier.parameters(), parted.classifier.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d])
def test_every_batch_norm_relates_the_images_of_a_batch(norm: Any) -> None:
    assert has_batch_norm(torch.nn.Sequential(torch.nn.Linear(2, 2), norm(2)))
    assert not has_batch_norm(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2)))
