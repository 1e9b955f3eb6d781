"""Device, precision, and the description of the machine that is stored with results."""

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from deitkit.errors import RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.system.process import usable_cores


def choose_device(name: str) -> torch.device:
    """Return the device of a recipe; ``auto`` is cuda where available, else the CPU.

    Apple's and Intel's GPUs (``mps``, ``xpu``) have to be asked for, since nothing was measured on them.

    Raises:
        RecipeError: ``name`` is that of a device that is not visible.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        name = "cuda" if found is not None and found.type == "cuda" else "cpu"
    if name != "cpu" and (found is None or found.type != name):
        instead = "none is" if found is None else f"{found.type} is"
        kind = {"cuda": "CUDA device", "mps": "GPU of Apple", "xpu": "GPU of Intel"}[name]
        raise RecipeError(f"device={name}, but no {kind} is visible ({instead}): set device=auto or device=cpu")
    return torch.device(name)


@dataclass(frozen=True)
class Precision:
    """The precision of forward passes on a device; weights and losses stay in float32."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, name: str, device: torch.device) -> "Precision":
        """Return the precision of a recipe; ``auto`` is bf16 where the processor has instructions for it."""
        bf16 = name == "bf16" or (name == "auto" and computes_bf16(device))
        return cls(device, torch.bfloat16 if bf16 else torch.float32)

    @classmethod
    def of(cls, recipe: Recipe) -> "Precision":
        """Return the precision of a recipe on its device; raise RecipeError if that device is not visible."""
        return cls.choose(recipe.train.precision, choose_device(recipe.device))

    @classmethod
    def here(cls, recipe: Recipe) -> "Precision":
        """Return the precision of a finished run's recipe, on another device if its own is not visible here."""
        try:
            return cls.of(recipe)
        except RecipeError:
            return cls.choose(recipe.train.precision, choose_device("auto"))

    @property
    def name(self) -> str:
        """``bf16`` or ``fp32``."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; on CUDA without waiting, where the copy is safe even if the tensor is then freed.

    On MPS such a copy may read memory that has been given to another tensor (pytorch#139550).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def computes_bf16(device: torch.device) -> bool:
    """Return whether the processor has instructions for bf16 products; emulated ones are 4 to 400 times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False  # not measured to be faster
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def describe_machine(precision: Precision) -> dict[str, Any]:
    """Return the hardware and software on which a figure was measured."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": _device_name(precision.device),
        "precision": precision.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return torch.xpu.get_device_name() if device.type == "xpu" else device.type


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
