"""Small data sets and recipes that several tests share."""

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deitkit.system.process import configure_process

# The tests' models are so small that threads only wait for each other, and sums of any number of threads differ.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the shell of the tests says of its terminal, and the user's own settings, are none of theirs.
for _name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES", "PY_COLORS", "GITHUB_ACTIONS", "DEITKIT_IMPORT"):
    os.environ.pop(_name, None)
configure_process()  # before torch is imported: threads of the tests, too, wait without keeping a core from others

import psutil
import torch
from hypothesis import settings

from deitkit.cli.main import main
from deitkit.data.augment.preview import draw_views
from deitkit.data.dataset import Dataset, Split
from deitkit.data.duplicates import pixel_hashes
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.report.write import write_report
from deitkit.run.layout import REPORT
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision
from deitkit.training.student import Student

# Other work on the machine is no failure; examples that only one run draws are for `make fuzz`.
settings.register_profile("patient", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("patient")
settings.register_profile("fuzz", max_examples=1800)  # `make fuzz`; what it scales is in fuzz_helpers

CPU_FP32 = Precision(torch.device("cpu"), torch.float32)

# A comparison of all that there is, in seconds.
TINY = (
    "data.test_images=100",
    "data.train_images=64",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "train.epochs=2",
    "train.batch_size=16",
    "train.warmup_epochs=0",
    "teacher.all_images=false",
    "teacher.train.batch_size=16",
    "teacher.train.epochs=2",
    "teacher.train.warmup_epochs=0",
    "teacher.min_top1=null",
    "teacher.allow_weak=true",
    "seeds=[0]",
)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEITKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _hurry() -> Iterator[None]:
    """Leave out what takes time in every comparison and changes none of its figures but times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr("deitkit.comparison.cost.BATCH_SIZES", (8,))
        patch.setattr("deitkit.evaluation.speed.SECONDS_OF_SINGLE", 0.02)
        yield


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Take back what a command that runs in the tests' process sets for its own, such as threads."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the processes that a test started and, since it failed, did not end."""
    started: list[subprocess.Popen[Any]] = []

    class Popen(subprocess.Popen[Any]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


DRAWING: dict[str, Callable[..., Any]] = {
    "prepare.draw_views": draw_views,
    "compare.write_report": write_report,
    "folds.write_report": write_report,
    "ablation.write_report": write_report,
}


@pytest.fixture(autouse=True, scope="module")
def _no_reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave out the pictures and pages of comparisons where nothing looks at them: drawing takes longest here."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in ("comparison", "teachers"):
            for name in DRAWING:
                empty = write_empty_report if name.endswith("write_report") else lambda *_: None
                patch.setattr(f"deitkit.comparison.{name}", empty)
        yield


@pytest.fixture(autouse=True)
def _reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw them for tests with this mark."""
    if request.node.get_closest_marker("reports") is not None:
        draw_reports(monkeypatch)


def draw_reports(patch: pytest.MonkeyPatch) -> None:
    """Draw the pictures and pages of comparisons, for a fixture of a whole module."""
    for name, draw in DRAWING.items():
        patch.setattr(f"deitkit.comparison.{name}", draw)


def write_empty_report(folder: Path) -> list[Path]:
    """Write what tells a later command that a report was written."""
    (folder / REPORT).touch()
    return [folder / REPORT]


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """Return a function: overrides -> the digits recipe, shrunk to seconds."""
    return lambda *overrides: load_recipe("digits", [*TINY, *overrides])


class StopAfter(Watcher):
    """Stops a run after some steps of the cohorts and the teacher together; a validation counts as steps, too."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left <= 0


def poisoned_gradient(name: str, at: int) -> Callable[..., Any]:
    """Return ``Student.backward`` with a loss and a gradient that are not numbers, for one student at one step."""
    backward = Student.backward
    calls = itertools.count()

    def poisoned(self: Student, *inputs: Any, **settings: Any) -> dict[str, torch.Tensor]:
        terms = backward(self, *inputs, **settings)
        if self.name == name and next(calls) == at:
            for parameter in self.classifier.parameters():
                parameter.grad = parameter.grad * float("nan")
            terms = {key: term * float("nan") for key, term in terms.items()}
        return terms

    return poisoned


def striped_dataset(classes: int = 3, per_class: int = 24, image_px: int = 8, channels: int = 3) -> Dataset:
    """Return a data set whose classes are brightnesses, so that anything can learn it."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(classes).repeat(count)
        noise = torch.randint(0, 30, (len(labels), channels, image_px, image_px), generator=generator)
        images = (noise + (200 // classes * labels)[:, None, None, None]).to(torch.uint8)
        return Split(images, labels, hashes=torch.from_numpy(pixel_hashes(images.numpy()).copy()))

    train = split(per_class)
    values = train.images.double() / 255
    mean, std = (tuple(getattr(values, name)(dim=(0, 2, 3)).tolist()) for name in ("mean", "std"))
    names = tuple(f"class {number}" for number in range(classes))
    return Dataset("stripes", train, split(20), split(20), names, mean, std, (), "0" * 64)


@pytest.fixture
def stripes() -> Dataset:
    """Three classes of colour images, 8 x 8."""
    return striped_dataset()


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """Return a function that writes a folder of class folders of PNG files, one colour for each class."""

    def write(
        root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 12, px: int = 16, **parts: Any
    ) -> Path:
        from PIL import Image

        for part in parts.get("parts", ("train", "test")):
            for number, name in enumerate(classes):
                folder = root / part / name
                folder.mkdir(parents=True, exist_ok=True)
                for index in range(count):
                    colour = (40 + 150 * number, 5 * index, 90)
                    Image.new("RGB", (px, px), colour).save(folder / f"{index}.png")
        return root

    return write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["deitkit", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
