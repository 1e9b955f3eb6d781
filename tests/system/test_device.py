"""What a process may use of its machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deitkit.errors import RecipeError
from deitkit.recipe.load import load_recipe
from deitkit.system import process
from deitkit.system.device import Precision, choose_device
from deitkit.system.process import configure_process, usable_cores


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)])
def test_cores_are_those_that_a_container_grants(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(process, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert usable_cores() == cores
    monkeypatch.setattr(process, "CGROUP_QUOTA", tmp_path / "nothing")
    assert usable_cores() == 4


def test_torch_gets_no_more_threads_than_a_container_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "visible_cores", lambda: 4)
    for granted, set_by_user, threads in ((1, None, "1"), (1, "2", "2"), (4, None, None)):
        monkeypatch.setattr(process, "usable_cores", lambda granted=granted: granted)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if set_by_user is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
        configure_process()
        assert os.environ.get("OMP_NUM_THREADS") == threads


def test_importing_deitkit_and_choosing_a_device_change_nothing() -> None:
    script = "import os, torch\nbefore = dict(os.environ), torch.get_num_threads()\n"
    script += "import deitkit.comparison.compare, deitkit.cli.main, deitkit.bench.training_speed\n"
    script += "from deitkit.system.device import choose_device\nchoose_device('auto')\n"
    script += "assert (dict(os.environ), torch.get_num_threads()) == before"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there_is_told() -> None:
    assert choose_device("auto") == torch.device("cpu")
    for name, kind in (("cuda", "CUDA device"), ("mps", "GPU of Apple"), ("xpu", "GPU of Intel")):
        with pytest.raises(RecipeError, match=rf"device={name}, but no {kind} is visible .*: set device=auto"):
            choose_device(name)


@pytest.mark.parametrize("there", ["cuda", "mps", "xpu"])
def test_another_accelerator_is_taken_where_it_is_asked_for_and_cuda_always(
    there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(there))
    assert choose_device(there) == torch.device(there)
    assert choose_device("auto") == torch.device("cuda" if there == "cuda" else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    other = "mps" if there == "cuda" else "cuda"
    with pytest.raises(RecipeError, match=rf"device={other}, but no .* is visible \({there} is\)"):
        choose_device(other)


def test_a_finished_run_is_measured_on_its_device_or_on_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(RecipeError, match="device=cuda"):
        Precision.of(load_recipe("digits", ["device=cuda"]))
    assert Precision.here(load_recipe("digits", ["device=cuda"])).device == torch.device("cpu")
