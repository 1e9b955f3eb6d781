"""What a process may use of its machine."""

import os
from pathlib import Path

import pytest
import torch

from deitkit.errors import RecipeError
from deitkit.system import device
from deitkit.system.device import choose_device, usable_cores


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)])
def test_cores_are_those_that_a_container_grants(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(device, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert usable_cores() == cores
    monkeypatch.setattr(device, "CGROUP_QUOTA", tmp_path / "nothing")
    assert usable_cores() == 4


def test_torch_gets_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "usable_cores", lambda: 1)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        choose_device("cpu")
        assert torch.get_num_threads() == 2, "what the user says counts"
        monkeypatch.delenv("OMP_NUM_THREADS")
        choose_device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there_is_told() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(RecipeError, match="no CUDA device is visible"):
        choose_device("cuda")
