"""The scripts of benchmarks/ run, on sizes at which their figures mean nothing."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
from safetensors.torch import save_file

from source_helpers import write_classes

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.bench.measure.CPU_SIDE", 128)


def test_everyone_trains_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    options = ["--synthetic", "--patch-px", "8", "--batch-size", "4", "--rounds", "1", "--steps", "1", "--warm-up", "1"]
    script("peers").main([*options, "--workers", "0", "--device", "cpu", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["problems"] == {}
    assert [row["name"] for row in result["rows"]] == [
        "deitkit", "timm TokenDistillationTask", "the paper's loop", "a plain loop"
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["images_per_second"] > 0
        ratio = result["rows"][0]["images_per_second"] / row["images_per_second"]
        assert row["deitkit_is_faster_by"] == pytest.approx(ratio)


def test_a_peer_that_cannot_run_says_why() -> None:
    options = ["--synthetic", "--patch-px", "8", "--batch-size", "4", "--rounds", "1", "--steps", "1", "--warm-up", "1"]
    options += ["--workers", "-1", "--device", "cpu", "--peers", "deitkit", "paper"]
    result = script("peers").main(options)
    assert [row["name"] for row in result["rows"]] == ["deitkit"]
    assert "num_workers option should be non-negative" in result["problems"]["the paper's loop"]


def test_the_gates_simulation_refuses_no_right_teacher_and_finds_a_swap(capsys: pytest.CaptureFixture[str]) -> None:
    script("gate").main(["--draws", "20", "--sizes", "24", "300"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    shares = {title: [float(share.removesuffix(" %")) for share in found] for title, *found in rows}
    assert all(max(found) <= 5 for title, found in shares.items() if title.startswith("right"))  # 1 of 20 draws
    assert min(shares["2 of 10 classes swapped, 95 %"][1:]) == 100


def test_augmentation_is_timed_beside_torchvisions(tmp_path: Path) -> None:
    path = tmp_path / "augmentation.json"
    script("augmentation").main(
        ["--images", "64", "--batch-size", "32", "--rounds", "1", "--workers", "0", "--json", str(path)]
    )
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[0]["deitkit_is_faster_by"] == 1


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_gpu_script_names_its_pieces() -> None:
    wrong = subprocess.run([FOLDER / "gpu.sh", "nothing", "/tmp"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "check, speed, infer, peers, cifar10 or all" in wrong.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_gpu_script_ends_at_the_first_failure_and_leaves_no_half_file(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho half\nexit 1\n")
    python.chmod(0o755)
    settings = os.environ | {"SMALL": "1", "PYTHON": str(python)}
    for piece, parts in (("speed", 1), ("all", 0)):  # the first command of all is of the tests
        out = tmp_path / piece
        failed = subprocess.run([FOLDER / "gpu.sh", piece, out], env=settings, capture_output=True, check=False)
        assert failed.returncode == 1
        assert failed.stdout.count(b"half") == 1 - parts
        assert [path.suffix for path in out.iterdir()] == [".part"] * parts


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_what_a_script_imports_of_deitkit_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deitkit"):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_gpu_script_compares_at_small_sizes(tmp_path: Path) -> None:
    settings = os.environ | {"SMALL": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "SEEDS": "1"}
    subprocess.run([FOLDER / "gpu.sh", "cifar10", tmp_path], check=True, env=settings, capture_output=True)
    assert (tmp_path / "cifar10" / "report.html").exists()
    assert "from nothing to the report in" in (tmp_path / "cifar10-seconds.txt").read_text()


def test_a_cnn_is_fine_tuned_without_deitkit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "photos", {"a": 30, "b": 30})
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    options = ["--model", "test_resnet", "--checkpoint", str(tmp_path / "weights.safetensors"), "--px", "32"]
    script("finetune_cnn").main([f"folder:{tmp_path / 'photos'}", *options, "--epochs", "1"])
    assert re.search(r"top-1 [\d.]+ % \[[\d.]+, [\d.]+\], n = \d+", capsys.readouterr().out)
