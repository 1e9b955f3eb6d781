"""The processes of a run that ``torchrun`` starts: each trains on its part of every batch, with the same weights.

The first process runs the comparison; the others only help it to train (``comparison/worker.py``). What they compute
together goes through collectives of torch.distributed, what the first tells the others through its store.
"""

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from deitkit.errors import RecipeError
from deitkit.system.process import TORCHRUN, were_started

POLL_SECONDS = 0.05  # between two looks for a message
PATIENCE = timedelta(hours=3)  # for one collective: another process may be decoding all images, or writing a state


class Ranks:
    """This process among those of the run.

    Args:
        rank: Its number, from 0.
        count: Number of processes.
        store: For messages; None if this process is alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.count = count
        self.store = store
        self._messages = 0  # sent or received so far

    def places(self, batch: int, rank: int | None = None) -> Int64[Tensor, " part"]:
        """Return the places of a batch that a process (by default this one) trains on.

        They are a part of the first half and its mirror images, so that Mixup and CutMix, which mix a batch with itself
        in reverse order, mix the part with itself in reverse order.
        """
        half = (batch + 1) // 2
        rank = self.rank if rank is None else rank
        front = torch.arange(half * rank // self.count, half * (rank + 1) // self.count)
        back = (batch - 1 - front).flip(0)
        return torch.cat([front, back[1:] if batch % 2 and half - 1 in front else back])

    def spans(self, count: int) -> list[slice]:
        """Return the part of ``count`` images that each process predicts; every one predicts all of very few."""
        if count < self.count:
            return [slice(0, count)] * self.count
        return [slice(count * rank // self.count, count * (rank + 1) // self.count) for rank in range(self.count)]

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type and device by their sums over all processes, in one message."""
        if self.count == 1:
            return
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(together)
        sums = together.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(sums, tensors, strict=True)])

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows of all processes, in their order; a gradient goes back to the rows of each.

        Args:
            rows: Of this process, shape (its size, ...).
            sizes: Number of rows of each process.
        """
        return _Gather.apply(rows, self, tuple(sizes)) if self.count > 1 else rows

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.count == 1:
            return flag
        together = torch.tensor([int(flag)])  # on the CPU, so that no device is waited for
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return bool(together)

    def agreed_refusal(self, refusal: str = "") -> str:
        """Return the sentence of a process that cannot go on, the same in all; empty if all can. All must call this."""
        if refusal and self.count > 1:
            self.store.set(f"refusal {self.rank}", refusal)
        if not self.any(bool(refusal)) or self.count == 1:
            return refusal
        keys = [f"refusal {rank}" for rank in range(self.count)]
        return next(self.store.get(key).decode() for key in keys if self.store.check([key]))

    def broadcast(self, message: Any) -> None:
        """Send a JSON value from the first process to all others; never waits for them."""
        if self.count > 1:
            self.store.set(f"message {self._next()}", json.dumps({"message": message}))

    def broadcast_end(self, exit_code: int) -> None:
        """Let every other process end with an exit code as soon as it receives a message."""
        if self.count > 1:
            self.store.set(f"message {self._next()}", json.dumps({"exit_code": exit_code}))

    def receive(self) -> Any:
        """Return the next message of the first process, however long it takes.

        Raises:
            SystemExit: The first process has ended, with this exit code.
        """
        key = f"message {self._next()}"
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        received = json.loads(self.store.get(key))
        if "exit_code" in received:
            raise SystemExit(received["exit_code"])
        return received["message"]

    def _next(self) -> int:
        self._messages += 1
        return self._messages


class _Gather(torch.autograd.Function):
    """Rows of all processes; its gradient is that of the sum of the losses of all, which are equal."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, sizes: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.sizes = ranks, sizes
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))  # collectives want equal shapes
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].split(ctx.sizes)[ctx.ranks.rank] * ctx.ranks.count, None, None


ALONE = Ranks()
_current = ALONE


def current_ranks() -> Ranks:
    """Return this process among those of the run; alone unless ``join_ranks`` found others."""
    return _current


def join_ranks() -> Ranks:
    """Join the processes that torchrun started, each with a GPU of its own where there are GPUs.

    Raises:
        RecipeError: There are more processes on this machine than GPUs, or restarts on several machines.
        SystemExit: The latter, in all processes of a machine but the first, which reports it.
    """
    global _current
    if not were_started():
        return ALONE
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get(f"{TORCHRUN}MAX_RESTARTS", "0") != "0":
        if os.environ.get("LOCAL_RANK") != "0":
            raise SystemExit(2)
        raise RecipeError(
            "torchrun's --max-restarts is for one machine, since on several each counts restarts of its own: leave it "
            "out, and start the same commands again with --resume when one is lost"
        )
    # By name, since torch's own choice where there is a GPU leaves tensors on the CPU without a backend.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            here = os.environ.get("LOCAL_WORLD_SIZE", str(local + 1))
            raise RecipeError(
                f"--nproc-per-node={here} exceeds the {gpus} GPUs of this machine: use at most {gpus}, or hide them "
                "with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(local)
    # Its functions keep the group of the time when they are imported as a default. Optimizers import it later, and a
    # group that is kept outlives its end: its threads then abort the process now and then when Python ends.
    import_module("torch.distributed.nn.functional")
    store, rank, count = next(dist.rendezvous("env://"))
    # The store outlives processes that are started again, which must not read what those before them wrote.
    attempt = dist.PrefixStore(f"attempt {os.environ.get(f'{TORCHRUN}RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=count, timeout=PATIENCE)
    _current = Ranks(rank, count, dist.PrefixStore("deitkit", attempt))
    return _current


def leave_ranks() -> None:
    """Leave the other processes, at the end of the run."""
    global _current
    if _current.count > 1:
        dist.destroy_process_group()
    _current = ALONE
