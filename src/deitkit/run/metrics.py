"""The metrics of a training: ``metrics.jsonl`` as typed records, with one reader and one writer."""

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from deitkit.errors import CheckpointError
from deitkit.run.record import Record, parse_json
from deitkit.run.reported import default_readout
from deitkit.system.files import write_text


class EpochMetrics(Record):
    """Metrics of a student's epoch: a line of ``metrics.jsonl``. Numbers that were not finite are None.

    Attributes:
        seed: Of the training.
        student: Its name.
        epoch: From 1.
        epochs: Of the training.
        step: Of the training, at the end of the epoch.
        train_loss: Mean over the steps.
        terms: The same by term of the loss: ``labels``, ``teacher``.
        validation: Accuracy on the validation images by readout, as a fraction.
        learning_rate: Of the last step.
        images_per_second: Without the work that all students share.
        seconds: By the same count.
        cohort_images_per_second: Of all students together.
        shares: Of the time of a step, by kind of work.
    """

    seed: int
    student: str
    epoch: int
    epochs: int | None = None
    step: int | None = None
    train_loss: float | None = None
    terms: dict[str, float | None] | None = None
    validation: dict[str, float | None] | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    cohort_images_per_second: float | None = None
    shares: dict[str, float | None] | None = None

    @property
    def main_accuracy(self) -> float | None:
        """The validation accuracy of the student's main readout."""
        readouts = self.validation or {}
        return readouts[default_readout(list(readouts))] if readouts else None


def read_metrics(folder: Path) -> list[EpochMetrics]:
    """Return the lines of ``metrics.jsonl``, in order; an empty list if the file does not exist.

    Ignore a last line that a kill cut short. If a resumed run wrote an epoch twice, the later line counts.

    Raises:
        CheckpointError: Any other line is not a JSON object with ``seed``, ``student`` and ``epoch``.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines: dict[tuple[int, str, int], EpochMetrics] = {}
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = EpochMetrics.model_validate(parse_json(text))
        except (ValueError, ValidationError) as error:
            if number < len(texts):  # a whole line ends in a newline, so only the last text can be half of one
                raise CheckpointError(
                    f"line {number} of '{path}' is not a line of metrics: remove it, then run `deitkit report` again"
                ) from error
            continue
        lines[line.seed, line.student, line.epoch] = line
    return list(lines.values())


def write_metrics(lines: Iterable[EpochMetrics], folder: Path) -> None:
    """Write ``metrics.jsonl``; raise CheckpointError if it cannot be written."""
    texts = (json.dumps(line.model_dump(exclude_unset=True)) + "\n" for line in lines)
    write_text(folder / "metrics.jsonl", "".join(texts))
