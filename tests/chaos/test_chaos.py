"""A short chaos run; `make chaos` is the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.name != "posix", reason="forks and signals as POSIX has them")
def test_a_run_that_is_killed_and_spoiled_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    script = Path(__file__).with_name("chaos.py")
    environment = {**os.environ, "DEITKIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--kills", "2", "--faults", "2", "--unit-kills", "2", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ended like the undisturbed run, bit for bit" in done.stdout
