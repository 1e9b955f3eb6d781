"""Parts of a batch: how large, how many side by side, and that their gradient is the whole batch's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import CPU_FP32
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.vit import DeiT
from deitkit.recipe.schema import SpeedRecipe
from deitkit.system.device import Precision
from deitkit.training.micro_batches import CACHE_BYTES, LEAST_ROWS, Parts, divide

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
def test_a_cpu_takes_parts_that_fit_its_caches_side_by_side() -> None:
    auto = SpeedRecipe()
    size, crew = divide(student(), 128, auto, BF16)
    assert (size, crew) == (32, 2)
    elements = size * student().model.pos_embed.numel()
    assert 2 * elements <= CACHE_BYTES < 4 * elements
    assert divide(student(), 128, auto, CPU_FP32) == (16, 2)
    assert divide(student(), 128, SpeedRecipe(side_by_side=False), BF16) == (64, 1)
    assert divide(student(width=768), 128, auto, BF16)[0] == -(-LEAST_ROWS // 65), "wide students need rows too"


@pytest.mark.usefixtures("two_cores")
def test_small_batches_are_not_divided() -> None:
    assert divide(student(image_px=8, width=30), 64, SpeedRecipe(), CPU_FP32) == (64, 1)


@pytest.mark.usefixtures("two_cores")
def test_who_sees_whole_batches() -> None:
    auto, given = SpeedRecipe(), SpeedRecipe(micro_batch_size=50)
    assert divide(student(), 128, auto, CUDA) == (128, 1)
    assert divide(student(), 128, SpeedRecipe(micro_batch_size=None), BF16) == (128, 1)
    assert divide(student(drop_path=0.1), 128, auto, BF16) == (128, 1)
    assert divide(student(dropout=0.1), 128, given, BF16) == (50, 1)
    assert divide(student(), 128, given, BF16) == (50, 2)
    assert divide(student(), 128, given, CUDA) == (50, 1)
    cnn = Classifier(CifarResNet(20, classes=3), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert divide(cnn, 128, given, BF16) == (128, 1)
    assert divide(student(stem="conv"), 128, given, BF16) == (128, 1), "its BatchNorm must see all images"


def find_terms(classifier: Classifier, images: Tensor, labels: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    assert weight is None
    logits = classifier(images).class_logits
    return {"labels": F.cross_entropy(logits, labels), "size": logits.square().mean()}


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("count", "size"), [(10, 3), (4, 2), (5, 4), (3, 5)])
def test_the_gradient_of_the_parts_is_the_batchs(count: int, size: int) -> None:
    whole, parted = student(8, 30), student(8, 30)
    images, labels = torch.rand(count, 3, 8, 8), torch.arange(count) % 3
    expected = Parts(whole, count, SpeedRecipe(micro_batch_size=None), CPU_FP32).backward(
        find_terms, images, labels, None
    )
    parts = Parts(parted, count, SpeedRecipe(micro_batch_size=size), CPU_FP32)
    assert len(parts.twins) == min(2, -(-count // size))
    terms = parts.backward(find_terms, images, labels, None)
    assert terms == {name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()}
    for mine, other in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("two_cores")
def test_patches_of_two_pixels_come_in_parts_with_the_batchs_gradient() -> None:
    size, crew = divide(student(patch_px=2), 64, SpeedRecipe(), CPU_FP32)
    assert (size, crew) == (5, 2)
    whole, parted = (student(patch_px=2, width=12, layer_scale=0.5) for _ in range(2))
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 3
    Parts(whole, 6, SpeedRecipe(micro_batch_size=None), CPU_FP32).backward(find_terms, images, labels, None)
    Parts(parted, 6, SpeedRecipe(micro_batch_size=2), CPU_FP32).backward(find_terms, images, labels, None)
    for mine, other in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("two_cores")
def test_parts_side_by_side_give_the_same_bits_each_time_and_follow_the_weights() -> None:
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 3
    gradients = []
    for _ in range(3):
        classifier = student(8, 30)
        parts = Parts(classifier, 40, SpeedRecipe(micro_batch_size=7), CPU_FP32)
        for _ in range(3):
            classifier.zero_grad()
            parts.backward(find_terms, images, labels, None)
            torch.optim.SGD(classifier.parameters(), lr=0.1, fused=True).step()
        assert all(weight.grad is None for weight in parts.twins[1].parameters()), "its memory is free between steps"
        assert torch.equal(parts.twins[1].model.head.weight, classifier.model.head.weight)
        gradients.append([weight.grad for weight in classifier.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients[0], other, strict=True))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_cores")
def test_an_error_in_a_part_is_the_steps() -> None:
    def fail(*_: Any) -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    parts = Parts(student(8, 30), 8, SpeedRecipe(micro_batch_size=2), CPU_FP32)
    with pytest.raises(RuntimeError, match="out of memory"):
        parts.backward(fail, torch.rand(8, 3, 8, 8))
