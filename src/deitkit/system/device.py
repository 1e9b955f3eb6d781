"""The machine: which device, which precision, how long something took on it, and its description for the record."""

import ctypes
import math
import os
import platform
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from deitkit.errors import RecipeError

MALLOPT_TRIM_THRESHOLD, MALLOPT_TOP_PAD, MALLOPT_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
HEAP_OF_A_THREAD = 2**26  # glibc's HEAP_MAX_SIZE
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def choose_device(name: str) -> torch.device:
    """Return the device of a recipe, and set this process up to work on it.

    ``auto`` is cuda where there is one.

    Raises:
        RecipeError: A cuda that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device=cuda, but no CUDA device is visible: set device=auto or device=cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    _keep_freed_memory()
    return torch.device("cpu")


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those it may run on, and no more than a container grants.

    Torch does not know of a container's quota, and its threads would wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max": no quota
    return cores


def _keep_freed_memory() -> None:
    """Keep what tensors free for the next step: glibc gives it back, and the kernel then clears each page anew."""
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(MALLOPT_MMAP_THRESHOLD, 2**30)
            libc.mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)
            # The memory of a thread comes in heaps. An empty one is given back whatever the threshold, unless less than
            # this is free in the one before it.
            libc.mallopt(MALLOPT_TOP_PAD, HEAP_OF_A_THREAD)


@dataclass(frozen=True)
class Precision:
    """The precision of forward passes on a device; weights and losses stay in float32."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, name: str, device: torch.device) -> "Precision":
        """Return the precision of a recipe: ``auto`` is bf16 where the processor computes with it."""
        bf16 = name == "bf16" or (name == "auto" and computes_bf16(device))
        return cls(device, torch.bfloat16 if bf16 else torch.float32)

    @property
    def name(self) -> str:
        """``bf16`` or ``fp32``."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def computes_bf16(device: torch.device) -> bool:
    """Return whether the processor has instructions for bf16 products; emulated ones are 4 to 400 times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def describe_machine(device: torch.device, precision: Precision) -> dict[str, Any]:
    """Return what a reader of a figure wants to know of the machine."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": precision.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
