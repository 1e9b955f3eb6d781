"""A run folder: one process at a time, states that are whole or are not used, signals and their exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deitkit import cli
from deitkit.checkpoint import drop_state, load_state, load_tree, save_state, save_tree
from deitkit.errors import CheckpointError
from deitkit.runs import occupied

TREE = {"epoch": 3, "sums": {"labels": torch.tensor(0.25)}, "flags": [torch.tensor([True, False]), None, 1e-300]}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tree(path, TREE)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            tree = load_tree(path)
        except CheckpointError:
            continue
        assert str(tree) == str(TREE)  # in the spaces that pad the header a bit says nothing


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tree(path, TREE)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_tree(path)


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path, said = tmp_path / "checkpoint.safetensors", []
    assert load_state(path, said.append) is None
    for epoch in range(3):
        save_state(path, {"epoch": epoch})
    assert load_state(path, said.append) == {"epoch": 2}
    assert said == []
    assert len(list(tmp_path.iterdir())) == 2
    path.write_bytes(path.read_bytes()[:-1])
    assert load_state(path, said.append) == {"epoch": 1}
    assert said == [f"{path} is damaged"]
    save_state(path, {"epoch": 2})
    path.write_bytes(b"")
    assert load_state(path, said.append) == {"epoch": 1}, "the damaged one had taken the place of the one before"
    save_state(path, {"epoch": 2})
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="delete them, and what they held is trained again"):
        load_state(path, said.append)
    drop_state(path)
    assert list(tmp_path.iterdir()) == []


def test_where_the_first_state_is_damaged_a_run_starts_anew(tmp_path: Path) -> None:
    path, said = tmp_path / "checkpoint.safetensors", []
    save_state(path, {"epoch": 0})
    path.write_bytes(b"")
    assert load_state(path, said.append) is None
    assert said == [f"{path} is damaged"]
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_could_not_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_state(path, {"epoch": 0})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left on device"):
        save_state(path, {"epoch": 1})
    monkeypatch.undo()
    assert load_state(path, lambda line: None) == {"epoch": 0}
    save_state(path, {"epoch": 1})
    assert load_state(path, lambda line: None) == {"epoch": 1}


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hold = "import sys, time; from deitkit.runs import occupied; from pathlib import Path\n"
    hold += "with occupied(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another deitkit is at work"), occupied(folder):
            pass
        other.kill()
    with occupied(folder):  # a process that was killed holds nothing
        pass
    assert not any(folder.iterdir())


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with occupied(tmp_path / "run"):
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_ends_the_command_at_once(number: int, code: int, tmp_path: Path) -> None:
    script = "import deitkit.compare, time\nfrom deitkit.cli import main\n"
    script += "deitkit.compare.load_dataset = lambda *_: (print('loading', flush=True), time.sleep(60))\nmain()"
    command = [sys.executable, "-c", script, "compare", "digits", "--json", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        sent = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - sent < 10
    assert process.returncode == code
    assert "--resume goes on from here" in errors
    assert "Traceback" not in errors


def test_a_worker_that_died_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(cli, "app", die)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "a process that decodes images died" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(CheckpointError, match="cannot write into"),
        occupied(tmp_path / "file"),
    ):
        pass
