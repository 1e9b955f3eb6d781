"""The notebook, shortened; and the files for clusters, as far as one machine can run them: a script plays Slurm."""

import json
import os
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import deitkit
from conftest import TINY
from deitkit.run.results import read_results

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ("digits", *TINY, "methods=[none, soft]", "seeds=[0, 1]")
SBATCH = """#!{python}
import json, os, subprocess, sys
count = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("--"))
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:count])
assert {{"parsable", "requeue", "gpus", "cpus-per-gpu", "open-mode", "output", "job-name"}} <= options.keys(), options
assert options["signal"] == "B:TERM@120"
assert options["partition"] == "small"
first, _, last = options.get("array", "0-0").partition("-")
for task in range(int(first), int(last) + 1):
    log = options["output"].replace("%x", options["job-name"]).replace("%a", str(task))
    with open(log, "a") as file:
        environment = os.environ | ({{"SLURM_ARRAY_TASK_ID": str(task)}} if task else {{}})
        subprocess.run(["bash", *sys.argv[count:]], check=True, stdout=file, stderr=file, env=environment)
with open("{jobs}", "a") as file:
    file.write(json.dumps([options["job-name"], options.get("dependency"), options.get("array")]) + "\\n")
print(len(open("{jobs}").readlines()))
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="scripts of a POSIX shell")


def environment(place: Path) -> dict[str, str]:
    """Return an environment whose path begins with a folder of programs, then this Python's own."""
    path = f"{place}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}


def test_slurm_runs_teachers_then_parts_then_the_table(tmp_path: Path) -> None:
    programs, jobs, out = tmp_path / "bin", tmp_path / "jobs", tmp_path / "run with spaces"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH.format(python=sys.executable, jobs=jobs))
    (programs / "sbatch").chmod(stat.S_IRWXU)
    alone = subprocess.run(["bash", str(EXAMPLES / "slurm.sh")], capture_output=True, text=True, check=False)
    assert (alone.returncode, "usage: bash" in alone.stderr) == (2, True)
    command = ["bash", str(EXAMPLES / "slurm.sh"), str(out), "2", *SMALL]
    options = {"SBATCH_OPTIONS": "--partition=small --time=1:00:00"}
    done = subprocess.run(command, env=environment(programs) | options, capture_output=True, text=True, check=False)
    logs = "".join(log.read_text() for log in sorted((out / "units").glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    assert [json.loads(line) for line in jobs.read_text().splitlines()] == [
        ["prepare", None, None],
        ["unit", "afterok:1", "1-2"],
        ["gather", "afterok:2", None],
    ]
    assert read_results(out).seeds == (0, 1)
    assert "unit seed-0" in (out / "units" / "unit-1.log").read_text()
    assert "unit seed-1" in (out / "units" / "unit-2.log").read_text()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(143, "", True), (75, "3", True), (143, "100", False), (2, "", False), (0, "", False)],
)
def test_a_job_of_slurm_passes_its_signal_on_and_is_queued_again_where_that_helps(
    code: int, restarts: str, requeued: bool, tmp_path: Path
) -> None:
    scontrol, unit = tmp_path / "scontrol", tmp_path / "unit"
    scontrol.write_text(f"#!/bin/bash\necho $* >> {tmp_path}/requeued\n")
    unit.write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; echo saved $*; exit {code}' TERM\necho up\nwhile :; do sleep 0.1; done\n"
    )
    for program in (scontrol, unit):
        program.chmod(stat.S_IRWXU)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": restarts, "REQUEUE_SECONDS": "0"}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "--job", "4", str(unit)]
    with subprocess.Popen(command, env=environment(tmp_path) | slurm, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=30)
    assert (job.returncode, output) == (code, "saved --unit 2/4\n")
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_spot_machines_run_the_same_command_again(tmp_path: Path) -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert task["resources"] == {"accelerators": "H100:8", "use_spot": True}
    assert task["envs"]["OUT"].startswith(next(iter(task["file_mounts"])))
    changed = task["envs"] | {
        "RECIPE": " ".join([word.replace(" ", "") for word in SMALL]),
        "OUT": str(tmp_path / "run"),
        "SKYPILOT_NUM_GPUS_PER_NODE": "2",
    }
    for _ in range(2):  # the second time on what is there already
        done = subprocess.run(
            ["bash", "-c", task["run"]],
            env=environment(tmp_path) | changed,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert read_results(tmp_path / "run").seeds == (0, 1)


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = []
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(Image=pictures.append))
    shorter = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in TINY)}
    monkeypatch.setattr(deitkit, "compare", partial(deitkit.compare, progress=False, **shorter))
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "first-comparison.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert [picture.name for picture in pictures] == ["curves.png", "views.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert len(names["result"].rows) == 11
    shown = json.dumps(cells)
    assert "five methods" in shown
    assert "runs/digits" in shown
    assert str(Path.home()) not in shown
