"""Clocks, counters and limits of measurements, for ``training_speed`` and ``inference_speed``."""

import copy
import resource
import sys

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deitkit.models.vit import Attention, Output
from deitkit.system.device import Precision, computes_bf16
from deitkit.system.timer import time_in_turn

# Side of the square matrices whose product measures the peak speed of the machine: large enough to be limited by
# arithmetic, small enough to take about a second.
CPU_SIDE, GPU_SIDE = 2048, 8192


def machine_limit(precision: Precision) -> float:
    """Return the FLOP/s of a large matrix product on random numbers, a practical upper bound for training."""
    device = precision.device
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    if precision.name == "bf16" and device.type == "cpu" and not computes_bf16(precision.device):
        side = 256  # emulated
    left, right = (torch.randn(side, side, device=device).to(precision.dtype) for _ in range(2))
    taken = time_in_turn({"product": lambda: left @ right}, device=device, repeats=5, calls=3)["product"]
    return 2 * side**3 / taken.median


def count_flops(model: nn.Module, image_shape: tuple[int, ...], *, backward: bool) -> int:
    """Return the floating-point operations per image, with or without the backward pass; a multiply-add counts as two.

    As usual, matrix products, convolutions and attention count. The model runs on the meta device, without computing.
    """
    meta_model = _on_meta(model)
    images = torch.empty(2, *image_shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = meta_model(images)
        heads = _heads(output)
        if backward:
            torch.stack([head.sum() for head in heads]).sum().backward()
    return int(counter.get_total_flops()) // 2


def _on_meta(model: nn.Module) -> nn.Module:
    meta_model = copy.deepcopy(model).to("meta")
    for module in meta_model.modules():
        if isinstance(module, Attention):
            module.kernel = "plain"
        elif hasattr(module, "fused_attn"):  # timm's
            module.fused_attn = False  # type: ignore[assignment]
    return meta_model


def _heads(output: Output | Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    if not isinstance(output, Output):
        return [output] if isinstance(output, Tensor) else list(output)
    return [head for head in (output.class_logits, output.distillation_logits) if head is not None]


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory of a CUDA device; that of a process on a CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of the tensors on a CUDA device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
