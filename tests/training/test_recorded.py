"""The recorded step and compiled blocks as a CPU can prove them: stopped students, recompilation, and memory."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CPU_FP32, striped_dataset
from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import METHODS, SIGNALS
from deitkit.errors import RecipeError
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import AugmentRecipe, StudentTrainRecipe
from deitkit.system.ranks import ALONE, Ranks
from deitkit.teachers.prepare import teacher_cohort, teacher_student
from deitkit.training import cuda_graph
from deitkit.training.build import build_cohort, build_students
from deitkit.training.cohort import Cohort
from training.test_cohort import Teacher, cohort
from training.train_together import build


class Recorder(cuda_graph.Recorder):
    """Holds tensors and records as on a GPU."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled, self.held, self.recordings = True, {}, {}
        self.stream = self.pool = None


class Recording(cuda_graph._Recording):
    """Calls the method where a GPU would record or replay it; the assertion on the inputs is the real one."""

    def __init__(self, stream: None, pool: None) -> None:
        self.calls, self.graph = 0, None

    def run(self, method: Any, *inputs: Tensor | None) -> Any:
        replays = self.graph is not None
        outputs = super().run(method, *inputs)
        return method(*inputs) if replays else outputs

    def _call(self, method: Any, inputs: tuple[Tensor | None, ...]) -> Any:
        return method(*inputs)

    def _record(self, method: Any, inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs, self.graph = inputs, SimpleNamespace(replay=lambda: None)
        self.outputs = method(*inputs)


def test_only_students_in_whose_step_processes_wait_for_each_other_are_not_recorded() -> None:
    trained = build(Ranks(0, 2), ["token-hard", "dist"], StudentTrainRecipe(batch_size=32), AugmentRecipe(), 0)
    assert trained.recorded == {"token-hard"}


def test_batch_norm_of_several_processes_is_not_recorded(stripes: Dataset) -> None:
    """Its modules are then SyncBatchNorm, whose processes wait for each other."""
    chosen = load_recipe("digits", ["methods=[none]", "model.stem=conv", "model.patch_px=4", "model.name=micro"])
    model = Classifier(CifarResNet(20, classes=3), mean=stripes.mean, std=stripes.std)
    recorded = []
    for ranks in (ALONE, Ranks(0, 2)):
        students = build_students(chosen, stripes, 0, CPU_FP32)
        conv = build_cohort(students, chosen, stripes, teacher=None, seed=0, precision=CPU_FP32, ranks=ranks)
        alone = teacher_student("teacher", model, chosen.teacher, CPU_FP32)
        recorded.append(conv.recorded | teacher_cohort(alone, chosen, stripes, CPU_FP32, ranks).recorded)
    assert recorded == [{"none", "teacher"}, set()]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohorts record their steps."""
    monkeypatch.setattr(cuda_graph, "_Recording", Recording)
    monkeypatch.setattr("deitkit.training.cohort.Recorder", Recorder)


@pytest.fixture
def recorded_teacher(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is the teacher of these tests, as one of a library."""
    monkeypatch.setattr(cuda_graph, "LIBRARIES", (*cuda_graph.LIBRARIES, Teacher.__module__.partition(".")[0]))


class Own(nn.Linear):
    """A layer of the user's."""


@pytest.mark.usefixtures("recorded")
def test_code_of_the_users_is_not_recorded(stripes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read a value back, on which a recording fails, or keep a count in Python, which one would freeze."""
    monkeypatch.setitem(METHODS, "own", replace(METHODS["none"], name="own"))
    trained = cohort(["none", "soft", "own"], stripes, teacher=Teacher())
    list(trained.fit())
    assert trained.recorded == {"none", "soft"}
    assert sorted(name for _, name in trained.recorder.recordings) == ["backward"] * 2 + ["optimizer_step"] * 2
    model = trained.students[0].classifier.model
    model.head = Own(model.head.in_features, 3)
    assert not trained.students[0].can_record_backward
    assert trained.students[1].can_record_backward
    monkeypatch.setitem(SIGNALS, "soft", replace(SIGNALS["soft"]))
    assert not trained.students[1].can_record_backward, "a loss in the place of a shipped one"


def test_what_cannot_be_recorded_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = cuda_graph._Recording.__new__(cuda_graph._Recording)  # a stream needs a GPU
    recording.stream = recording.pool = None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **options: nullcontext())

    def fails(message: str) -> None:
        def method() -> None:
            raise RuntimeError(message)

        recording._record(method, ())

    with pytest.raises(RecipeError, match=r"not permitted when stream is capturing\): set speed\.cuda_graphs=false"):
        fails("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="out of memory"):
        fails("CUDA out of memory. Tried to allocate")


def final_weights(trained: Cohort) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.students[0].classifier.model.state_dict().items()}


@pytest.mark.usefixtures("recorded_teacher")
def test_the_recorded_step_goes_on_when_all_taught_students_have_stopped(stripes: Dataset) -> None:
    alone = cohort(["none"], stripes)
    list(alone.fit())
    beside = cohort(["none", "soft", "hard"], stripes, teacher=Teacher())
    for student in beside.students[1:]:
        student.method = Poisoned(student.method)
    list(beside.fit())
    assert [student.stopped is None for student in beside.students] == [True, False, False]
    expected, found = final_weights(alone), final_weights(beside)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class Poisoned:
    """A method whose loss is infinite after the recording."""

    def __init__(self, method: Any) -> None:
        self.method, self.calls = method, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def loss_terms(self, *inputs: Any) -> dict[str, Tensor]:
        self.calls += 1
        factor = float("inf") if self.calls > cuda_graph.WARM_UP + 1 else 1.0
        return {name: factor * term for name, term in self.method.loss_terms(*inputs).items()}


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("recorded_teacher", "without_collector")
def test_a_finished_cohort_leaves_memory_at_once() -> None:
    def finished() -> list[weakref.ref[Any]]:
        trained = cohort(["none", "soft"], striped_dataset(), teacher=Teacher())
        list(trained.fit())
        return [weakref.ref(trained), *(weakref.ref(student.classifier) for student in trained.students)]

    assert [reference() for reference in finished()] == [None] * 3


COMPILED = """
import gc, weakref
import torch
from torch._dynamo.testing import CompileCounter
from deitkit.models.accelerate import accelerate, forget_compiled, release
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.speed import SpeedRecipe

counter, plain = CompileCounter(), torch.compile
torch.compile = lambda function, **options: plain(function, backend=counter, **options)

def compiled(width, tokens):
    config = {"image_px": 8, "patch_px": 4, "channels": 3, "classes": 3, "depth": 2, "heads": 2, "drop_path": 0.1}
    classifier = Classifier(DeiT(width=width, tokens=tokens, **config), mean=(0.5,) * 3, std=(0.5,) * 3)
    return accelerate(classifier, SpeedRecipe(compile=True), torch.device("cpu")).train()

for width in (8, 16, 32, 48, 64):
    for tokens in (("class",), ("class", "distillation"), ()):
        before = counter.frame_count
        compiled(width, tokens)(torch.rand(2, 3, 8, 8))
        assert counter.frame_count > before, f"width {width}, {tokens} runs uncompiled"
gc.collect()
gc.disable()
classifier = compiled(64, ("class",))
classifier(torch.rand(2, 3, 8, 8))
block = weakref.ref(classifier.model.blocks[0])
release(classifier)
del classifier
assert block() is None, "a released student stays in memory"
found = counter.frame_count
torch._dynamo.config.recompile_limit = 4
from deitkit.models import accelerate as module
module.RECOMPILATIONS = 4
for width in (72, 80, 88, 96, 104, 112):  # comparisons of one process
    forget_compiled()
    compiled(width, ("class",))(torch.rand(2, 3, 8, 8))
print("compiled", found)
"""


def test_every_shape_of_a_comparison_is_compiled_and_leaves_memory_once_released() -> None:
    # In a process of its own, since the type checks of the tests are not compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 15
