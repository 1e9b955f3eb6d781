"""CUDA graphs: a device records the kernels of a function once and replays them in one launch.

A small student's step consists of about a thousand kernels of a few microseconds each, which Python launches more
slowly than the device runs them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deitkit.errors import RecipeError, is_out_of_memory, reason_of

# Their modules read no value back and keep no count in Python, on which a recording fails or which it would freeze.
LIBRARIES = ("deitkit", "timm", "torch", "torchvision")
WARM_UP = 3  # calls before recording: compilers compile, libraries choose kernels, optimizers create their state


def is_of_libraries(model: nn.Module) -> bool:
    """Return whether a model has no module of the user's own."""
    return all(type(module).__module__.partition(".")[0] in LIBRARIES for module in model.modules())


class Recorder:
    """Runs methods, by replaying recordings on a CUDA device; the recordings share one stream and one memory pool.

    Each recording reuses the memory of the others, so a cohort needs the activations of one student only. The methods
    of a recorder must therefore not run concurrently.

    Args:
        device: On other devices than CUDA, methods run directly and tensors are returned unchanged.
        enabled: False runs methods directly on every device.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.held: dict[str, Tensor] = {}
        self.recordings: dict[tuple[int, str], _Recording] = {}
        if self.enabled:
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def run(self, method: Callable[..., Any], *inputs: Tensor | None, record: bool = True) -> Any:
        """Run a bound method, from its fourth call on by replaying it; directly where ``record`` is False.

        The method takes tensors from ``hold`` and returns tensors in any structure. It must launch the same kernels at
        each call, without reading a value back, and must change its object (weights, gradients, an optimizer's state)
        in place. Its next call overwrites the returned tensors.
        """
        if not (self.enabled and record):
            return method(*inputs)
        key = (id(method.__self__), method.__name__)  # type: ignore[attr-defined]
        if key not in self.recordings:
            self.recordings[key] = _Recording(self.stream, self.pool)
        return self.recordings[key].run(method, *inputs)

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the fixed address that the recordings read, and return the copy."""
        if not self.enabled:
            return tensor
        if name not in self.held:
            self.held[name] = torch.empty_like(tensor)
        return self.held[name].copy_(tensor)


class _Recording:
    """A recording of a method; it does not hold the method, whose object holds the recorder."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self.stream, self.pool = stream, pool
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, method: Callable[..., Any], *inputs: Tensor | None) -> Any:
        if self.calls < WARM_UP:
            self.calls += 1
            return self._call(method, inputs)
        if self.graph is None:
            self._record(method, inputs)
        assert self.graph is not None
        assert all(kept is given for kept, given in zip(self.inputs, inputs, strict=True))
        self.graph.replay()
        return self.outputs

    def _call(self, method: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> Any:
        """Run directly, but on the stream of the recording, to which autograd ties the gradients."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = method(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _record(self, method: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Record the calls of this thread only: a loader may pin memory in another thread.
            with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = method(*inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RecipeError(
                f"this GPU cannot record a step of these models ({reason_of(error)}): set speed.cuda_graphs=false"
            ) from error
