"""The data sets of the parts of a comparison, of which one at a time is in memory."""

from collections.abc import Callable
from typing import Any, ParamSpec

from deitkit.data.dataset import Dataset

Arguments = ParamSpec("Arguments")


def keeping_last(load: Callable[Arguments, Dataset]) -> Callable[Arguments, Dataset]:
    """Let a loader keep its last data set, and free it before it loads another, since two may not fit in memory."""
    kept: dict[Any, Dataset] = {}

    def load_or_take(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Dataset:
        key = args, *sorted(kwargs.items())
        if key not in kept:
            kept.clear()
            kept[key] = load(*args, **kwargs)
        return kept[key]

    return load_or_take
