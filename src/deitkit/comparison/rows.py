"""From predictions to rows: a comparison's accuracies, differences, significance, winner and verdict.

Pure functions of the students' predictions; nothing here trains or draws.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from deitkit.comparison.verdict import Standing, verdict
from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import copies_in_validation
from deitkit.distillation.methods import METHODS, reference_method
from deitkit.evaluation.readouts import balanced_accuracy, macro_f1, top_k_accuracy, top_k_hits
from deitkit.evaluation.statistics import (
    are_equal,
    clipped,
    holm,
    mean_interval,
    mean_of_finished,
    paired_difference,
    std_of_finished,
    wilson_interval,
)
from deitkit.recipe.schema import Recipe
from deitkit.run.difference import Difference, Reference
from deitkit.run.layout import BASELINE
from deitkit.run.metrics import EpochMetrics
from deitkit.run.reported import default_readout, reported_rows
from deitkit.run.results import Row, SomeRow, with_difference
from deitkit.system.device import Precision
from deitkit.system.words import as_sentence, counted
from deitkit.teachers.resolution import TeacherLogits
from deitkit.training.build import baseline_architecture

Hits = dict[int, Bool[Tensor, " n"]]  # by seed, which test images are classified correctly
Key = TypeVar("Key")
_REFERENCES: tuple[Reference, ...] = ("labels", "teacher", "baseline")

FREQUENT = 1.5  # a class with this many times the mean number of images counts as frequent


@dataclass(frozen=True)
class StudentPredictions:
    """What is kept of a student's training under one seed.

    Attributes:
        status: None, or why it stopped.
        parameters: Of the model.
        scores: By weights (``last``, ``ema``), split and readout, as float32 on the CPU.
        machine: On which they were computed; None in files of earlier versions.
    """

    status: str | None
    parameters: int
    scores: dict[str, dict[str, dict[str, Float[Tensor, "n classes"]]]]
    machine: dict[str, Any] | None = None


Predictions = Mapping[int, Mapping[str, StudentPredictions]]  # seed -> student


@dataclass(frozen=True)
class Summary:
    """The part of the results that follows from predictions alone."""

    rows: tuple[Row, ...]
    winner: Row | None
    verdict: str
    notes: tuple[str, ...]


def summarise(
    recipe: Recipe,
    dataset: Dataset,
    predictions: Predictions,
    teacher: TeacherLogits | None,
    metrics: Iterable[EpochMetrics],
) -> Summary:
    """Return rows, winner, verdict and notes.

    Args:
        recipe: Of the comparison.
        dataset: Its test and validation labels.
        predictions: For each seed and student.
        teacher: Of the test images: students agree with it on their views, and are compared with it as it is used.
        metrics: Of the run, for its speed.
    """
    speed = _speed(metrics)
    decisions = None if teacher is None else teacher.on_views.argmax(dim=-1)
    teacher_hits = None if teacher is None else teacher.as_used.argmax(dim=-1) == dataset.test.labels
    rows = [
        _row(key, recipe, dataset, predictions, (decisions, teacher_hits), speed.get(key.student, _NO_SPEED))
        for key in _row_keys(predictions[recipe.seeds[0]])
    ]
    for reference in _REFERENCES:
        rows = corrected(corrected(rows, reference), reference, "balanced")
    winner = best_row(rows, recipe.compare.by)
    standing = _standing(winner, recipe, dataset, predictions, teacher_hits)
    return Summary(tuple(rows), winner, verdict(standing, rows), tuple(_notes(recipe, dataset)))


def note_on_stops(rows: Sequence[Row], recipe: Recipe) -> tuple[str, ...]:
    """Return what to change where students stopped, which they do when a loss is not finite."""
    stopped = {row.row.rpartition("/")[0]: row.kind for row in rows if row.status != "ok"}
    if not stopped:
        return ()
    rates = {f"{'baseline' if kind == 'baseline' else 'train'}.learning_rate" for kind in stopped.values()}
    precision = ", or set train.precision=fp32" if Precision.here(recipe).name == "bf16" else ""
    return (f"{', '.join(stopped)} stopped: lower {' and '.join(sorted(rates))}{precision}.",)


def corrected(rows: Sequence[SomeRow], reference: Reference, by: str = "accuracy") -> list[SomeRow]:
    """Return the rows with p values corrected for the number of rows that differ from a reference."""
    found = {place: row.differences_by(by).get(reference) for place, row in enumerate(rows)}
    differences = {place: difference for place, difference in found.items() if difference is not None}
    holms = corrected_differences(differences)
    return [with_difference(row, reference, holms.get(place), by) for place, row in enumerate(rows)]


def corrected_differences(differences: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Return differences with p values corrected for their number (Holm)."""
    values = holm([difference.p for difference in differences.values()])
    return {
        key: replace(difference, p_holm=value)
        for (key, difference), value in zip(differences.items(), values, strict=True)
    }


@dataclass(frozen=True)
class RowKey:
    """What a row is of: a student, its weights and a readout."""

    student: str
    weights: str
    readout: str

    @classmethod
    def of(cls, row: Row) -> "RowKey":
        """Return the key of a row."""
        return cls(row.method, row.weights, row.readout)

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.student}/{self.readout}" + ("+ema" if self.weights == "ema" else "")

    def hits(self, predictions: Predictions, labels: Int64[Tensor, " n"], split: str = "test") -> Hits:
        """Return which images of a split the row gets right, for each seed that did not stop."""
        return {seed: top_k_hits(scores, labels) for seed, scores in self.scores(predictions, split).items()}

    def scores(self, predictions: Predictions, split: str) -> dict[int, Float[Tensor, "n classes"]]:
        """Return the row's scores, for each seed that did not stop."""
        students = {seed: students[self.student] for seed, students in predictions.items()}
        return {
            seed: student.scores[self.weights][split][self.readout]
            for seed, student in students.items()
            if student.status is None
        }


def _row_keys(students: Mapping[str, StudentPredictions]) -> Iterator[RowKey]:
    for name, student in students.items():
        for weights, splits in student.scores.items():
            for readout in splits["test"]:
                yield RowKey(name, weights, readout)


def _row(
    key: RowKey,
    recipe: Recipe,
    dataset: Dataset,
    predictions: Predictions,
    teacher: tuple[Int64[Tensor, " n"] | None, Bool[Tensor, " n"] | None],
    speed: dict[str, float | None],
) -> Row:
    """Describe one student and readout over all seeds; a stopped seed has no accuracy and leaves the statistics."""
    labels, seeds = dataset.test.labels, recipe.seeds
    teacher_decisions, teacher_hits = teacher
    hits = key.hits(predictions, labels)
    scores = key.scores(predictions, "test")
    validation = key.scores(predictions, "validation")
    top1 = {seed: hits[seed].double().mean().item() for seed in hits}
    top5 = {seed: top_k_accuracy(scores[seed], labels, 5) for seed in scores} if dataset.classes > 5 else None
    held_out = dataset.validation.labels
    validation_top1 = {seed: top_k_accuracy(some, held_out) for seed, some in validation.items()}
    validation_balanced = {seed: balanced_accuracy(some, held_out) for seed, some in validation.items()}
    stopped = {seed: predictions[seed][key.student].status for seed in seeds if seed not in scores}
    values = list(top1.values())
    reference = _reference(predictions)
    others: dict[Reference, Hits] = {}
    if reference is not None and key.student != reference.student:
        others["labels"] = reference.hits(predictions, labels)
    if teacher_hits is not None:  # which are the same for all seeds
        others["teacher"] = dict.fromkeys(hits, teacher_hits)
    if BASELINE in next(iter(predictions.values())) and key.student != BASELINE:
        others["baseline"] = RowKey(BASELINE, "last", "class").hits(predictions, labels)
    row = Row(
        row=key.name,
        **_method_fields(key, recipe),
        readout=key.readout,
        weights=key.weights,
        reference=key == reference,
        top1=tuple(top1.get(seed) for seed in seeds),
        top5=None if top5 is None else tuple(top5.get(seed) for seed in seeds),
        n=len(labels),
        top1_mean=mean_of_finished(values),
        top1_std=std_of_finished(values),
        top1_ci95=_interval(values, len(labels)),
        validation_top1=tuple(validation_top1.get(seed) for seed in seeds),
        validation_balanced=tuple(validation_balanced.get(seed) for seed in seeds),
        balanced_accuracy=mean_of_finished(balanced_accuracy(some, labels) for some in scores.values()),
        macro_f1=mean_of_finished(macro_f1(some, labels) for some in scores.values()),
        differences={},
        teacher_agreement=None
        if teacher_decisions is None
        else mean_of_finished(top_k_accuracy(each, teacher_decisions) for each in scores.values()),
        parameters=predictions[seeds[0]][key.student].parameters,
        status="; ".join(f"seed {seed} {status}" for seed, status in stopped.items()) or "ok",
        **speed,
    )
    for name, other in others.items():
        row = with_difference(row, name, paired_over_seeds(hits, other))
        if recipe.compare.by == "balanced":
            row = with_difference(row, name, paired_over_seeds(hits, other, labels), "balanced")
    return row


def _method_fields(key: RowKey, recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a row that its method decides; the baseline learns from labels alone."""
    if key.student == BASELINE:
        assert recipe.baseline is not None
        start = ", pretrained" if recipe.baseline.is_pretrained else ""
        title, kind = f"CNN baseline ({baseline_architecture(recipe)}{start}), labels alone", "baseline"
        facts = {"labels": True, "teacher": None, "tokens": "-"}
    else:
        method = METHODS[key.student]
        title, kind = method.title_of(key.readout), "student"
        facts = {"labels": method.uses_labels, "teacher": method.teacher_signal, "tokens": method.token_layout}
    label = f"{title}, EMA" if key.weights == "ema" else title
    return {"label": label, "method": key.student, "kind": kind} | facts


def _interval(values: Sequence[float], n: int) -> tuple[float, float] | None:
    """Return the interval over seeds; over the images for one seed, or for seeds that are all equal."""
    if not values:
        return None
    return wilson_interval(round(values[0] * n), n) if are_equal(values) else clipped(mean_interval(values))


def _reference(predictions: Predictions) -> RowKey | None:
    """Return the row that others are compared with: of a student without a teacher, from the last weights."""
    students = next(iter(predictions.values()))
    name = reference_method(students)
    return None if name is None else RowKey(name, "last", default_readout(list(students[name].scores["last"]["test"])))


def paired_over_seeds(hits: Hits, other: Hits, labels: Int64[Tensor, " n"] | None = None) -> Difference | None:
    """Return the difference of two rows over the seeds that both finished; None where there is no such seed.

    With ``labels``, it is one of balanced accuracies.
    """
    seeds = [seed for seed in hits if seed in other]
    if not seeds:
        return None
    return paired_difference([hits[seed] for seed in seeds], [other[seed] for seed in seeds], labels)


_NO_SPEED: dict[str, float | None] = {"images_per_second": None, "train_seconds": None}


def _speed(metrics: Iterable[EpochMetrics]) -> dict[str, dict[str, float | None]]:
    """Return each student's own images/s and seconds per seed, without the part that all students share.

    A seed under which a student stopped counts only where it finished under none.
    """
    lines: dict[str, dict[int, list[EpochMetrics]]] = {}
    for line in metrics:
        lines.setdefault(line.student, {}).setdefault(line.seed, []).append(line)
    speeds: dict[str, dict[str, float | None]] = {}
    for name, seeds in lines.items():
        finished = [each for each in seeds.values() if each[-1].epoch == each[-1].epochs] or list(seeds.values())
        timed = [(line.seconds or 0.0, line.images_per_second or 0.0) for each in finished for line in each]
        seconds = sum(taken for taken, _ in timed)
        images = sum(taken * pace for taken, pace in timed)
        speeds[name] = {"images_per_second": images / seconds, "train_seconds": seconds / len(finished)}
    return speeds


def best_row(rows: Sequence[Row], by: str) -> Row | None:
    """Return the student's row with the best mean validation accuracy (or balanced); the test set chooses nothing.

    Of a student with two heads only the joint readout of the paper may win; of equals the first.
    """
    candidates = [row for row in reported_rows(rows) if row.kind == "student" and row.status == "ok"]
    # The means of equal sums differ by rounding.
    return max(candidates, key=lambda row: round(mean_of_finished(validation_scores(row, by)) or 0.0, 9), default=None)


def validation_scores(row: Row, by: str) -> tuple[float | None, ...]:
    """Return by seed what the winner is chosen by; ``by`` is ``accuracy`` or ``balanced``."""
    return row.validation_balanced if by == "balanced" else row.validation_top1


def _standing(
    winner: Row | None, recipe: Recipe, dataset: Dataset, predictions: Predictions, teacher: Bool[Tensor, " n"] | None
) -> Standing | None:
    """Gather what the verdict rests on."""
    if winner is None:
        return None
    labels = dataset.validation.labels
    keys = {key.name: key for key in _row_keys(predictions[recipe.seeds[0]])}
    own = keys[winner.row]
    names = [name for name in keys if _is_rival(keys[name], own, predictions)]
    validation = {name: keys[name].hits(predictions, labels, "validation") for name in (winner.row, *names)}
    weighed = labels if recipe.compare.by == "balanced" else None
    leads = {name: paired_over_seeds(validation[winner.row], validation[name], weighed) for name in names}
    answers = {answer for scores in own.scores(predictions, "test").values() for answer in scores.argmax(-1).tolist()}
    only = answers.pop() if len(answers) == 1 else None
    counts = dataset.train.labels.bincount(minlength=dataset.classes).double()
    frequent = only is not None and bool(counts[only] > FREQUENT * counts.mean())
    return Standing(
        winner=winner,
        leads=corrected_differences({name: lead for name, lead in leads.items() if lead is not None}),
        chosen_on=counted(len(labels), "validation image"),
        over=f"mean of {len(recipe.seeds)} seeds" if len(recipe.seeds) > 1 else "one seed",
        teacher_top1=None if teacher is None else teacher.double().mean().item(),
        only_answer=None if only is None else dataset.class_names[only],
        answers_frequent=frequent and recipe.data.sampling != "balanced",
        by=recipe.compare.by,
    )


def _is_rival(key: RowKey, winner: RowKey, predictions: Predictions) -> bool:
    """Return whether a row is another student, read out as it is compared, and with the same kind of weights."""
    readouts = list(next(iter(predictions.values()))[key.student].scores[key.weights]["test"])
    same_kind = key.weights == winner.weights and key.readout == default_readout(readouts)
    return key.student not in (winner.student, BASELINE) and same_kind and bool(key.scores(predictions, "test"))


def _notes(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield the remarks for the readers of the table."""
    yield from dict.fromkeys(METHODS[name].note for name in recipe.methods if METHODS[name].note)
    yield from map(as_sentence, dataset.remarks)
    if dataset.skipped:
        yield f"Left out: {counted(len(dataset.skipped), 'file')} that cannot be decoded, first {dataset.skipped[0]}."
    for duplicates in (dataset.duplicates, dataset.near_duplicates):
        if duplicates.count:
            yield f"{duplicates.sentence()}."
    hashes = (dataset.train.hashes, dataset.validation.hashes, dataset.test.hashes)
    yield from map(as_sentence, copies_in_validation(*hashes))
