"""A run folder: one process at a time, states that are whole or are not used, signals and their exit codes."""

import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import CPU_FP32
from deitkit.cli import main as cli
from deitkit.cli.progress import Terminal
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import METHODS
from deitkit.errors import CheckpointError, Interrupted, RecipeError
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import TrainRecipe
from deitkit.run.folder import begin_run, check_run, choose_run_folder, locked, locked_run
from deitkit.run.observer import StepProgress
from deitkit.run.state import drop_state, load_state, load_tree, save_state, save_tree
from deitkit.system.process import SPIN_COUNT, WAIT_SETTINGS, configure_process
from deitkit.training.cohort import Cohort
from deitkit.training.fit import StateSaver
from deitkit.training.student import Student

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
    with pytest.raises(CheckpointError, match="delete them to train that part again"):
        load_state(path, said.append)
    drop_state(path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = tmp_path / "checkpoint.safetensors", []
    with pytest.raises(CheckpointError, match=rf"safetensors cannot be read on {socket.gethostname()}: no such file"):
        load_tree(path)
    for epoch in range(2):
        save_state(path, {"epoch": epoch})

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(CheckpointError, match=r"stale file handle$"):
        load_state(path, said.append)
    monkeypatch.undo()
    assert said == []
    assert load_state(path, said.append) == {"epoch": 1}


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
    hold = "import sys, time; from deitkit.run.folder import locked; from pathlib import Path\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another deitkit process is using"), locked(folder):
            pass
        other.kill()
    with locked(folder):  # a process that was killed holds nothing
        pass
    assert not any(folder.iterdir())


def test_what_a_killed_process_left_half_written_is_no_run_and_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "seed-0").mkdir()
    old, new, other = (tmp_path / name for name in (f"seed-0/.{'0' * 32}.tmp", f".{'1' * 32}.tmp", ".mine.tmp"))
    for file in (old, new, other):
        file.touch()
        os.utime(file, (0, 0))
    new.touch()
    with locked(tmp_path):
        assert not old.exists()
        assert new.exists(), "another process may be writing it"
        assert other.exists()
    other.unlink()
    old.parent.rmdir()
    for resume in (False, True):
        check_run(tmp_path, load_recipe("digits"), resume=resume)


def test_resume_waits_for_a_lock_and_a_lock_that_stays_is_no_mistake(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("side_by_side", "units", "folds", "ablation", "seed_run"):  # which copies it into the others
        monkeypatch.setattr(f"deitkit.comparison.{module}.LOCK_SECONDS", 0.3)
    for command in ("compare", "teacher"):
        with locked(tmp_path):
            code, printed, said = run(command, "digits", "--out", tmp_path, "--resume")
            assert code == 75
            assert "another deitkit process is using" in said
            assert "waiting up to 0 s for it to end" in printed
            code, printed, _ = run(command, "digits", "--out", tmp_path)
            assert (code, "waiting up to" in printed) == (75, False)
    home = tmp_path / "units"
    with locked(home):
        code, printed, _ = run("compare", "digits", "--out", tmp_path, "--resume", "--on", "local:1")
        assert (code, "waiting up to" in printed) == (75, True)


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_ends_the_command_at_once(number: int, code: int, tmp_path: Path) -> None:
    script = "import deitkit.comparison.compare, time\nfrom deitkit.cli.main import main\n"
    script += "def load(*_, **settings):\n    print('loading', flush=True)\n"
    # Sixty seconds in short sleeps: a signal that arrives just before a sleep is handled only after it.
    script += "    for _ in range(600): time.sleep(0.1)\n"
    script += "deitkit.comparison.images.load_dataset = load\nmain()"
    command = [sys.executable, "-c", script, "compare", "digits", "--json", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        sent = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert time.monotonic() - sent < 45, "it slept to its end"  # of 60 s; a busy machine may need some to end
    assert process.returncode == code
    assert "stopped before anything was saved: start the same command again" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "go_on",
    [
        lambda terminal: terminal.say("a stage"),
        lambda terminal: terminal.reading("digits", 1, 2),
        lambda terminal: terminal.defer_interrupts().__enter__(),
    ],
    ids=["say", "reading", "training"],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_whose_exception_was_swallowed_ends_the_command_at_its_next_stage(
    number: int, code: int, go_on: Callable[[Terminal], object]
) -> None:
    def run() -> None:
        with Terminal(Console(file=io.StringIO())) as terminal:
            with suppress(Interrupted):  # as Python does in a finaliser, and a library with a bare except
                signal.raise_signal(number)
            go_on(terminal)

    with pytest.raises(Interrupted) as stop:
        run()
    assert stop.value.exit_code == code


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_only_a_second_ctrl_c_ends_a_run_at_once() -> None:
    def run() -> None:
        with Terminal(Console(file=io.StringIO())) as terminal, terminal.defer_interrupts():
            for _ in range(3):  # a scheduler's to all processes of a job, and what one of them passes on
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.01)
            reached.append("the end of the step")
            signal.raise_signal(signal.SIGINT)

    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["the end of the step"]


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_while_the_command_line_is_imported_leaves_no_traceback() -> None:
    script = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'deitkit.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from deitkit.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "recipes"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("place", ["the app", "a command"])
def test_ctrl_c_outside_a_training_promises_no_resume(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if place == "a command":
        monkeypatch.setattr("deitkit.cli.recipes.shipped_recipes", interrupt)
        monkeypatch.setattr(sys, "argv", ["deitkit", "recipes"])
    else:
        monkeypatch.setattr(cli, "app", interrupt)
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert capsys.readouterr().err == "stopped\n"


def test_a_worker_that_died_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(cli, "app", die)
    with pytest.raises(SystemExit, match="75"):
        cli.main()
    assert "a process that decodes images was killed or out of memory" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(CheckpointError, match="cannot write into"),
        locked(tmp_path / "file"),
    ):
        pass


class Clock:
    """Stands in for ``time`` where a test says how fast it goes."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class FakeCohort(Cohort):
    """A cohort that is only a place in its training."""

    def __init__(self) -> None:
        self.epoch, self.step = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}


@pytest.mark.parametrize(
    ("step_seconds", "places"),
    [
        (10.0, [(0, 30), (0, 60), (0, 90), (1, 0), (1, 30), (1, 60), (1, 90), (2, 0)]),  # epochs of 1000 s
        (1.0, [(1, 0), (2, 0), (3, 0)]),  # of 100 s: at the end of each
        (0.25, [(3, 0), (6, 0), (9, 0)]),  # of 25 s: a minute or more apart
    ],
)
def test_states_are_saved_by_the_clock(
    step_seconds: float, places: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, cohort, saved = Clock(), FakeCohort(), []
    monkeypatch.setattr("deitkit.training.fit.time", clock)
    monkeypatch.setattr("deitkit.training.fit.save_state", lambda path, state: saved.append(tuple(state.values())))
    saver = StateSaver(cohort, tmp_path / "state", seconds=300.0)
    for epoch in range(places[-1][0]):
        for step in range(100):
            clock.now += step_seconds
            cohort.step = step + 1
            saver.save_if_due()
        cohort.epoch, cohort.step = epoch + 1, 0
        saver.save_if_due()
    assert saved == places
    saver.save()
    assert saved == places, "nothing was trained since"


def test_between_two_epochs_the_weights_are_stored_once(tmp_path: Path, stripes: Dataset) -> None:
    student = small_student(stripes)
    weights = sum(value.numel() for value in student.classifier.state_dict().values())

    def stored(between_epochs: bool) -> int:
        save_tree(tmp_path / "state", student.state_dict(between_epochs=between_epochs))
        return sum(value.numel() for value in load_file(tmp_path / "state").values())

    between = stored(True)
    assert 2 * weights <= between < 2.1 * weights, "the weights and their average, before any optimizer has a state"
    with torch.no_grad():
        for parameter in student.classifier.parameters():
            parameter += 1
    within = stored(False)
    assert 4 * weights <= within < 4.1 * weights, "and those of the last good epoch, which are others by now"
    resumed = small_student(stripes)
    resumed.load_state_dict(load_tree(tmp_path / "state"))
    resumed.bad_step.fill_(7)
    resumed.stop_if_not_finite(lambda step: 0.1)
    assert resumed.stopped is not None
    fresh = small_classifier(stripes).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in resumed.classifier.state_dict().items())
    student.mark_good()
    assert stored(True) == between


def small_student(dataset: Dataset) -> Student:
    return Student(
        "none", METHODS["none"], small_classifier(dataset), TrainRecipe(),
        precision=CPU_FP32, batch_size=4, ema_decay=0.9,
    )  # fmt: skip


def small_classifier(dataset: Dataset) -> Classifier:
    torch.manual_seed(0)
    model = DeiT(image_px=8, patch_px=4, channels=3, classes=3, width=16, depth=1, heads=2, tokens=("class",))
    return Classifier(model, mean=dataset.mean, std=dataset.std)


def test_without_a_terminal_a_line_says_each_minute_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, text = Clock(), io.StringIO()
    monkeypatch.setattr("deitkit.cli.progress.time", clock)
    terminal = Terminal(Console(file=text, width=80))
    terminal.say("begins")
    for step in range(1, 201):
        clock.now += 2.0
        terminal.step(
            "seed 0",
            StepProgress(
                seed=0, epoch=3, epochs=20, step=step, steps_per_epoch=351, images_per_second=187.4,
                seconds_left=7000.0 - 2 * step, losses={"none": 1.8312, "token-hard": 1.79},
            ),
        )  # fmt: skip
    lines = text.getvalue().splitlines()
    assert len(lines) == 1 + 400 // 60
    assert lines[1] == (
        "seed 0 epoch 3/20 step 30/351  187 images/s, 1 h 56 min left  loss: none 1.831  token-hard 1.790"
    )


def test_threads_wait_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    configure_process()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)
    for name, value in (("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active"), ("KMP_BLOCKTIME", "0")):
        for other in WAIT_SETTINGS:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        configure_process()
        assert {key: os.environ[key] for key in WAIT_SETTINGS if key in os.environ} == {name: value}


def test_the_command_line_sets_it_before_torch_is_loaded() -> None:
    script = "import sys\nfrom deitkit.cli import main as cli\nassert 'torch' not in sys.modules\n"
    script += "cli.app = lambda: print(__import__('os').environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\ncli.main()"
    settings = {name: value for name, value in os.environ.items() if name not in WAIT_SETTINGS}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(SPIN_COUNT), "False"]


def test_resume_without_a_folder_finds_the_newest_run_of_this_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short, long = load_recipe("digits", ["train.epochs=2"]), load_recipe("digits", ["train.epochs=3"])
    with pytest.raises(RecipeError, match=r"--resume found no run of this recipe named 'digits' under runs/: name"):
        choose_run_folder(None, short, resume=True)
    for number, recipe in enumerate((short, long, short, long)):
        folder = choose_run_folder(None, recipe, resume=False)
        begin_run(folder, recipe)
        os.utime(folder / "recipe.yaml", (number, number))
    assert choose_run_folder(None, short, resume=True) == Path("runs/digits-3")
    damaged = Path("runs/digits-5")
    damaged.mkdir()
    (damaged / "recipe.yaml").write_text("unknown: 1\n")
    assert choose_run_folder(None, short, resume=True) == Path("runs/digits-3")
    with pytest.raises(CheckpointError, match=r"digits-5.recipe\.yaml cannot be read \(.*unknown.*\): correct it"):
        check_run(damaged, short, resume=True)
    shutil.rmtree(damaged)
    assert choose_run_folder(None, long, resume=True) == Path("runs/digits-4")
    grown = load_recipe("digits", ["train.epochs=2", "methods=[none, soft]"])
    assert choose_run_folder(None, grown, resume=True) == Path("runs/digits-3")
    other = load_recipe("digits", ["train.epochs=4"])
    with pytest.raises(RecipeError, match=r"the newest, runs/digits-4, differs \(train.epochs was 3, now 4\)"):
        choose_run_folder(None, other, resume=True)
    assert choose_run_folder(None, short, resume=False, suffix="-teacher") == Path("runs/digits-teacher")


def test_resume_without_a_folder_takes_no_run_of_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("cats", "dogs"):
        recipe = load_recipe("own-images", [f"data.name=folder:{place}"])
        folder = choose_run_folder(None, recipe, resume=False)
        begin_run(folder, recipe)
        (folder / "environment.json").write_text('{"images": "0"}')
    assert (
        choose_run_folder(None, load_recipe("own-images", ["data.name=folder:cats"]), resume=True).name == "own-images"
    )
    moved = load_recipe("own-images", ["data.name=folder:birds"])
    with pytest.raises(RecipeError, match=r"differs \(data\.name was folder:dogs, now folder:birds\)"):
        choose_run_folder(None, moved, resume=True)
    check_run(folder, moved, resume=True)  # whose images are compared when they are read
    other = load_recipe("own-images", ["data.name=csv:birds.csv"])
    with pytest.raises(CheckpointError, match=r"data\.name was folder:dogs, now csv:birds\.csv"):
        check_run(folder, other, resume=True)
    (folder / "environment.json").unlink()
    with pytest.raises(CheckpointError, match=r"data\.name was folder:dogs, now folder:birds"):
        check_run(folder, moved, resume=True)


def test_a_folder_is_of_an_ablation_or_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, several = load_recipe("digits"), load_recipe("digits", ["variants.sgd.train.optimizer=sgd"])
    more = load_recipe("digits", ["variants.sgd.train.optimizer=sgd", "variants.deep.model.depth=8"])
    monkeypatch.chdir(tmp_path)
    begin_run(Path("runs/digits"), plain)
    begin_run(Path("runs/digits-2"), several)
    for folder, other in (("runs/digits", several), ("runs/digits-2", plain)):
        with pytest.raises(CheckpointError, match=r"was started with another recipe \(variants was"):
            check_run(Path(folder), other, resume=True)
    check_run(Path("runs/digits-2"), more, resume=True)
    assert choose_run_folder(None, plain, resume=True) == Path("runs/digits"), "which is older, but one of its kind"
    assert choose_run_folder(None, more, resume=True) == Path("runs/digits-2")


def stop_in(folder: Path, *, kept: bool) -> None:
    with locked_run(folder, 0.0, print), locked(folder / "inner"):
        if kept:
            (folder / "recipe.yaml").touch()
        raise Interrupted("stopped")


def test_a_stop_before_anything_is_saved_does_not_promise_to_continue(tmp_path: Path) -> None:
    for kept, words in ((False, "stopped before anything was saved: start the same command again"), (True, "stopped")):
        with pytest.raises(Interrupted) as stop:
            stop_in(tmp_path / "run", kept=kept)
        assert str(stop.value) == words
        assert (tmp_path / "run").exists() == kept
