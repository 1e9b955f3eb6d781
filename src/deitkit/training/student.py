"""A classifier in training: method, optimizers, averaged weights, last good state, and the sums of the epoch."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deitkit.distillation.methods import Method, is_shipped
from deitkit.models.classifier import Classifier
from deitkit.models.vit import Output
from deitkit.recipe.schema import DistillationRecipe, OptimizerRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.system.device import Precision
from deitkit.system.ranks import ALONE, Ranks
from deitkit.system.timer import Stopwatch
from deitkit.training.cuda_graph import is_of_libraries
from deitkit.training.micro_batches import choose_micro_batch_size, has_batch_norm, micro_batches
from deitkit.training.optim import (
    ExponentialMovingAverage,
    build_optimizers,
    can_be_recorded,
    gathered_state,
    restore_state,
    set_rate,
)


class Student:
    """A classifier in training, with its method, optimizers and averaged weights.

    Args:
        name: Its name in logs and folders.
        method: Its tokens and loss terms.
        classifier: On its device.
        recipe: Its optimizer and learning rate.
        precision: Of its forward pass.
        batch_size: Images of a step.
        distillation: Weights and temperatures of the loss terms.
        speed: The size of its micro-batches.
        ema_decay: Decay of the average of its weights; None for no average.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        classifier: Classifier,
        recipe: OptimizerRecipe,
        *,
        precision: Precision,
        batch_size: int,
        distillation: DistillationRecipe = DistillationRecipe(),  # noqa: B008 - immutable
        speed: SpeedRecipe = SpeedRecipe(),  # noqa: B008 - immutable
        ema_decay: float | None = None,
    ) -> None:
        self.name = name
        self.method = method
        self.classifier = classifier
        self.recipe = recipe
        self.precision = precision
        self.distillation = distillation
        self.micro_batch_size, self.least_micro_batch_size = (
            choose_micro_batch_size(classifier, batch_size, one, precision, method.needs_whole_batch)
            for one in (speed, SpeedRecipe(micro_batch_size=1))
        )
        self.optimizers = build_optimizers(classifier.model, recipe)
        self.average = ExponentialMovingAverage(classifier, ema_decay) if ema_decay is not None else None
        self.stopped: str | None = None
        self.ranks, self.step_sizes = ALONE, (0, 0)
        self.good = self._snapshot()
        self.reset_meters()

    def reset_meters(self) -> None:
        """Reset the sums of the epoch."""
        device = self.classifier.mean.device
        self.watch, self.optimizer_watch = Stopwatch(device), Stopwatch(device)
        self.term_sums: dict[str, Tensor] = {}
        self.bad_step = torch.full((), -1, device=device, dtype=torch.long)

    def share(self, ranks: Ranks, labelled: int, unlabelled: int) -> None:
        """Compute only this process's part of the gradient of a step; ``sum_over_ranks`` makes it whole.

        Args:
            ranks: The processes of the run.
            labelled: Images with labels of a step, of all processes.
            unlabelled: Images without labels, likewise.
        """
        self.ranks, self.step_sizes = ranks, (labelled, unlabelled)
        if self.average is not None:
            self.average.forget()  # BatchNorm may become SyncBatchNorm, other modules

    def backward(
        self,
        view: Float[Tensor, "batch channels height width"],
        targets: Float[Tensor, "labelled classes"],
        teacher_logits: Float[Tensor, "batch classes"] | None,
        label_targets: Float[Tensor, "labelled classes"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute the gradient of the method's loss, micro-batch by micro-batch, and return the terms of the loss.

        Images without labels follow those with labels. The term of the labels is a mean over the images with labels,
        that of the teacher a weighted mean over all. A method without a term of the teacher does not see the others.
        Where processes share a step, means are over the images of all of them, and terms and gradient are this
        process's summands.

        Args:
            view: Augmented images, values in [0, 1].
            targets: Class probabilities from the labels, mixed and smoothed, of the images with labels.
            teacher_logits: Of the same view; None if the method has no term of the teacher.
            label_targets: Of the labels' term, where its images have weights; by default ``targets``.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        labelled_here, weight = len(targets), self.distillation.unlabelled_weight
        images_here = len(view) if teacher_logits is not None else labelled_here
        labelled, unlabelled = labelled_here, images_here - labelled_here
        if self.ranks.count > 1:
            labelled, unlabelled = self.step_sizes
        in_teacher_term = labelled + weight * unlabelled
        sums: dict[str, Tensor] = {}
        for part in micro_batches(self.micro_batch_size, (0, labelled_here), (labelled_here, images_here)):
            with self.precision.autocast():
                output = self.classifier(view[part])
            part_logits = None if teacher_logits is None else teacher_logits[part]
            has_labels = part.start < labelled_here
            part_targets = targets[part] if has_labels else None
            own_targets = label_targets[part] if has_labels and label_targets is not None else None
            images: float = part.stop - part.start  # each term is a mean over the images of the micro-batch
            if self.method.needs_whole_batch and self.ranks.count > 1:
                whole = labelled if has_labels else unlabelled
                output, part_logits, part_targets, own_targets = self._gathered(
                    output, part_logits, part_targets, own_targets, count=whole
                )
                images = whole / self.ranks.count  # every process computes the same term
            terms = self.method.loss_terms(output, part_logits, part_targets, self.distillation, own_targets)
            shares = {"labels": images / labelled, "teacher": (1 if has_labels else weight) * images / in_teacher_term}
            terms = {name: term * shares[name] for name, term in terms.items()}
            torch.stack(list(terms.values())).sum().backward()
            sums |= {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
        return sums

    def _gathered(self, output: Output, *rows: Float[Tensor, "part classes"] | None, count: int) -> tuple[Any, ...]:
        """Return a student's output, and rows such as the teacher's logits, of all ``count`` images of a step."""
        sizes = [len(self.ranks.places(count, rank)) for rank in range(self.ranks.count)]
        class_logits, distillation_logits, *others = (
            None if row is None else self.ranks.gather(row, sizes)
            for row in (output.class_logits, output.distillation_logits, *rows)
        )
        return Output(class_logits, distillation_logits), *others

    def sum_over_ranks(self, terms: dict[str, Float[Tensor, ""]]) -> None:
        """Add up the gradients and the terms of ``backward`` of all processes, in place."""
        if self.ranks.count > 1:
            gradients = [each.grad for each in self.classifier.parameters() if each.grad is not None]
            self.ranks.sum_in_place([*gradients, *terms.values()])

    def optimizer_step(self) -> None:
        """Clip the gradient and update the weights, without waiting for the device."""
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.classifier.parameters(), self.recipe.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()

    @property
    def can_record_backward(self) -> bool:
        """Whether a CUDA graph may replay ``backward``: no process waits in it, and no code of the user's runs."""
        model = self.classifier.model
        waits = self.ranks.count > 1 and (self.method.needs_whole_batch or has_batch_norm(model))
        return not waits and is_shipped(self.method) and is_of_libraries(model)

    @property
    def can_record_optimizer_step(self) -> bool:
        """Whether a CUDA graph may replay ``optimizer_step``."""
        return all(can_be_recorded(optimizer) for optimizer in self.optimizers)

    def update_ema(self) -> None:
        """Update the average of the weights; not part of a recording, since the decay changes from step to step."""
        if self.average is not None:
            self.average.update(self.classifier)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)

    def accumulate_loss(self, terms: dict[str, Float[Tensor, ""]], step: int) -> None:
        """Add the terms of a step to the sums of the epoch, and record the first step whose loss is not finite."""
        loss = torch.stack(list(terms.values())).sum()
        first_bad = ~torch.isfinite(loss) & (self.bad_step < 0)
        self.bad_step = torch.where(first_bad, step, self.bad_step)
        for name, term in terms.items():
            self.term_sums[name] = self.term_sums.get(name, 0) + term

    def check_weights(self, step: int) -> None:
        """Record a step after which a weight is not finite, which its own loss does not show."""
        finite = torch.stack([weight.isfinite().all() for weight in self.classifier.parameters()]).all()
        self.bad_step = torch.where(~finite & (self.bad_step < 0), step, self.bad_step)

    def stop_if_not_finite(self, rate_of: Callable[[int], float]) -> None:
        """If a loss or a weight was not finite, restore the last good state and stop."""
        bad_step = int(self.bad_step)
        if bad_step >= 0 and self.stopped is None:
            rate = f"learning rate {rate_of(bad_step):.3g}"
            self.stopped = f"stopped at step {bad_step + 1}: the loss or a weight is not finite ({rate})"
            self._restore(self.good)

    def mark_good(self) -> None:
        """Keep the current weights as the last good state."""
        if self.stopped is None:
            self.good = self._snapshot()

    def state_dict(self, *, between_epochs: bool) -> dict[str, Any]:
        """Return the state to resume from, in tensors and plain values only.

        Between two epochs the last good weights are the current ones, and are not stored again.
        """
        return {
            "model": self.classifier.model.state_dict(),
            "optimizers": [gathered_state(optimizer) for optimizer in self.optimizers],
            "average": self.average.classifier.state_dict() if self.average else None,
            "average_updates": self.average.updates if self.average else 0,
            "good": None if between_epochs else self.good,
            "stopped": self.stopped,
            "seconds": self.watch.seconds,
            "optimizer_seconds": self.optimizer_watch.seconds,
            "term_sums": self.term_sums,
            "bad_step": self.bad_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of ``state_dict``."""
        self.classifier.model.load_state_dict(state["model"])
        for optimizer, gathered in zip(self.optimizers, state["optimizers"], strict=True):
            restore_state(optimizer, gathered)
        if self.average is not None:
            self.average.classifier.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        device = self.bad_step.device
        self.good = self._snapshot() if state["good"] is None else _to(state["good"], device)
        self.stopped, self.watch = state["stopped"], Stopwatch(device, state["seconds"])
        self.optimizer_watch = Stopwatch(device, state["optimizer_seconds"])
        self.term_sums, self.bad_step = _to(state["term_sums"], device), state["bad_step"].to(device)

    def _snapshot(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": value for name, value in self.classifier.state_dict().items()}
        if self.average is not None:
            weights |= {f"average.{name}": value for name, value in self.average.classifier.state_dict().items()}
        return {name: value.detach().clone() for name, value in weights.items()}

    def _restore(self, snapshot: dict[str, Tensor]) -> None:
        holder = nn.ModuleDict({"model": self.classifier})
        if self.average is not None:
            holder["average"] = self.average.classifier
        holder.load_state_dict(snapshot)


def _to(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
