"""Muon for a transformer's matrices, batched over all matrices of one shape.

Not torch's or timm's, because these process matrices one by one (20 ms of launches per step on an H100, where a
DeiT-Ti's forward and backward pass takes 6 ms), always compute in bf16 (which a processor without it emulates at a
four-hundredth of its speed) and read the learning rate back, which a CUDA graph cannot record.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


class Muon(Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), scaled to AdamW's root mean square.

    Up to rounding, equal to ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` and Nesterov momentum: the
    update is 0.2 sqrt(max(rows, columns)) times the orthogonal matrix (Liu et al. 2025, section 2.2), weight decay is
    decoupled.

    Args:
        matrices: Two-dimensional parameters.
        lr: Learning rate; a tensor on their device is used without reading it back.
        weight_decay: Weights shrink by ``lr * weight_decay`` of their value in a step.
        momentum: Of the average of the gradient.
        dtype: Precision of the matrix products; the rest is in that of the parameters.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float | Tensor,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        assert all(matrix.ndim == 2 for group in self.param_groups for matrix in group["params"])
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages = [self._average(matrix) for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        step = orthogonalise(ahead.to(self.dtype)).to(ahead.dtype)
        step *= -0.2 * max(step.shape[-2:]) ** 0.5 * group["lr"]
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(step.unbind()))

    def _average(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average: Tensor = state["momentum_buffer"]
        return average


def orthogonalise(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Return matrices with the same singular vectors and singular values near 1 (between about 0.7 and 1.2).

    Five steps of the quintic Newton-Schulz iteration of Jordan et al. 2024, in the matrices' precision.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
