"""Whether the processes of a run can share a step, before anything trains."""

import pytest
import torch

from deitkit.errors import RecipeError
from deitkit.system.ranks import Ranks
from deitkit.training import shared
from deitkit.training.shared import require_parts


def test_processes_need_two_images_each_and_devices_that_speak_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    mps, cpu = torch.device("mps"), torch.device("cpu")
    require_parts({"train.batch_size": 1}, mps)  # one process
    monkeypatch.setattr(shared, "current_ranks", lambda: Ranks(0, 4))
    require_parts({"train.batch_size": 8}, cpu)
    with pytest.raises(RecipeError, match=r"train\.batch_size=7 is too small for 4 processes, .* at least 8, or start"):
        require_parts({"train.batch_size": 7}, cpu)
    with pytest.raises(RecipeError, match=r"device=mps is for one process: 4 share CPUs or CUDA devices"):
        require_parts({"train.batch_size": 8}, mps)
