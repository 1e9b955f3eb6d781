"""The losses of the user's methods are tried before anything trains."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import CPU_FP32
from deitkit.distillation.methods import METHODS, SIGNALS, Method, Signal, Term
from deitkit.distillation.trial import require_losses
from deitkit.errors import RecipeError
from deitkit.recipe.schema import DistillationRecipe
from deitkit.system.device import Precision

SETTINGS = DistillationRecipe()
CPU_BF16 = Precision(torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function: a signal -> what is said against a method with it; empty if it can train."""

    def tried(
        signal: Signal, head: str = "class", tokens: tuple[str, ...] = (), precision: Precision = CPU_FP32
    ) -> str:
        monkeypatch.setitem(SIGNALS, "odd", signal)
        term = Term(head, "odd", lambda settings: 1.0)
        monkeypatch.setitem(METHODS, "mine", Method("mine", tokens, (term,), "mine", "mine"))
        try:
            require_losses("mine", SETTINGS, 5, precision)
        except RecipeError as error:
            return str(error)
        return ""

    return tried


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda logits, teacher, targets, settings: logits - teacher, "is not one number: 'odd' returns a tensor of"),
        (
            lambda logits, teacher, targets, settings: logits.mean()[None],
            "is not one number: 'odd' returns a tensor of",
        ),
        (lambda logits, teacher, targets: logits.mean(), "fails on random logits (TypeError: "),
        (lambda logits, teacher, targets, settings: logits.detach().mean(), "fails on random logits (RuntimeError: "),
    ],
)
def test_a_loss_that_fails_is_told_before_anything_trains(refusal: Callable[..., str], loss: Any, said: str) -> None:
    for head, tokens in (("class", ()), ("distillation", ("distillation",))):
        assert f"methods: the loss of 'mine' {said}" in refusal(Signal(loss, "soft"), head, tokens)


def squared(logits: Tensor, teacher: Tensor, targets: Tensor, settings: Any) -> Tensor:
    return (logits.float() - teacher.float()).square().mean()


def test_a_signal_that_uses_the_teacher_must_say_so(refusal: Callable[..., str]) -> None:
    assert refusal(Signal(squared)).endswith('one that uses the teacher\'s logits is a Signal(..., teacher="soft")')
    assert refusal(Signal(squared, "soft")) == ""


@pytest.mark.parametrize("precision", [CPU_FP32, CPU_BF16], ids=lambda one: one.name)
@pytest.mark.parametrize("name", METHODS)
def test_the_losses_of_deitkit_would_pass(name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", replace(METHODS[name], name="mine"))
    require_losses("mine", SETTINGS, 5, precision)


def summed(logits: Tensor, teacher: Any, targets: Tensor, settings: Any) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@pytest.mark.parametrize("loss", [summed, SIGNALS["dist"].loss], ids=["sum", "relations"])
def test_a_loss_that_is_no_mean_over_images_is_refused_unless_batches_stay_whole(
    refusal: Callable[..., str], loss: Any
) -> None:
    said = refusal(Signal(loss, "soft"))
    assert "is not a mean over images" in said
    assert "divide by the number of images, or, if it relates them, set whole_batch=True in its Signal" in said
    assert refusal(Signal(loss, "soft", whole_batch=True)) == ""


def test_a_loss_that_differs_from_itself_is_not_compared(refusal: Callable[..., str]) -> None:
    """It draws random numbers, or counts its calls, and so differs between a batch and its halves too."""
    calls: list[Tensor] = []

    def grows(logits: Tensor, teacher: Any, targets: Tensor, settings: Any) -> Tensor:
        calls.append(logits)
        return len(calls) * F.cross_entropy(logits.float(), targets)

    assert refusal(Signal(grows)) == ""


def test_a_loss_meets_the_precisions_of_a_training(refusal: Callable[..., str]) -> None:
    met = set()

    def watching(logits: Tensor, teacher: Tensor, targets: Tensor, settings: Any) -> Tensor:
        met.add((logits.dtype, teacher.dtype, targets.dtype))
        return squared(logits, teacher, targets, settings)

    assert refusal(Signal(watching, "soft"), precision=CPU_BF16) == ""
    bf16, fp32 = torch.bfloat16, torch.float32
    assert met == {(bf16, bf16, fp32), (bf16, fp32, fp32), (fp32, fp32, fp32)}
    mixed = Signal(lambda logits, teacher, targets, settings: (logits @ teacher.T).mean(), "soft", whole_batch=True)
    assert refusal(mixed) == ""
    assert "fails on random logits (RuntimeError" in refusal(mixed, precision=CPU_BF16)
