"""A trial of the losses of the user's methods before anything trains. Those of deitkit have tests."""

import torch
from torch import Tensor

from deitkit.distillation.methods import Method, Term, find_method, is_shipped
from deitkit.errors import RecipeError, reason_of
from deitkit.models.vit import Output
from deitkit.recipe.schema import DistillationRecipe
from deitkit.system.device import Precision

IMAGES = 4
HALVES = ((slice(0, 2), slice(2, 4)), (slice(0, 4, 2), slice(1, 4, 2)))  # of one kind alone a mean may agree by chance
TOLERANCE = 1e-3  # relative to the loss of a whole batch; a sum in place of a mean differs by half of it


def require_losses(name: str, settings: DistillationRecipe, classes: int, precision: Precision) -> None:
    """Try the loss of a method of the user's on random logits, on the device and in the precisions of a training.

    The teacher's logits are of the student's precision, or, from a cache or the mean of several teachers, in float32.

    Raises:
        RecipeError: It fails, a term is not one number, or a batch's is not the mean of those of its parts.
    """
    method = find_method(name)
    if is_shipped(method):
        return
    try:
        for teacher_dtype in dict.fromkeys((precision.dtype, torch.float32)):
            problem = _problem(method, _Batch(classes, precision.device, precision.dtype, teacher_dtype), settings)
            if problem is not None:
                break
    except Exception as error:  # the user's code may raise any
        problem = f"fails on random logits ({type(error).__name__}: {reason_of(error)}): correct its signals"
        if method.teacher_signal is None:
            problem += '; one that uses the teacher\'s logits is a Signal(..., teacher="soft")'
    if problem is not None:
        raise RecipeError(f"methods: the loss of '{name}' {problem}")


class _Batch:
    """Random logits of a student and a teacher, and targets, as a training has them."""

    def __init__(
        self, classes: int, device: torch.device, dtype: torch.dtype, teacher_dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        class_logits, distillation_logits, teacher_logits = (
            torch.randn(IMAGES, classes, generator=generator).to(device) for _ in range(3)
        )
        self.class_logits = class_logits.to(dtype).requires_grad_()
        self.distillation_logits = distillation_logits.to(dtype).requires_grad_()
        self.teacher_logits = teacher_logits.to(teacher_dtype)
        self.targets = teacher_logits.softmax(dim=-1)

    def value(self, term: Term, settings: DistillationRecipe, part: slice = slice(None)) -> Tensor:
        """Return a term's value for some of the images."""
        output = Output(self.class_logits[part], self.distillation_logits[part])
        return term.value(output, self.teacher_logits[part], self.targets[part], settings)


def _problem(method: Method, batch: _Batch, settings: DistillationRecipe) -> str | None:
    """Return what is wrong with the terms of a method, or None; errors of the user's code pass through."""
    values = [batch.value(term, settings) for term in method.terms]
    for term, value in zip(method.terms, values, strict=True):
        if value.shape != ():
            return f"is not one number: '{term.signal}' returns a tensor of shape {tuple(value.shape)}"
    torch.stack(values).sum().backward()
    if method.needs_whole_batch:
        return None
    exact = _Batch(batch.targets.shape[-1], batch.targets.device, torch.float32)
    for term in method.terms:
        whole = exact.value(term, settings).detach()
        means = [torch.stack([exact.value(term, settings, half) for half in halves]).mean() for halves in HALVES]
        # One that draws random numbers, or counts its calls, differs from itself.
        repeats = torch.isclose(exact.value(term, settings), whole, rtol=TOLERANCE)
        for mean in means:
            if repeats and not torch.isclose(mean, whole, rtol=TOLERANCE, atol=1e-5):
                return (
                    f"is not a mean over images, so that it depends on the parts in which a batch is computed: "
                    f"'{term.signal}' is {float(whole):.4g} of {IMAGES} random ones, and {float(mean.detach()):.4g} on "
                    "average of their halves: divide by the number of images, or, if it relates them, set "
                    "whole_batch=True in its Signal"
                )
    return None
