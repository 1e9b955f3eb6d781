"""Units of a comparison: how it is divided, and that side by side, lost or stopped they give the table of one run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from conftest import TINY, StopAfter
from deitkit.comparison import pools, seed_run, side_by_side
from deitkit.comparison.cohort_states import PREDICTIONS, STATE, PlannedCohort, holds
from deitkit.comparison.pools import LOST, LocalPool, open_pool
from deitkit.comparison.run import run_recipe
from deitkit.comparison.side_by_side import run_side_by_side
from deitkit.comparison.units import PREPARE, divide, run_unit
from deitkit.errors import CheckpointError, DeitkitError, Interrupted, RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import FolderInUse, begin_run, locked
from deitkit.run.metrics import read_metrics
from deitkit.run.observer import Watcher
from deitkit.run.results import Results, read_results
from deitkit.run.state import load_tree, save_state, save_tree
from deitkit.system import process
from run_helpers import Listener, timeless

LONGER = (
    *TINY, "train.epochs=60", "methods=[none, soft, token-hard]", "train.precision=fp32", "speed.save_seconds=0.5",
)  # fmt: skip
PART_WAY = 20  # steps after which a training stops


def assert_same(one: Results, other: Results) -> None:
    first, second = (timeless(results.to_json()) for results in (one, other))
    assert first | {"machine": None} == second | {"machine": None}


def test_a_comparison_is_divided_by_seeds_then_by_students(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    seeds = tiny_recipe("methods=[none, soft, hard, token-hard]", "seeds=[0, 1, 2]", "baseline.name=cifar/resnet20")
    assert divide(seeds, 2) == divide(seeds, 3) == ["seed-0", "seed-1", "seed-2"]
    assert divide(seeds, 6)[:2] == ["seed-0/none,soft", "seed-0/hard,token-hard,cnn-baseline"]
    assert len(divide(seeds, 100)) == 15
    folds = tiny_recipe("data.folds=3")
    assert divide(folds, 8) == ["fold-1", "fold-2", "fold-3"]
    done = tmp_path / "seed-1" / "none"
    done.mkdir(parents=True)
    (done / "predictions.safetensors").touch()
    assert divide(seeds, 1, tmp_path) == ["seed-0", "seed-1/soft,hard,token-hard,cnn-baseline", "seed-2"]


@pytest.mark.parametrize(
    "changes",
    [
        ("methods=[none, token-hard]", "seeds=[0, 1]", "baseline.name=cifar/resnet20"),
        ("methods=[soft]", "data.folds=3"),
        ("methods=[none]", "variants={smooth: {train.label_smoothing: 0.2}}"),
    ],
)
def test_shares_run_by_hand_give_the_table_of_one_run(
    changes: tuple[str, ...], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*changes)
    expected = run_recipe(recipe, tmp_path / "whole", watcher=Watcher())
    folder = tmp_path / "parts"
    with pytest.raises(RecipeError, match="is not prepared: run --unit prepare first"):
        run_unit(recipe, folder, "1/2", watcher=Watcher())
    for unit in (PREPARE, "2/2", "1/2", "1/2"):
        run_unit(recipe, folder, unit, watcher=Watcher())
    assert divide(recipe, 2, folder) == []
    parts = [path.parent for path in folder.glob("*/*/results.json")]  # folds or variants
    assert all(row.cost is None for part in parts for row in read_results(part).rows), "other units disturb a timing"
    assert_same(run_recipe(recipe, folder, watcher=Watcher(), resume=True), expected)
    assert all(row.cost is not None for part in parts for row in read_results(part).rows)
    written = {path: path.read_bytes() for path in folder.glob("*/*/results.json")}
    run_unit(recipe, folder, "1/2", watcher=Watcher())  # as a job that is queued again
    assert {path: path.read_bytes() for path in folder.glob("*/*/results.json")} == written


def test_a_begun_seed_goes_on_in_parts_and_parts_go_on_as_a_seed(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe("methods=[none, soft, token-hard]", "train.epochs=6")
    expected = run_recipe(recipe, tmp_path / "whole", watcher=Watcher())
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        run_recipe(recipe, folder, watcher=StopAfter(PART_WAY))
    assert (folder / "seed-0" / "checkpoint.safetensors").exists()
    run_unit(recipe, folder, PREPARE, watcher=Watcher())
    run_unit(recipe, folder, "seed-0/none", watcher=Watcher())
    assert not (folder / "seed-0" / "checkpoint.safetensors").exists()
    with pytest.raises(Interrupted):
        run_unit(recipe, folder, "seed-0/soft,token-hard", watcher=StopAfter(5))
    assert not list(folder.glob("seed-0/none/checkpoint*"))
    assert list(folder.glob("seed-0/*/checkpoint.safetensors"))
    assert_same(run_recipe(recipe, folder, watcher=Watcher(), resume=True), expected)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 6


def test_students_that_shared_a_state_go_on_in_units_of_their_own(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe("methods=[none, soft, token-hard]", "train.epochs=6")
    expected = run_recipe(recipe, tmp_path / "whole", watcher=Watcher())
    folder = tmp_path / "parts"
    home = folder / "seed-0"
    run_unit(recipe, folder, PREPARE, watcher=Watcher())
    with pytest.raises(Interrupted):
        run_unit(recipe, folder, "seed-0/none,soft,token-hard", watcher=StopAfter(PART_WAY))
    assert sorted(path.parent.name for path in home.rglob("checkpoint.safetensors")) == ["none"]
    run_unit(recipe, folder, "seed-0/soft", watcher=Watcher())
    kept = sorted(path.parent.name for path in home.rglob("checkpoint*.safetensors"))
    assert kept == ["none", "token-hard"], "what another process may train keeps its state"
    begun = {name: load_tree(home / name / "checkpoint.safetensors") for name in kept}
    assert [(state["step"], [*state["students"]]) for state in begun.values()] == [
        (begun["none"]["step"], ["none"]),
        (begun["none"]["step"], ["token-hard"]),
    ]
    assert begun["none"]["epoch"] + begun["none"]["step"] > 0
    run_unit(recipe, folder, "seed-0/none,token-hard", watcher=Watcher())
    assert_same(run_recipe(recipe, folder, watcher=Watcher(), resume=True), expected)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3 * 6


def test_metrics_go_along_from_a_unit_to_a_run_and_back(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]", "train.epochs=8")
    run_unit(recipe, tmp_path, PREPARE, watcher=Watcher())
    with pytest.raises(Interrupted):
        run_unit(recipe, tmp_path, "seed-0/none", watcher=StopAfter(10))
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path, watcher=StopAfter(10), resume=True)
    run_unit(recipe, tmp_path, "seed-0/none", watcher=Watcher())
    run_recipe(recipe, tmp_path, watcher=Watcher(), resume=True)
    assert [line.epoch for line in read_metrics(tmp_path)] == [*range(1, 9)]


def test_a_plan_holds_until_another_process_has_trained_one_of_its_students(tmp_path: Path) -> None:
    home = tmp_path / "seed-0"
    new = PlannedCohort(("none", "soft"), home / "none" / STATE)
    for name in new.names:
        (home / name).mkdir(parents=True)
    assert holds(new, home)
    save_state(home / "soft" / STATE, {"students": {"soft": {}}})
    assert not holds(new, home), "another process has begun one of them"
    save_state(new.state, {"students": {"none": {}}})
    assert not holds(new, home)
    alone = PlannedCohort(("none",), home / "none" / STATE)
    assert holds(alone, home)
    save_state(home / STATE, {"students": {"none": {}, "hard": {}}})
    assert not holds(alone, home), "a run has trained it further"
    (home / STATE).unlink()
    (home / "none" / PREDICTIONS).touch()
    assert not holds(alone, home), "it is finished"


def test_a_student_that_another_process_finishes_meanwhile_is_not_trained_again(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[none, hard]")
    run_unit(recipe, tmp_path, PREPARE, watcher=Watcher())
    planned = seed_run.plan_cohorts

    def finish_one_meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        cohorts = planned(*args, **options)
        (tmp_path / "seed-0" / "none").mkdir(parents=True)
        (tmp_path / "seed-0" / "none" / PREDICTIONS).touch()
        return cohorts

    monkeypatch.setattr(seed_run, "plan_cohorts", finish_one_meanwhile)
    watcher = Listener()
    run_unit(recipe, tmp_path, "seed-0", watcher=watcher)
    assert watcher.trained == {(0, "hard")}


def test_a_unit_that_is_killed_between_two_students_keeps_the_metrics_of_both(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[none, soft]")
    run_unit(recipe, tmp_path, PREPARE, watcher=Watcher())

    def killed(path: Path, tree: Any) -> None:
        if path.parent.name == last:
            raise KeyboardInterrupt
        save_tree(path, tree)

    last = "none"  # in whose folder the metrics of both are
    monkeypatch.setattr(seed_run, "save_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        run_unit(recipe, tmp_path, "seed-0/none,soft", watcher=Watcher())
    assert (tmp_path / "seed-0" / "soft" / PREDICTIONS).exists()
    monkeypatch.undo()
    run_unit(recipe, tmp_path, "seed-0/none,soft", watcher=Watcher())
    for name in ("none", "soft"):
        assert [line.epoch for line in read_metrics(tmp_path / "seed-0" / name)] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "home"),
    [
        (("methods=[none]", "data.folds=3"), "folds/2"),
        (("methods=[none]", "variants={smooth: {train.label_smoothing: 0.2}}"), "variants/smooth"),
    ],
)
def test_a_run_does_not_train_what_a_unit_still_trains(
    changes: tuple[str, ...],
    home: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("folds", "ablation"):
        monkeypatch.setattr(f"deitkit.comparison.{module}.LOCK_SECONDS", 0.2)
    recipe, heard = tiny_recipe(*changes), Listener()
    run_unit(recipe, tmp_path, PREPARE, watcher=Watcher())
    with locked(tmp_path / home), pytest.raises(FolderInUse, match=f"another deitkit process is using .*{home}"):
        run_recipe(recipe, tmp_path, watcher=heard, resume=True)
    assert any("waiting up to 0 s" in line for line in heard.heard)
    assert not (tmp_path / home / "seed-0").exists()


@pytest.mark.parametrize("unit", ["seed-0/hard", "seed-0/none,none", "seed-0/", "seed-0/none,"])
def test_students_of_a_unit_are_those_of_the_recipe_each_once(
    unit: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe("methods=[none, soft]", "baseline.name=cifar/resnet20")
    begin_run(tmp_path / "run", recipe)
    with pytest.raises(RecipeError, match=f"--unit {unit}: name some of none, soft, cnn-baseline after the seed"):
        run_unit(recipe, tmp_path / "run", unit, watcher=Watcher())


def test_a_unit_waits_for_a_lock_that_is_still_held(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, heard = tiny_recipe("methods=[none]"), Listener()
    run_unit(recipe, tmp_path / "run", PREPARE, watcher=Watcher())
    held = ExitStack()
    held.enter_context(locked(tmp_path / "run" / "seed-0" / "none"))
    monkeypatch.setattr(seed_run, "LOCK_SECONDS", 0.2)
    with pytest.raises(CheckpointError, match=r"another deitkit process is using .*none: wait for it to end"):
        run_unit(recipe, tmp_path / "run", "seed-0", watcher=heard)
    assert "waiting up to 0 s for it to end" in heard.heard[-1]
    monkeypatch.setattr(seed_run, "LOCK_SECONDS", 60.0)
    threading.Timer(1.0, held.close).start()
    run_unit(recipe, tmp_path / "run", "seed-0", watcher=heard)
    assert (tmp_path / "run" / "seed-0" / "none" / "predictions.safetensors").exists()


def test_options_that_do_not_go_together_are_refused(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for words, sentence in (
        (("--devices", "2"), "--devices 2 is of each unit of --on: add --on local"),
        (("--unit", "1/2", "--on", "local"), "--unit 1/2 runs one part in this process: drop --on"),
        (("--unit", "1/2", "--json"), "--unit 1/2 runs one part in this process: drop --json"),
        (("--unit", "1/2"), "--unit 1/2 runs a part of a comparison: name its run folder with --out"),
        (("--on", ""), "--on '' is not a place to run on"),
    ):
        code, printed, said = run("compare", "digits", *words)
        assert code == 2
        assert sentence in said.replace("\n", " ")
        assert "run folder" not in printed


@pytest.mark.parametrize("unit", ["seed-7", "fold-1", "3/2", "0/2", "seed-7/none", "fold-1/2", "photos"])
def test_a_unit_that_does_not_exist_is_refused(unit: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]")
    begin_run(tmp_path / "run", recipe)
    with pytest.raises(RecipeError, match=f"--unit {unit} is not a unit of this recipe: name prepare, a share such as"):
        run_unit(recipe, tmp_path / "run", unit, watcher=Watcher())


def test_units_of_several_processes_are_as_many_as_fit_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "usable_cores", lambda: 8)
    assert [LocalPool(None, devices).size for devices in (1, 4, 16)] == [8, 2, 1]


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("auto", None)])
def test_units_on_the_cpu_see_no_gpu(
    device: str, visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started: list[dict[str, str]] = []
    start = pools._start
    monkeypatch.setattr(pools, "_start", lambda *given: (started.append(given[2]), start(*given))[1])
    pool = LocalPool(1, 1, device)
    pool.start(["-c", "pass"], tmp_path / "log", 1)
    pool.close()
    assert started[0].get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize("users", [True, False])
def test_units_keep_the_threads_of_the_user_but_not_those_of_the_driver(
    users: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(process, "usable_cores", lambda: 64)  # a container's quota
    monkeypatch.setattr(process, "visible_cores", lambda: 128)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
    process.configure_process()
    assert os.environ["OMP_NUM_THREADS"] == ("5" if users else "64")
    own = pools._environment(os.environ, 8)
    assert own["OMP_NUM_THREADS"] == ("5" if users else "8")
    assert "DEITKIT_OWN_THREADS" not in own
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's, of a command that another one of this package started
    assert pools._environment(os.environ, 8)["OMP_NUM_THREADS"] == "3"


SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(300)\n"
DRIVER = """
import sys, time
from pathlib import Path
from deitkit.comparison.pools import LocalPool
torchrun = ["-m", "deitkit.system.torchrun", "--standalone", "--nproc-per-node=2", sys.argv[1]]
print(LocalPool(1, 2, "cpu").start(torchrun, Path(sys.argv[2]), 1).pid, flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell a process nothing of its parent's end")
def test_units_of_several_processes_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    sleeper, log = tmp_path / "sleeper.py", tmp_path / "log"
    sleeper.write_text(SLEEPER)
    with subprocess.Popen([sys.executable, "-c", DRIVER, sleeper, log], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        unit = psutil.Process(int(driver.stdout.readline()))
        deadline = time.monotonic() + 120
        while log.read_text().count("up") < 2:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        processes = [unit, *unit.children(recursive=True)]
        driver.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for one in alive:
        one.kill()
    assert alive == []
    orphan = [sys.executable, "-m", "deitkit.system.torchrun", "--help"]
    late = subprocess.run(orphan, env=os.environ | {"DEITKIT_ENDS_WITH_PARENT": "1"}, capture_output=True)
    assert late.returncode == -signal.SIGTERM, "the driver ended before it could be watched"


def test_places_that_do_not_exist_are_refused() -> None:
    for place in ("nowhere", "local:0", "local:many", "rays"):
        with pytest.raises(RecipeError, match=f"--on {place} is not a place to run on: write local, local:4, ray"):
            open_pool(place, 1)
    assert LocalPool(3, 1).size == 3


def test_a_cluster_that_does_not_answer_is_said_at_once() -> None:
    pytest.importorskip("ray")
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"--on ray: no cluster answers at 127\.0\.0\.1:9 \(.*refused\): start one"):
        open_pool("ray:127.0.0.1:9", 1)
    assert time.monotonic() - started < 30


class FakeRay:
    """A Ray cluster of two machines of 4 GPUs and 8 cores, which cannot run anything."""

    class exceptions:  # noqa: N801 - as in Ray
        """Its errors."""

        RayError = RuntimeError

    def init(self, **settings: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}] * 2

    def wait(self, handles: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return handles, []

    def get(self, handle: Any) -> int:
        raise RuntimeError("[Errno 2] No such file or directory: '/home/me'")

    def remote(self, function: Any) -> Any:
        self.function = function
        return self

    def options(self, **resources: Any) -> Any:
        self.resources = resources
        return SimpleNamespace(remote=lambda *arguments: arguments[1])


def test_a_cluster_is_divided_by_machines_and_says_why_a_unit_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setattr(pools, "_require_answer", lambda address: None)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    sizes = [open_pool("ray:here", devices).size for devices in (1, 3, 4)]
    assert sizes == [8, 2, 2], "a unit is on one machine"
    assert signal.getsignal(signal.SIGTERM) is on_sigterm, "Ray would end this process without a word"
    with pytest.raises(RecipeError, match=r"^--devices 6 exceeds the 4 GPUs of the cluster's largest machine: use 4"):
        open_pool("ray:here", 6)
    assert open_pool("ray:here", 6, "cpu").size == 16 // 6
    pool = open_pool("ray:here", 1)
    handle = pool.start(["-m", "deitkit"], tmp_path / "unit.log", 2)
    assert [pool.exit_code(handle) for _ in range(3)] == [LOST] * 3
    assert (tmp_path / "unit.log").read_text() == "[Errno 2] No such file or directory: '/home/me'\n"


@pytest.mark.parametrize(
    ("cores", "gpus", "devices", "share", "expected"),
    [
        ((8, 8), (0, 0), 1, 3, 4),  # 5 cores for each would leave the third without a machine
        ((8, 8), (0, 0), 1, 1, 8),
        ((8, 4), (0, 0), 1, 3, 4),
        ((2, 2), (0, 0), 1, 9, 1),
        ((16, 16), (4, 4), 2, 1, 8),  # those of its GPUs
        ((64, 2), (1, 1), 1, 2, 2),
    ],
)
def test_units_of_a_cluster_get_the_cores_with_which_all_have_a_machine(
    cores: tuple[int, int], gpus: tuple[int, int], devices: int, share: int, expected: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Cluster(FakeRay):
        def nodes(self) -> list[dict[str, Any]]:
            resources = [{"CPU": float(own), "GPU": float(those)} for own, those in zip(cores, gpus, strict=True)]
            return [{"Alive": True, "Resources": each} for each in resources]

    ray = Cluster()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(pools, "_require_answer", lambda address: None)
    open_pool("ray:here", devices).start(["-m", "deitkit"], tmp_path / "unit.log", share)
    assert ray.resources["num_cpus"] == expected
    assert ray.resources["num_gpus"] == (devices if any(gpus) else 0)


class Scripted:
    """A pool whose units end with the codes of a script, and write what it says."""

    size = 2

    def __init__(self, **script: list[int]) -> None:
        self.script = script
        self.started: list[str] = []
        self.stopped: list[str] = []

    def start(self, command: Sequence[str], log: Path, share: int) -> Any:
        unit = command[command.index("--unit") + 1] if "--unit" in command else "gather"
        self.started.append(unit)
        codes = self.script.get(unit, [])
        code: int | None = codes.pop(0) if codes else 0
        if code == 2:
            log.write_text("begin\nerror: train.lr is no field\n")
        return [unit, code]

    def exit_code(self, handle: Any) -> int | None:
        return None if handle[1] == 99 else int(handle[1])

    def stop(self, handle: Any) -> None:
        self.stopped.append(handle[0])
        handle[1] = 143

    def close(self) -> None:
        pass


class GatheredError(Exception):
    """All units have ended."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for nothing, and read no results, which scripted units do not write."""

    def gathered(folder: Path) -> Results:
        raise GatheredError

    monkeypatch.setattr(side_by_side, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(side_by_side, "read_results", gathered)


@pytest.mark.usefixtures("quick")
def test_a_lost_unit_starts_again_until_it_is_hopeless(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none, soft]", "seeds=[0, 1]")
    pool, heard = Scripted(**{PREPARE: [-9], "seed-0": [LOST], "seed-1": [143, 1]}), Listener()
    with pytest.raises(GatheredError):
        run_side_by_side(recipe, tmp_path / "run", pool=pool, watcher=heard)
    assert sorted(pool.started) == ["gather", *[PREPARE] * 2, *["seed-0"] * 2, *["seed-1"] * 3]
    assert pool.started[-1] == "gather"
    assert sum("starting it again from its last state" in line for line in heard.heard) == 4
    with pytest.raises(CheckpointError, match=r"prepare was lost 5 times: see the end of .*prepare\.log$"):
        run_side_by_side(recipe, tmp_path / "other", pool=Scripted(prepare=[1] * 9), watcher=heard)
    log = tmp_path / "third" / "units" / "prepare.log"
    log.parent.mkdir(parents=True)
    log.write_text("[Errno 2] No such file or directory: '/home/me'\n=====\n")  # where a machine lacks a folder, say
    with pytest.raises(CheckpointError, match=r"prepare\.log; its last line: \[Errno 2\] No such .*: '/home/me'"):
        run_side_by_side(recipe, tmp_path / "third", pool=Scripted(prepare=[LOST] * 9), watcher=heard)
    assert any(
        line.endswith("its last state; its last line: [Errno 2] No such file or directory: '/home/me'")
        for line in heard.heard
    )


@pytest.mark.usefixtures("quick")
def test_a_mistake_in_one_unit_ends_all_with_its_sentence(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none, soft]", "seeds=[0, 1]")
    pool = Scripted(**{"seed-0": [99], "seed-1": [2]})
    with pytest.raises(DeitkitError, match=r"^seed-1: train\.lr is no field$"):
        run_side_by_side(recipe, tmp_path / "run", pool=pool, watcher=Watcher())
    assert pool.stopped == ["seed-0"]
    heard = Listener()
    with pytest.raises(DeitkitError, match=r"^prepare: train\.lr is no field$"):
        run_side_by_side(recipe, tmp_path / "two", pool=Scripted(prepare=[2]), watcher=heard)
    assert not any("train.lr" in line for line in heard.heard), "said once, at the end"


class Clock:
    """Stands in for ``time``; units live for an hour."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 3600.0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("unit", [PREPARE, "seed-0"])
def test_what_trains_further_is_never_hopeless_and_what_only_lives_long_is(
    unit: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trains(Scripted):
        def start(self, command: Sequence[str], log: Path, share: int) -> Any:
            handle = super().start(command, log, share)
            state = home / ("teacher" if handle[0] == PREPARE else "seed-0/none") / STATE
            state.parent.mkdir(parents=True, exist_ok=True)
            state.touch()
            os.utime(state, ns=(0, len(self.started)))
            return handle

    monkeypatch.setattr(side_by_side, "time", Clock())
    recipe = tiny_recipe("methods=[none]")
    home = tmp_path / "run"
    pool = Trains(**{unit: [LOST] * 9})
    with pytest.raises(GatheredError):
        run_side_by_side(recipe, home, pool=pool, watcher=Watcher())
    assert pool.started.count(unit) == 10
    with pytest.raises(CheckpointError, match=f"{unit} was lost 5 times: see the end of"):
        run_side_by_side(recipe, tmp_path / "other", pool=Scripted(**{unit: [LOST] * 9}), watcher=Watcher())


@pytest.mark.usefixtures("quick")
def test_a_unit_that_does_not_end_when_asked_is_left_to_the_pool(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(Scripted):
        def stop(self, handle: Any) -> None:
            self.stopped.append(handle[0])

    monkeypatch.setattr(side_by_side, "STOP_SECONDS", 0.1)
    pool = Deaf(**{"seed-0": [99], "seed-1": [2]})
    with pytest.raises(DeitkitError, match=r"^seed-1: train\.lr is no field$"):
        run_side_by_side(tiny_recipe("methods=[none]", "seeds=[0, 1]"), tmp_path / "run", pool=pool, watcher=Watcher())
    assert pool.stopped == ["seed-0"]


@pytest.mark.usefixtures("quick")
def test_a_mistake_under_torchrun_is_known_by_its_report(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    class Torchrun(Scripted):
        def start(self, command: Sequence[str], log: Path, share: int) -> Any:
            assert "deitkit.system.torchrun" in command
            log.write_text("error: train.lr is no field\n  rank      : 0 (local_rank: 0)\n  exitcode  : 2 (pid: 7)\n")
            return ["prepare", 1]

    with pytest.raises(DeitkitError, match=r"^prepare: train\.lr is no field$"):
        run_side_by_side(tiny_recipe("methods=[none]"), tmp_path / "run", pool=Torchrun(), watcher=Watcher(), devices=2)


def test_units_get_the_devices_that_are_visible_and_not_the_ranks_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7")
    monkeypatch.setenv("RANK", "0")
    pool = open_pool("local", 2)
    assert pool.size == 2
    show = "import os; print(*(os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'RANK', 'DEITKIT_UNITS_HERE')))"
    for _ in range(2):
        pool.start(["-c", show], tmp_path / "log", 2)
    pool.close()
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["4,5 None 2", "6,GPU-7 None 2"]
    with pytest.raises(RecipeError, match=r"--on local:3 with 2 GPUs each exceeds the 4 of this machine: use local:2"):
        open_pool("local:3", 2)
    assert open_pool("local:8", 1, "cpu").size == 8, "which use none of the GPUs"
    with pytest.raises(RecipeError, match=r"^--devices 8 exceeds the 4 GPUs of this machine: use 4 at most$"):
        open_pool("local", 8)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="run it without torchrun"):
        open_pool("local", 1)


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "deitkit", "compare", "digits", *LONGER, "seeds=[0, 1]", "--out", str(folder), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of one process, with one thread as the units have: sums of another number of threads differ."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command(folder), check=True, capture_output=True, env=environment())
    return read_results(folder)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_units_that_are_killed_and_stopped_end_in_the_table_of_one_run(tmp_path: Path, undisturbed: Results) -> None:
    folder = tmp_path / "units"
    driver = subprocess.Popen(
        command(folder, "--on", "local:2"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    states = [
        folder / "seed-0" / "none" / "checkpoint.safetensors",
        folder / "seed-1" / "none" / "checkpoint.safetensors",
    ]
    while not all(state.exists() for state in states):
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        time.sleep(0.1)
    children = psutil.Process(driver.pid).children()
    children[0].kill()
    assert driver.stdout is not None
    assert any("starting it again from its last state" in line for line in driver.stdout)
    children = psutil.Process(driver.pid).children()
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 143, output
    assert "stopped; the same command with --resume continues" in output
    assert not any(child.is_running() for child in children)
    done = subprocess.run(
        command(folder, "--on", "local:2", "--resume"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming at epoch" in "".join(log.read_text() for log in (folder / "units").glob("seed-*.log"))
    assert_same(read_results(folder), undisturbed)


NODE_IS_LOST = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
folder = Path(sys.argv[1])
def lose_a_node():
    while not all((folder / f"seed-{seed}/none/checkpoint.safetensors").exists() for seed in (0, 1)):
        time.sleep(0.1)
    cluster.remove_node(nodes[1], allow_graceful=False)
threading.Thread(target=lose_a_node, daemon=True).start()
sys.argv = ["deitkit", "compare", "digits", *sys.argv[2:], "--out", str(folder), "--on", f"ray:{cluster.address}"]
from deitkit.cli.main import main
main()
cluster.shutdown()
"""


def test_a_lost_machine_of_a_ray_cluster_loses_nothing(tmp_path: Path, undisturbed: Results) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "ray"
    done = subprocess.run(
        [sys.executable, "-c", NODE_IS_LOST, str(folder), *LONGER, "seeds=[0, 1]"],
        env=environment(), capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost (exit code -1); starting it again from its last state" in done.stdout
    assert_same(read_results(folder), undisturbed)


def test_a_stopped_run_on_ray_saves_and_ends_its_units(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    driver = subprocess.Popen(
        command(tmp_path / "ray", "train.epochs=3000", "--on", "ray"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    state = tmp_path / "ray" / "seed-0" / "none" / "checkpoint.safetensors"
    while not state.exists():
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        time.sleep(0.1)
    asked = time.monotonic()
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=100)
    assert "stopped; the same command with --resume continues" in output
    assert time.monotonic() - asked < 60
    assert "stopped" in (tmp_path / "ray" / "units" / "seed-0.log").read_text()
