"""deitkit: distil a CNN teacher into a small vision transformer, every method side by side.

The public names are those of ``deitkit.api``. They are imported when they are first used, so that importing deitkit is
quick and changes nothing in the process.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deitkit.api import METHODS, compare, finetune, load_dataset, load_model, load_recipe, register_model, train

__version__ = "0.1.0"
__all__ = ["METHODS", "compare", "finetune", "load_dataset", "load_model", "load_recipe", "register_model", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deitkit' has no attribute '{name}'")
    from deitkit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
