"""Several processes of torchrun against one: equal steps, one voice, and nothing lost when one of them is."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
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
    output, _ = begun.communicate(timeout=300)
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
    _, alive = psutil.wait_procs(processes, timeout=300)
    for process in alive:
        process.kill()
    assert alive == []
    output, _ = run.communicate(timeout=300)
    assert "stopped; the same command with --resume continues" in output
    assert list((tmp_path / "run").glob("seed-0/**/checkpoint.safetensors"))


OTHER_IMAGES = """
import os
from dataclasses import replace
from deitkit.comparison import worker
if os.environ["RANK"] == "1":
    load = worker.load_dataset
    def stale(*arguments, **options):
        dataset = load(*arguments, **options)
        return replace(dataset, train=replace(dataset.train, labels=dataset.train.labels.roll(1)))
    worker.load_dataset = stale
from deitkit.cli.main import main
main()
"""


def test_a_process_with_other_images_ends_all_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "stale.py").write_text(OTHER_IMAGES)
    run = torchrun(
        str(tmp_path / "stale.py"), "compare", "digits", *LONGER, "methods=[none]", "--out", str(tmp_path / "run")
    )
    output, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert output.count(f"error: on {socket.gethostname()}: data.name=digits has other images or labels") == 1, output
    assert "another process of the run was lost" not in output
    assert re.search(r"Root Cause.*exitcode +: 2 ", output, re.DOTALL)
    assert not list((tmp_path / "run").glob("seed-0/*/metrics.jsonl"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_is_not_repeated_by_restarts(processes: int, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    command = ("-m", "deitkit", "compare", "digits", *LONGER, "--out", str(tmp_path))
    run = torchrun("--max-restarts=2", *command, processes=processes)
    output, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert output.count("contains other files: name a new or empty folder") == 1, output
    assert "exitcode  : 2 " in output


@pytest.mark.parametrize(("processes", "which"), [(1, 0), (2, 1)])
def test_a_signal_to_one_process_stops_all_for_good(processes: int, which: int, tmp_path: Path) -> None:
    command = ("-m", "deitkit", "compare", "digits", *LONGER, "train.epochs=3000", "methods=[none]")
    run = torchrun("--max-restarts=3", *command, "--out", str(tmp_path / "run"), processes=processes)
    until(run, "seed 0 epoch 3/3000")
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(run.pid).children()}
    ranks[str(which)].send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert output.count("stopped; the same command with --resume continues") == 1, output
    assert "resuming at epoch" not in output
    assert list((tmp_path / "run").glob("seed-0/**/checkpoint.safetensors"))


def test_a_single_process_that_is_killed_is_started_again_too(tmp_path: Path) -> None:
    command = ("-m", "deitkit", "compare", "digits", *LONGER, "methods=[none]", "--out", str(tmp_path / "run"))
    run = torchrun("--max-restarts=1", *command, processes=1)
    until(run, "seed 0 epoch 3/16")
    psutil.Process(run.pid).children()[0].kill()
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output


@pytest.mark.skipif(sys.platform != "linux", reason="what torchrun was given is read from /proc")
@pytest.mark.parametrize(("given", "threads"), [({}, "4"), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_processes_divide_the_cores_unless_the_user_did(given: dict[str, str], threads: str, tmp_path: Path) -> None:
    script = "import os\nfrom deitkit.system import process\nprocess.usable_cores = lambda: 8\n"
    script += "process.configure_process()\nprint('threads', os.environ['OMP_NUM_THREADS'], flush=True)\n"
    (tmp_path / "show.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "show.py")], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert re.findall(r"threads (\d+)", done.stdout) == [threads] * 2


def test_a_mistake_is_said_once_and_ends_all(tmp_path: Path) -> None:
    run = torchrun("-m", "deitkit", "compare", "digits", *LONGER, "train.batch_size=3", "--out", str(tmp_path / "run"))
    output, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    sentence = "error: train.batch_size=3 is too small for 2 processes, each of which takes two images or more"
    assert output.count(sentence) == 1
    assert "training all layers" not in output, "before the teacher trains"
