"""deitkit: distil a CNN teacher into a small vision transformer, every method side by side."""

import os

__version__ = "0.1.0"

# Tensors of 2 MiB and more lie on large pages, where Linux has them: a CPU looks up fewer addresses. Torch reads this
# when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
