"""Parameter groups, optimizers, the learning rate as a function of the step, and the EMA of weights."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deitkit.errors import RecipeError
from deitkit.models.classifier import Classifier
from deitkit.recipe.schema import OptimizerRecipe, TrainRecipe
from deitkit.system.device import computes_bf16
from deitkit.training.muon import Muon

# Tokens, positions and LayerScale of torchvision's models and of timm's, some of which leave theirs out.
NO_DECAY = ("class_token", "pos_embedding", "relative_position_bias_table", "layer_scale")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group the trainable parameters: decay for matrices and kernels, none for biases, norms, tokens and positions.

    Tokens and positions are those that deitkit's and timm's models name, and those of torchvision's by their names.
    """
    exempt = set(getattr(model, "no_decay", set)()) | set(getattr(model, "no_weight_decay", set)())
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name in exempt or name.rpartition(".")[2] in NO_DECAY
            (kept if is_exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizers(model: nn.Module, recipe: OptimizerRecipe) -> list[Optimizer]:
    """Return the optimizers of a model: one, or Muon for the blocks' matrices and AdamW for the rest.

    Muon's updates are scaled to AdamW's root mean square, so that both share one learning rate.

    Raises:
        RecipeError: The optimizer is Muon and the model is not a transformer.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    device = next(model.parameters()).device
    # A CUDA graph bakes in Python numbers; only a rate in device memory can change between two replays.
    rate = torch.tensor(recipe.learning_rate, device=device) if device.type == "cuda" else recipe.learning_rate
    if recipe.optimizer == "sgd":
        return [SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)]
    if recipe.optimizer == "lamb":
        # Disable LAMB's own clipping, since clip_norm applies to every optimizer.
        from timm.optim import Lamb  # here, since it takes a second to import

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
    adamw = AdamW(groups, lr=rate, betas=(0.9, 0.999), fused=True, capturable=device.type == "cuda")
    adamw._warned_capturable_if_run_uncaptured = True  # the steps before a recording are meant to be uncaptured
    return adamw


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_be_recorded(optimizer: Optimizer) -> bool:
    """Return whether a CUDA graph may replay the step; not for timm's LAMB, which counts steps in Python."""
    return isinstance(optimizer, SGD | AdamW | Muon)


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state: tensors of each parameter, and the steps that LAMB counts by group."""
    whole = optimizer.state_dict()
    return {"parameters": whole["state"], "steps": [group.get("step") for group in whole["param_groups"]]}


def restore_state(optimizer: Optimizer, gathered: dict[str, Any]) -> None:
    """Restore ``gathered_state``; all other values of the groups stay those of this run's recipe and device."""
    groups = optimizer.state_dict()["param_groups"]
    for group, step in zip(groups, gathered["steps"], strict=True):
        group |= {} if step is None else {"step": step}
    optimizer.load_state_dict({"state": gathered["parameters"], "param_groups": groups})
    adopt_layout(optimizer)


def adopt_layout(optimizer: Optimizer) -> None:
    """Give the state the memory layout of the weights, which fused kernels assume and a file does not keep."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def peak_learning_rate(recipe: OptimizerRecipe, train: TrainRecipe) -> float:
    """Return the learning rate after the warm-up: that of the recipe, or in proportion to the images in a step.

    Source of the rule: Goyal et al. 2017; Touvron et al. 2020, section 6, with 512 images. The rates at the start of
    the warm-up and the end of the cosine are not scaled, as in the released code.
    """
    if recipe.learning_rate_per is None:
        return recipe.learning_rate
    return recipe.learning_rate * train.batch_size / recipe.learning_rate_per


def learning_rate(step: int, steps_per_epoch: int, recipe: OptimizerRecipe, train: TrainRecipe) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine down to the minimum.

    Source: Touvron et al. 2020, Table 9; unlike the released code it changes with every step, not with every epoch.

    Args:
        step: Steps done so far, from 0.
        steps_per_epoch: Steps of an epoch.
        recipe: Peak, warm-up and minimum.
        train: The number of epochs of the schedule, and the batch size.
    """
    peak = peak_learning_rate(recipe, train)
    start, end = (min(rate, peak) for rate in (recipe.warmup_learning_rate, recipe.min_learning_rate))  # of small steps
    total = (train.schedule_epochs or train.epochs) * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return start + step / warmup * (peak - start)
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


class ExponentialMovingAverage:
    """A copy of a classifier with averaged weights: shadow += (1 - decay) (weights - shadow).

    The decay is at most (1 + n) / (10 + n) after n updates, so that the initial weights lose their influence in short
    runs too.
    """

    def __init__(self, classifier: Classifier, decay: float) -> None:
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        self.forget()

    def forget(self) -> None:
        """Look for weights and buffers again at the next update, since a module has been replaced."""
        self._of: Classifier | None = None

    @torch.no_grad()
    def update(self, classifier: Classifier) -> None:
        """Update the average by one step; copy buffers (BatchNorm's statistics)."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._of is not classifier:  # walking through the modules takes longer than the update
            self._of, pair = classifier, (self.classifier, classifier)
            self._weights: list[list[Tensor]] = [[*one.parameters()] for one in pair]
            self._buffers = [_places_of_buffers(one) for one in pair]
        shadows, current = self._weights
        torch._foreach_lerp_(shadows, current, 1 - decay)
        shadows, current = ([tensors[name] for tensors, name in places] for places in self._buffers)
        torch._foreach_copy_(shadows, current)


def _places_of_buffers(classifier: Classifier) -> list[tuple[dict[str, Any], str]]:
    """Return where a classifier's modules hold their buffers, which they may replace by other tensors."""
    each = (module._buffers for module in classifier.modules())
    return [(tensors, name) for tensors in each for name, tensor in tensors.items() if tensor is not None]
