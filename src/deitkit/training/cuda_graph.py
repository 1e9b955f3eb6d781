"""Steps without Python in between: a CUDA device records the kernels of a function once and replays them as one graph.

A small student's step is some thousand kernels of a few microseconds each, which Python launches more slowly than the
device runs them; a replay is one launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls that run as usual: compilers compile, libraries choose kernels, optimizers make their state


class Recorder:
    """Runs methods on a device, replaying them on a CUDA device; they share one stream and one pool of memory.

    What one method holds between its kernels is free for the next one, so a cohort's activations are needed once, not
    once per student. Therefore the methods of one recorder must not run at the same time.

    Args:
        device: Graphs exist on CUDA devices only; elsewhere methods run and tensors are returned as they are.
        enabled: False: so they are on every device.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.held: dict[str, Tensor] = {}
        self.recordings: dict[tuple[int, str], _Recording] = {}
        if self.enabled:
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def run(self, method: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Return what a bound method returns, from its fourth call on by replaying it.

        The method takes what ``hold`` returned and gives tensors in any structure. It launches the same kernels at
        each call: nothing in it reads a value back. What its object holds (weights, gradients, an optimizer's state) it
        changes in place. What it returns is overwritten by its next call.
        """
        if not self.enabled:
            return method(*inputs)
        key = (id(method.__self__), method.__name__)  # type: ignore[attr-defined]
        if key not in self.recordings:
            self.recordings[key] = _Recording(method, self.stream, self.pool)
        return self.recordings[key](*inputs)

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor's values at the address that the recordings read them from, the same at every step."""
        if not self.enabled:
            return tensor
        if name not in self.held:
            self.held[name] = torch.empty_like(tensor)
        return self.held[name].copy_(tensor)


class _Recording:
    def __init__(self, method: Callable[..., Any], stream: torch.cuda.Stream, pool: Any) -> None:
        self.method = method
        self.stream, self.pool = stream, pool
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> Any:
        if self.calls < WARM_UP:
            self.calls += 1
            return self._run(inputs)
        if self.graph is None:
            self._record(inputs)
        assert self.graph is not None
        assert all(kept is given for kept, given in zip(self.inputs, inputs, strict=True))
        self.graph.replay()
        return self.outputs

    def _run(self, inputs: tuple[Tensor | None, ...]) -> Any:
        """Run as usual, but on the stream of the recording, to which autograd ties the gradients."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.method(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _record(self, inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are of the recording: a loader that pins memory goes on beside it.
        with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.method(*inputs)
