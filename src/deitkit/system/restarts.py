"""Restarts by torchrun (``--max-restarts``): for what was lost, not for a user's mistake or a run that was stopped.

torchrun starts its processes again whatever their exit code was. The code with which a run ended is therefore kept in
torchrun's store, and processes that are started again end with it at once.
"""

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil

from deitkit.system.process import TORCHRUN, was_restarted

PATIENCE = timedelta(seconds=10)  # for torchrun, which may be gone
KEY = "deitkit: the exit code of all restarts"


def keep_exit_code(code: int) -> None:
    """Let processes that torchrun starts again end at once with an exit code."""
    if os.environ.get(f"{TORCHRUN}MAX_RESTARTS", "0") != "0":
        with suppress(RuntimeError, ValueError):
            _store().set(KEY, str(code))


def kept_exit_code() -> int | None:
    """Return the exit code with which the run has ended; None unless torchrun started this process again after that."""
    if was_restarted():
        with suppress(RuntimeError, ValueError):
            store = _store()
            return int(store.get(KEY)) if store.check([KEY]) else None
    return None


def all_processes_live() -> bool:
    """Return whether none of torchrun's processes on this machine is lost; it then sends SIGTERM to the others."""
    ranks = set()
    with suppress(psutil.Error):
        for child in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):  # it has ended
                ranks.add(child.environ().get("RANK"))
    return len(ranks - {None}) == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _store() -> Any:
    """Return torchrun's store, outside of what belongs to one start of the processes."""
    import torch.distributed as dist  # here, since it takes seconds to import

    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    return dist.TCPStore(host, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
