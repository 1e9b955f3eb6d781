"""A step on a device that is not here: nothing there is float64 (Apple's GPUs have none), and no value is read back.

Tensors of the ``meta`` device have shapes without values, so that reading one back fails; the mode below refuses
float64.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import striped_dataset
from deitkit.data.augment import operations
from deitkit.data.augment.augment import Augment
from deitkit.data.augment.mix import Mix
from deitkit.distillation.methods import METHODS
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import AugmentRecipe
from deitkit.system.device import Precision
from deitkit.training.build import build_students

META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device, and copies to it that do not wait: Apple's may read freed memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("non_blocking"):
            raise TypeError(f"a copy that does not wait: {func}")
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.device == META and value.dtype == torch.float64:
                raise TypeError(f"float64 on the device: {func}")
        return made


@pytest.fixture(autouse=True)
def _like_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "WITHOUT_FLOAT64", ("mps", "meta"))


@pytest.mark.parametrize(
    "fields",
    [
        {"crop": "pad"},
        {"crop": "random-resized"},
        {"crop": "simple"},
        {"randaugment": "2,9"},
        {"randaugment": "rand-m9-mstd0.5-inc1"},
        {"autoaugment": "cifar10"},
        {"three_augment": True, "colour_jitter": 0.3},
        {"erase": 1.0},
    ],
)
def test_views_are_made_without_float64_and_without_waiting(fields: dict[str, Any]) -> None:
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8, device=META)
    augment = Augment(AugmentRecipe.model_validate(fields), (0.5,) * 3, (0.2,) * 3)
    mix = Mix(AugmentRecipe(mixup=0.8, cutmix=1.0), 10, 0.1)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        with NoFloat64():
            view, targets = mix(augment(images, generator), torch.zeros(16, dtype=torch.int64, device=META), generator)
        assert (view.device, view.dtype, targets.dtype) == (META, torch.float32, torch.float32)


def test_the_mode_finds_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "WITHOUT_FLOAT64", ("mps",))
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8, device=META)
    augment = Augment(AugmentRecipe(randaugment="2,9"), (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(TypeError, match="float64 on the device"), NoFloat64():
        augment(images, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_student_learns_without_float64_and_without_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Precision, "autocast", lambda _: nullcontext())  # which torch lacks for this device
    data = striped_dataset()
    recipe = load_recipe("digits", [f"methods=[{name}]", "train.batch_size=4", "train.optimizer=sgd"])
    (student,) = build_students(recipe, data, 0, Precision(META, torch.float32))
    height, width = data.image_px
    view = torch.rand(4, data.channels, height, width, device=META)
    targets = torch.rand(4, data.classes, device=META)
    logits = torch.rand(4, data.classes, device=META) if student.method.teacher_signal else None
    with NoFloat64():
        terms = student.backward(view, targets, logits)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(value.grad is not None for value in student.classifier.parameters())
