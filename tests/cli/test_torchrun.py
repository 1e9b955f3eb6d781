"""Several processes of torchrun against one: equal steps, one voice, and nothing lost when one of them is."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from conftest import TINY

LONGER = (
    *TINY,
    "train.epochs=16",
    "train.optimizer=adamw",
    "train.learning_rate=0.001",
    "train.precision=fp32",
    "methods=[none, token-hard]",
    "speed.save_seconds=1",
)
TESTS = Path(__file__).parents[1]


def torchrun(*arguments: str, processes: int = 2, cwd: Path = TESTS) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until(process: subprocess.Popen[str], sign: str) -> list[str]:
    """Return the lines of a process up to one that contains a sign."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sign in line:
            return lines
    raise AssertionError("".join(lines))


def weights(folder: Path) -> dict[str, dict[str, object]]:
    return {path.parent.name: load_file(path) for path in sorted(folder.glob("seed-0/*/model.safetensors"))}


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() == {"none", "token-hard"}
    return max(float((first[m][name] - second[m][name]).abs().max()) for m in first for name in first[m])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "deitkit", "compare", "digits", *LONGER, "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_as_one_and_see_the_views_of_one(processes: int) -> None:
    run = torchrun("-m", "training.train_together", processes=processes)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    steps = {name: value for name, value in found.items() if isinstance(value, dict)}
    assert len(steps) == 3
    assert all(difference < 1e-4 for each in steps.values() for difference in each.values()), steps
    views = {name: value for name, value in found.items() if name not in steps}
    assert len(views) == 9
    assert all(value is True for value in views.values()), views


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_is_started_again_and_nothing_is_lost(which: int, alone: Path, tmp_path: Path) -> None:
    run = torchrun("--max-restarts=2", "-m", "deitkit", "compare", "digits", *LONGER, "--out", str(tmp_path / "run"))
    seen = until(run, "seed 0 epoch 5/16")
    assert sum("2 processes share every batch of 16 images" in line for line in seen) == 1, "one of them speaks"
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(run.pid).children()}
    ranks[str(which)].kill()
    seen = until(run, "resuming at epoch")
    assert any("another process of the run was lost" in line for line in seen)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert largest_difference(alone, tmp_path / "run") < 1e-3
    assert (tmp_path / "run" / "winner" / "model.safetensors").exists()


@pytest.mark.parametrize("first", [1, 2])
def test_a_stopped_run_goes_on_in_another_number_of_processes(
    first: int, alone: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "run"
    command = ["-m", "deitkit", "compare", "digits", *LONGER, "--out", str(folder)]
    begun = torchrun(*command, processes=first)
    until(begun, "seed 0 epoch 5/16")
    begun.send_signal(signal.SIGTERM)
    output, _ = begun.communicate(timeout=60)
    assert "stopped; the same command with --resume continues" in output
    assert output.count("stopping after this step") == 1
    going_on = torchrun(*command, "--resume", processes=3 - first)
    output, _ = going_on.communicate(timeout=300)
    assert going_on.returncode == 0, output
    assert "resuming at epoch" in output
    assert largest_difference(alone, folder) < 1e-3
    assert not list(folder.glob("seed-0/checkpoint*"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell a process nothing of its parent's end")
def test_processes_whose_torchrun_is_killed_save_and_end(tmp_path: Path) -> None:
    run = torchrun("-m", "deitkit", "compare", "digits", *LONGER, "train.epochs=3000", "--out", str(tmp_path / "run"))
    until(run, "seed 0 epoch 5/3000")
    processes = psutil.Process(run.pid).children(recursive=True)
    assert len(processes) >= 2
    run.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []
    output, _ = run.communicate(timeout=60)
    assert "stopped; the same command with --resume continues" in output
    assert list((tmp_path / "run").glob("seed-0/**/checkpoint.safetensors"))


def test_a_mistake_is_said_once_and_ends_all(tmp_path: Path) -> None:
    started = time.monotonic()
    run = torchrun("-m", "deitkit", "compare", "digits", *LONGER, "train.batch_size=3", "--out", str(tmp_path / "run"))
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    sentence = "error: train.batch_size=3 is too small for 2 processes, each of which takes two images or more"
    assert output.count(sentence) == 1
    assert "training all layers" not in output, "before the teacher trains"
    assert time.monotonic() - started < 100
