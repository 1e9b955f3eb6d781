"""Settings of this process: threads of the libraries and memory allocation. Importing deitkit changes none of them.

The command line calls ``configure_process`` first. A program that uses deitkit as a library may call it too, before it
imports torch: training on a CPU is then as fast as from the command line, and leaves the cores to other processes.
"""

import ctypes
import math
import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

MISTAKE = 2  # the exit code of a user's mistake
TEMPORARY_FAILURE = 75  # of sysexits.h: the same command may succeed
# Variables by which a user sets how threads wait: GNU's OpenMP, any OpenMP, Intel's and LLVM's.
WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SPIN_COUNT = 2_000
MALLOPT_TRIM_THRESHOLD, MALLOPT_TOP_PAD, MALLOPT_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
HEAP_OF_A_THREAD = 2**26  # glibc's HEAP_MAX_SIZE
UNITS_HERE = "DEITKIT_UNITS_HERE"  # how many units run side by side on this machine
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENDS_WITH_PARENT = "DEITKIT_ENDS_WITH_PARENT"  # for the units of a comparison: the process that started them
TORCHRUN = "TORCHELASTIC_"  # how the names of torchrun's other variables begin
OWN_THREADS = "DEITKIT_OWN_THREADS"  # the value of OMP_NUM_THREADS where it is not the user's, but was set here
PR_SET_PDEATHSIG = 1  # Linux's prctl.h
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def configure_process() -> None:
    """Set up threads and memory of this process for training on a CPU; settings of the user are kept.

    Environment variables take effect only before torch is imported. Measurements: docs/benchmarks.md.
    """
    # GNU's OpenMP, with which torch is built for Linux, spins for 300,000 rounds at each barrier before it sleeps.
    # If another process is busy, it thereby occupies the core that the awaited thread needs.
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    # Place tensors of 2 MiB and more on large pages where Linux has them: fewer address translations.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _set_threads()
    _keep_freed_memory()
    if were_launched():
        end_with_parent()


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the block ends.

    For libraries that turn what a signal's handler raises into an error of their own, which reads as a damaged file.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread() or None in handlers.values():
        yield  # handlers run in the main thread alone; None is one that Python cannot restore
        return
    held: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def were_started() -> bool:
    """Return whether torchrun started this process together with others."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    return os.environ.get("WORLD_SIZE", "1") != "1" and all(name in os.environ for name in names)


def were_launched() -> bool:
    """Return whether torchrun, alone or with others, or a comparison as one of its units started this process."""
    return were_started() or f"{TORCHRUN}RUN_ID" in os.environ or ENDS_WITH_PARENT in os.environ


def was_restarted() -> bool:
    """Return whether torchrun started this process again after one of the run was lost (``--max-restarts``)."""
    return os.environ.get(f"{TORCHRUN}RESTART_COUNT", "0") != "0"


def processes_here() -> int:
    """Return how many processes share this machine's cores and memory: those of torchrun, and units side by side."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if were_started() else 1
    return local * max(1, int(os.environ.get(UNITS_HERE, "1")))


def visible_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those it may run on, at most the quota of the container."""
    cores = visible_cores()
    with suppress(OSError, ValueError):
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max": no quota
    return cores


def _set_threads() -> None:
    """Set the threads of this process where neither the user nor torch does so well; before torch is imported."""
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < visible_cores():
        # Torch ignores a container's quota: more threads than it grants would wait for each other.
        _set_own_threads(usable_cores())
    elif were_started() and not _torchrun_was_given("OMP_NUM_THREADS"):
        # Its own choice is one thread, however many cores there are.
        _set_own_threads(max(1, usable_cores() // processes_here()))


def _set_own_threads(count: int) -> None:
    os.environ.update({"OMP_NUM_THREADS": str(count), OWN_THREADS: str(count)})


def without_own_threads(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the threads that a process of this package chose for itself; a user's stay."""
    own = environment.get(OWN_THREADS)
    left_out = {OWN_THREADS, *(["OMP_NUM_THREADS"] if environment.get("OMP_NUM_THREADS") == own else [])}
    return {name: value for name, value in environment.items() if name not in left_out}


def _torchrun_was_given(name: str) -> bool:
    """Return whether the torchrun that started this process had a variable when it began; True if that is unknown."""
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return any(entry.startswith(f"{name}=".encode()) for entry in given.split(b"\0"))


def end_with_parent() -> None:
    """Receive SIGTERM when the process that started this one ends, however it ends, or has ended; on Linux only."""
    if platform.system() != "Linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = os.environ.get(ENDS_WITH_PARENT)
    if parent is not None and f"{TORCHRUN}RUN_ID" not in os.environ and parent != str(os.getppid()):
        signal.raise_signal(signal.SIGTERM)  # it ended before the call


def _keep_freed_memory() -> None:
    """Keep freed memory for the next step; by default glibc returns it, and the kernel clears each page again."""
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(MALLOPT_MMAP_THRESHOLD, 2**30)
            libc.mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)
            # The memory of a thread consists of heaps. An empty heap is returned, whatever the threshold, unless less
            # than this is free in the heap before it.
            libc.mallopt(MALLOPT_TOP_PAD, HEAP_OF_A_THREAD)
