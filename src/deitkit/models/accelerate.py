"""Speed of a classifier on a device: memory layout, kernels, compilation.

Nothing here changes results by more than rounding; each choice can be switched off in the recipe's ``speed``.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from deitkit.errors import RecipeError
from deitkit.models.classifier import Classifier
from deitkit.models.vit import Attention, DeiT
from deitkit.recipe.speed import SpeedRecipe

# Token layouts times resolutions, widths, dropout, stochastic depth and LayerScale; torch allows 8.
RECOMPILATIONS = 64


def accelerate(classifier: Classifier, speed: SpeedRecipe, device: torch.device) -> Classifier:
    """Move a classifier to its device and optimise it for speed, in place.

    A student's blocks are compiled separately: all blocks of all students of one width share compiled code.
    """
    classifier.to(device)
    model = classifier.model
    if not isinstance(model, DeiT):
        if speed.channels_last:
            model.to(memory_format=torch.channels_last)
        if speed.compile is True and compiles_blocks(speed, device):
            _allow_recompilations()
            model.compile()
        return classifier
    model.checkpoint_activations = speed.checkpoint_activations
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = speed.attention
    if compiles_blocks(speed, device):
        _allow_recompilations()
        for block in model.blocks:
            block.compile(dynamic=False)  # two token layouts are two shapes, each compiled separately
    return classifier


def compiles_blocks(speed: SpeedRecipe, device: torch.device) -> bool:
    """Return whether the blocks of students are compiled: by default on CUDA, where a compiler is.

    Raises:
        RecipeError: ``speed.compile=true``, and there is no compiler.
    """
    if speed.compile is False or (speed.compile == "auto" and device.type != "cuda"):
        return False
    missing = lacks_compiler(device)
    if speed.compile is True and missing is not None:
        raise RecipeError(f"speed.compile=true needs {missing}: install it, or drop the field")
    return missing is None


def lacks_compiler(device: torch.device) -> str | None:
    """Return what torch would not find for its compiler (Triton's C on CUDA, C++ on a CPU), or None."""
    language, variable, names = "C", "CC", ("gcc", "clang")
    if device.type == "cpu":
        language, variable, names = "C++", "CXX", ("g++", "clang++")
    if variable not in os.environ and not any(map(shutil.which, names)):
        return f"a {language} compiler ({' or '.join(names)})"
    has_headers = device.type == "cpu" or Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return None if has_headers else "the headers of Python (a package such as python3-dev)"


_settings_before: dict[str, Any] = {}  # of torch's compiler


def _allow_recompilations() -> None:
    """Let torch compile for as many shapes as a comparison has, and fail beyond instead of running uncompiled."""
    import torch._dynamo  # here, since it takes seconds to import

    for name, value in {"recompile_limit": RECOMPILATIONS, "fail_on_recompile_limit_hit": True}.items():
        _settings_before.setdefault(name, getattr(torch._dynamo.config, name))
        setattr(torch._dynamo.config, name, value)


@contextmanager
def compiler_settings_kept() -> Iterator[None]:
    """Restore the settings of torch's compiler at the end, which are those of the whole process."""
    try:
        yield
    finally:
        for name, value in _settings_before.items():
            setattr(torch._dynamo.config, name, value)
        _settings_before.clear()


def release(classifier: Classifier) -> None:
    """Drop compiled code, which refers to its module and so would keep a classifier in memory after its last use."""
    for module in classifier.modules():
        module._compiled_call_impl = None


def forget_compiled() -> None:
    """Drop all compiled code: it is kept for each shape, and a process that runs many comparisons reaches the limit."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def uncompiled() -> AbstractContextManager[object]:
    """Return a context without compiled code, since recompiling for few batches of another size does not pay off."""
    compiler_is_loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler_is_loaded else nullcontext()
