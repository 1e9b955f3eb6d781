"""How weights move: parameter groups, optimizers, the learning rate as a function of the step, and the EMA."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deitkit.errors import RecipeError
from deitkit.models.classifier import Classifier
from deitkit.recipe.schema import OptimizerRecipe, TrainRecipe
from deitkit.system.device import computes_bf16
from deitkit.training.muon import Muon


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters: decay for matrices and kernels, none for biases, norms, tokens and positions."""
    exempt: set[str] = getattr(model, "no_decay", set)()
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizers(model: nn.Module, recipe: OptimizerRecipe) -> list[Optimizer]:
    """Return the optimizers of a model: one, or Muon for the blocks' matrices beside AdamW for the rest.

    Muon's updates are scaled to AdamW's root mean square, so that both share one learning rate.

    Raises:
        RecipeError: Muon for a model that is no transformer.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    device = next(model.parameters()).device
    # A CUDA graph replays what it was shown; only a rate that lies on the device can change between two replays.
    rate = torch.tensor(recipe.learning_rate, device=device) if device.type == "cuda" else recipe.learning_rate
    if recipe.optimizer == "sgd":
        return [SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)]
    if recipe.optimizer == "lamb":
        # What it clips by itself stays whole: clip_norm is there for every optimizer.
        return [Lamb(groups, lr=recipe.learning_rate, max_grad_norm=None)]
    if recipe.optimizer == "adamw":
        return [_adamw(groups, rate, device)]
    block_matrices: Callable[[], list[nn.Parameter]] | None = getattr(model, "block_matrices", None)
    if block_matrices is None:
        raise RecipeError("optimizer=muon trains the students only: choose sgd, adamw or lamb for a CNN")
    matrices = block_matrices()
    chosen = {id(matrix) for matrix in matrices}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]  # type: ignore[attr-defined]
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    return [Muon(matrices, lr=rate, weight_decay=recipe.weight_decay, dtype=dtype), _adamw(groups, rate, device)]


def _adamw(groups: list[dict[str, object]], rate: float | Tensor, device: torch.device) -> AdamW:
    return AdamW(groups, lr=rate, betas=(0.9, 0.999), fused=True, capturable=device.type == "cuda")


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_be_recorded(optimizer: Optimizer) -> bool:
    """Return whether a CUDA graph may replay its step: timm's LAMB counts steps in Python, and would stand still."""
    return not isinstance(optimizer, Lamb)


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer has gathered: tensors of each parameter, and the steps that LAMB counts by group."""
    whole = optimizer.state_dict()
    return {"parameters": whole["state"], "steps": [group.get("step") for group in whole["param_groups"]]}


def restore_state(optimizer: Optimizer, gathered: dict[str, Any]) -> None:
    """Continue from ``gathered_state``; all else of the groups is this run's: its recipe's and its device's."""
    groups = optimizer.state_dict()["param_groups"]
    for group, step in zip(groups, gathered["steps"], strict=True):
        group |= {} if step is None else {"step": step}
    optimizer.load_state_dict({"state": gathered["parameters"], "param_groups": groups})
    adopt_layout(optimizer)


def adopt_layout(optimizer: Optimizer) -> None:
    """Lay the state out in memory as the weights are: a file keeps no layout, and fused kernels take it for granted."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def peak_learning_rate(recipe: OptimizerRecipe, train: TrainRecipe) -> float:
    """Return the learning rate after the warm-up: as written, or in proportion to the images in a step.

    Source of the rule: Goyal et al. 2017; Touvron et al. 2020, section 6, with 512 images. Where the warm-up starts and
    where the cosine ends are not scaled, as in the released code.
    """
    if recipe.learning_rate_per is None:
        return recipe.learning_rate
    return recipe.learning_rate * train.batch_size / recipe.learning_rate_per


def learning_rate(step: int, steps_per_epoch: int, recipe: OptimizerRecipe, train: TrainRecipe) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine down to the floor.

    Source: Touvron et al. 2020, Table 9; unlike the released code it moves with every step, not with every epoch.

    Args:
        step: Steps done so far, from 0.
        steps_per_epoch: Steps of an epoch.
        recipe: Peak, warm-up and floor.
        train: The number of epochs that the schedule is laid out for, and the batch size.
    """
    peak = peak_learning_rate(recipe, train)
    total = (train.schedule_epochs or train.epochs) * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        share = step / warmup
        return recipe.warmup_learning_rate + share * (peak - recipe.warmup_learning_rate)
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return recipe.min_learning_rate + (peak - recipe.min_learning_rate) * (1 + math.cos(math.pi * share)) / 2


class ExponentialMovingAverage:
    """A second copy of a classifier whose weights follow the first: shadow += (1 - decay) (weights - shadow).

    Early on the decay is (1 + n) / (10 + n) after n updates, where that is smaller, so that the initial weights are
    forgotten in short runs too.
    """

    def __init__(self, classifier: Classifier, decay: float) -> None:
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, classifier: Classifier) -> None:
        """Follow the classifier by one step; buffers (BatchNorm's statistics) are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.classifier.parameters()), list(classifier.parameters()), 1 - decay)
        for shadow, buffer in zip(self.classifier.buffers(), classifier.buffers(), strict=True):
            shadow.copy_(buffer)
