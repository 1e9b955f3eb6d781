"""What this process asks of the libraries that it loads and of the system's memory. Importing deitkit changes nothing.

The command line calls ``configure_process`` first. A program that uses deitkit as a library may do so too, before it
imports torch: training on a CPU is then as fast as from the command line, and considerate of other processes.
"""

import ctypes
import math
import os
import platform
from contextlib import suppress
from pathlib import Path

# Variables by which a user sets how threads wait: GNU's OpenMP, any OpenMP, Intel's and LLVM's.
WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SPIN_COUNT = 2_000
MALLOPT_TRIM_THRESHOLD, MALLOPT_TOP_PAD, MALLOPT_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
HEAP_OF_A_THREAD = 2**26  # glibc's HEAP_MAX_SIZE
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def configure_process() -> None:
    """Set up threads and memory of this process for training on a CPU; what the user has set stays.

    Environment variables have an effect only before torch is imported. docs/benchmarks.md has the measurements.
    """
    # GNU's OpenMP, with which torch is built for Linux, turns in a loop of 300,000 rounds at each barrier before it
    # sleeps. Beside another busy process it thereby keeps a core from the thread that it waits for.
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    # Tensors of 2 MiB and more lie on large pages, where Linux has them: a CPU looks up fewer addresses.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Torch does not see a container's quota: more threads than it grants would wait for each other.
    if usable_cores() < visible_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    _keep_freed_memory()


def visible_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those it may run on, and no more than a container grants."""
    cores = visible_cores()
    with suppress(OSError, ValueError):
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max": no quota
    return cores


def _keep_freed_memory() -> None:
    """Keep what tensors free for the next step: glibc returns it, and the kernel then clears each page anew."""
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(MALLOPT_MMAP_THRESHOLD, 2**30)
            libc.mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)
            # The memory of a thread comes in heaps. An empty one is given back whatever the threshold, unless less than
            # this is free in the one before it.
            libc.mallopt(MALLOPT_TOP_PAD, HEAP_OF_A_THREAD)
