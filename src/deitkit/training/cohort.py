"""The training step of a cohort, and the loop around it.

All students of a cohort see the same views and the same teacher logits, in lock-step. A CNN that is trained on labels
alone (a teacher, the baseline) is a cohort of one student with the method ``none``.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from deitkit.data.dataset import Dataset
from deitkit.errors import Interrupted, OutOfMemory, is_out_of_memory
from deitkit.evaluation.predict import predict_all
from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
from deitkit.recipe.schema import AugmentRecipe, TrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.metrics import EpochMetrics
from deitkit.run.observer import StepProgress
from deitkit.system.device import Precision
from deitkit.system.ranks import ALONE, Ranks
from deitkit.system.seeding import derived_seed
from deitkit.system.timer import Pace, Stopwatch
from deitkit.training.cuda_graph import Recorder, is_of_libraries
from deitkit.training.micro_batches import has_batch_norm
from deitkit.training.optim import learning_rate
from deitkit.training.student import Student
from deitkit.training.views import Views

LOG_EVERY = 50  # steps between two synchronisations with the device
STOP_EVERY = 10  # steps between two agreements of processes on whether to stop
WATCHED = ("step", "waiting", "views", "teacher")


@runtime_checkable
class LogitLookup(Protocol):
    """A store of the teacher's logits for the views of a cohort."""

    def get(self, epoch: int, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """Return the logits for the view of a step (epoch and step from 0), computing them if they are not stored."""


class Cohort:
    """Students that train in lock-step under one seed.

    Args:
        students: On the device, with distinct names.
        teacher: Maps views in [0, 1] to logits; None if no student needs one.
        dataset: Training images to train on; validation images for the curves only, which select nothing.
        augment: Augmentation of the views.
        train: Epochs, label smoothing, schedule.
        speed: Settings that do not change results by more than rounding.
        precision: Of the forward passes.
        seed: Of the views and of dropout.
        logit_cache: Store of the teacher's logits; None computes them at every step.
        unlabelled_in_step: Images without labels in a step, at most as many as there are; 0 for none.
        balanced: Whether an epoch has as many images of every class.
        ranks: Processes that share every step, each of which has built the same cohort; see ``ranks_that_share``.
    """

    def __init__(
        self,
        students: list[Student],
        *,
        teacher: nn.Module | None,
        dataset: Dataset,
        augment: AugmentRecipe,
        train: TrainRecipe,
        speed: SpeedRecipe,
        precision: Precision,
        seed: int,
        logit_cache: LogitLookup | None = None,
        unlabelled_in_step: int = 0,
        balanced: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.students = students
        self.ranks = ranks
        self.teacher = teacher
        self.device = precision.device
        taught = any(student.method.teacher_signal for student in students)
        self.views = Views(
            dataset, augment, train, seed, self.device,
            unlabelled_in_step=unlabelled_in_step if taught else 0, balanced=balanced, ranks=ranks,
        )  # fmt: skip
        self.batches = self.views.batches
        self.validation = dataset.validation.to(self.device)
        self.train_recipe = train
        self.precision = precision
        self.micro_batch_size = speed.micro_batch_size
        self.seed = seed
        self.logit_cache = logit_cache
        if ranks.count > 1:
            self._share_students()
        self.recorder = Recorder(self.device, speed.cuda_graphs and not speed.checkpoint_activations)
        self.recorded = {student.name for student in students if student.can_record_backward}
        self._records_teacher = teacher is not None and is_of_libraries(teacher)
        self.epoch, self.step = 0, 0  # the next ones to train, from 0
        self.reset_watches()

    def _share_students(self) -> None:
        """Let students compute this process's part of a step."""
        from timm.layers import convert_sync_batchnorm  # here, since it takes a second to import

        for student in self.students:
            student.share(self.ranks, self.batches.batch_size, self.views.unlabelled_in_step)
            if has_batch_norm(student.classifier.model):
                student.classifier.model = convert_sync_batchnorm(student.classifier.model)

    def reset_watches(self, seconds: dict[str, float] | None = None) -> None:
        """Reset the stopwatches of an epoch: whole steps, waiting for images, making views, and the teacher."""
        self.watches = {name: Stopwatch(self.device, (seconds or {}).get(name, 0.0)) for name in WATCHED}
        self._pace = Pace(self.step if seconds else 0, self.watches["step"].seconds)

    @property
    def active(self) -> list[Student]:
        """The students that still train."""
        return [student for student in self.students if student.stopped is None]

    @property
    def _is_taught(self) -> bool:
        """Whether a student that still trains learns from the teacher."""
        return any(student.method.teacher_signal for student in self.active)

    @property
    def images_in_step(self) -> int:
        """Images of a step, with labels and without."""
        return self.batches.batch_size + self.views.unlabelled_in_step

    def train_step(
        self,
        images: UInt8[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"],
        unlabelled: UInt8[Tensor, "unlabelled channels height width"] | None = None,
    ) -> None:
        """Train every student on one batch: one view, the teacher's logits for it, then each student's update."""
        step = self.global_step
        with self.watches["views"]:
            view, targets = self.make_view(images, labels, step, unlabelled)
        with self.watches["teacher"]:
            teacher_logits = self._teacher_logits(view)
        label_targets = self._label_targets(targets)
        for student in self.active:
            # Processes have different images, and so draw different masks; rank 0 draws those of a single process.
            names = ("dropout", step) if self.ranks.rank == 0 else ("dropout", step, self.ranks.rank)
            torch.manual_seed(derived_seed(self.seed, *names))
            with student.watch:
                # A recording must read the same tensors at every step, and logits are no longer computed once no active
                # student needs them.
                logits = teacher_logits if student.method.teacher_signal else None
                is_recorded = student.name in self.recorded
                terms = self.recorder.run(student.backward, view, targets, logits, label_targets, record=is_recorded)
                student.sum_over_ranks(terms)
                with student.optimizer_watch:
                    student.set_learning_rate(self.rate(student, step))
                    # Without a recording, each step has gradients at other addresses.
                    can_record = is_recorded and student.can_record_optimizer_step
                    self.recorder.run(student.optimizer_step, record=can_record)
                    student.update_ema()
                student.accumulate_loss(terms, step)

    def make_view(
        self,
        images: UInt8[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"],
        step: int,
        unlabelled: UInt8[Tensor, "unlabelled channels height width"] | None = None,
    ) -> tuple[Float[Tensor, "all channels height width"], Float[Tensor, "batch classes"]]:
        """Return the view of a step of the run, and the targets of its images with labels, which come first."""
        view, targets = self.views.make(images, labels, step, unlabelled)
        return self.recorder.hold("view", view), self.recorder.hold("targets", targets)

    def _label_targets(self, targets: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"] | None:
        """Return the targets of the labels' term, of images that are weighted by their class; None if they are not."""
        weighted = self.views.weigh(targets)
        return None if weighted is None else self.recorder.hold("label targets", weighted)

    def _teacher_logits(
        self, view: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"] | None:
        """Return the teacher's logits for the view of this step; None if no student needs them."""
        if self.teacher is None or not self._is_taught:
            return None
        compute = partial(self.recorder.run, self.teacher_forward, view, record=self._records_teacher)
        cache = self.logit_cache
        logits = compute() if cache is None else cache.get(self.epoch, self.step, compute)
        return self.recorder.hold("teacher logits", logits)

    def teacher_forward(self, view: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the teacher's logits for a view, in the precision of the run and the micro-batches that it names."""
        assert self.teacher is not None
        with self.precision.autocast():
            if not isinstance(self.micro_batch_size, int):
                return self.teacher(view)
            return torch.cat([self.teacher(part) for part in view.split(self.micro_batch_size)])

    def rate(self, student: Student, step: int) -> float:
        """Return a student's learning rate at a step of the run."""
        return learning_rate(step, self.batches.steps_per_epoch, student.recipe, self.train_recipe)

    def fit(
        self, on_step: Callable[[StepProgress], None] | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[list[EpochMetrics]]:
        """Train until the last epoch, and yield each epoch's metrics, of each student.

        The cohort can be saved whenever the iterator is suspended or has ended, however it ended.

        Args:
            on_step: Called every few steps, after synchronising with the device.
            should_stop: Called after every step, and after every batch of a validation; an interrupted validation is
                repeated on resume. Where processes share the steps, called every few of them, and any process stops
                all.

        Raises:
            Interrupted: ``should_stop`` returned True.
        """
        for student in self.students:
            student.classifier.train()
        with closing(self.views):
            while self.epoch < self.train_recipe.epochs and self.active:
                batches = self.batches.epoch(self.epoch, self.step)
                while self.step < self.batches.steps_per_epoch and self.active:
                    self.next_step(batches)
                    self._after_step(on_step, should_stop)
                metrics = self._close_epoch(should_stop)
                self.epoch, self.step = self.epoch + 1, 0
                yield metrics

    def _after_step(self, on_step: Callable[[StepProgress], None] | None, should_stop: Callable[[], bool]) -> None:
        # Reading values back waits for the device: on a GPU only every few steps.
        on_cpu, last = self.device.type == "cpu", self.step == self.batches.steps_per_epoch
        if on_cpu or last or self.step % LOG_EVERY == 0:
            self._stop_diverged()
            if on_step is not None:
                on_step(self._progress())
        # The flags of processes travel on the CPU, and no device is waited for; torchrun allows 30 seconds.
        alone, due = self.ranks.count == 1, on_cpu or last or self.step % STOP_EVERY == 0
        if should_stop() if alone else due and self.ranks.any(should_stop()):
            raise Interrupted

    def next_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Train on the next batch of the epoch."""
        try:
            with self.watches["step"]:
                with self.watches["waiting"]:
                    images, labels = next(batches)
                    # A recording must read a view of the same size at every step.
                    is_used = self._is_taught or self.recorder.enabled
                    unlabelled = self.views.unlabelled_images(self.global_step) if is_used else None
                self.train_step(images, labels, unlabelled)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from error
        self.step += 1

    def _out_of_memory(self) -> OutOfMemory:
        sizes = (one.micro_batch_size for one in self.active if one.least_micro_batch_size < one.micro_batch_size)
        models = (student.classifier.model for student in self.active)
        return OutOfMemory(
            self.batches.batch_size,
            len(self.batches.places),
            max(sizes, default=1),
            can_recompute=any(getattr(model, "checkpoint_activations", None) is False for model in models),
        )

    @property
    def global_step(self) -> int:
        """The next step of the run, from 0."""
        return self.epoch * self.batches.steps_per_epoch + self.step

    def _stop_diverged(self) -> None:
        for student in self.active:
            if self.step == self.batches.steps_per_epoch:
                student.check_weights(self.global_step - 1)
            student.stop_if_not_finite(lambda step, student=student: self.rate(student, step))  # type: ignore[misc]

    def _progress(self) -> StepProgress:
        left = self.train_recipe.epochs * self.batches.steps_per_epoch - self.global_step
        seconds_per_step = self._pace.mark(self.step, self.watches["step"].seconds)
        return StepProgress(
            seed=self.seed,
            epoch=self.epoch + 1,
            epochs=self.train_recipe.epochs,
            step=self.step,
            steps_per_epoch=self.batches.steps_per_epoch,
            images_per_second=self.batches.batch_size / seconds_per_step,
            seconds_left=left * seconds_per_step,
            losses={student.name: float(sum(student.term_sums.values())) / self.step for student in self.active},
        )

    def _close_epoch(self, should_stop: Callable[[], bool]) -> list[EpochMetrics]:
        """Validate, return the epoch's metrics, and reset its sums."""
        steps = self.batches.steps_per_epoch
        last_step = (self.epoch + 1) * steps - 1
        shares = self.shares()
        metrics = []
        for student, accuracy in zip(self.active, self._validate(should_stop), strict=True):
            terms = {name: float(total) / steps for name, total in student.term_sums.items()}
            metrics.append(
                EpochMetrics(
                    seed=self.seed,
                    student=student.name,
                    epoch=self.epoch + 1,
                    epochs=self.train_recipe.epochs,
                    step=last_step + 1,
                    train_loss=sum(terms.values()),
                    terms=terms,
                    validation=accuracy,
                    learning_rate=self.rate(student, last_step),
                    images_per_second=steps * self.batches.batch_size / student.watch.seconds,
                    seconds=student.watch.seconds,
                    cohort_images_per_second=steps * self.batches.batch_size / self.watches["step"].seconds,
                    shares=shares,
                )
            )
            student.mark_good()
        for student in self.students:  # stopped ones too
            student.reset_meters()
        self.reset_watches()
        return metrics

    def shares(self) -> dict[str, float]:
        """Return the parts of the time of the epoch's steps, as fractions; wait for the device."""
        parts = {name: self.watches[name].seconds for name in WATCHED[1:]}
        parts["optimizers"] = sum(student.optimizer_watch.seconds for student in self.students)
        parts["students"] = sum(student.watch.seconds for student in self.students) - parts["optimizers"]
        return {name: seconds / self.watches["step"].seconds for name, seconds in parts.items()}

    def _validate(self, should_stop: Callable[[], bool]) -> list[dict[str, float]]:
        """Return each active student's accuracy by every readout."""
        classifiers = [student.classifier for student in self.active]

        def stop(done: int) -> None:
            if self.ranks.count == 1 and should_stop():
                raise Interrupted

        outputs = predict_all(classifiers, self.validation, self.precision, stop, self.ranks)
        labels = self.validation.labels.cpu()
        return [
            {readout: top_k_accuracy(scores, labels) for readout, scores in readout_scores(output).items()}
            for output in outputs
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from; random numbers are not part of it, since they follow from the step."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": {name: watch.seconds for name, watch in self.watches.items()},
            "students": {student.name: student.state_dict(between_epochs=self.step == 0) for student in self.students},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of ``state_dict``."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.reset_watches(state["seconds"])
        for student in self.students:
            student.load_state_dict(state["students"][student.name])
