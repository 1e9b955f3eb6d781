"""The analysis of a finished run: ``analysis.json`` as typed records, with one reader and one writer."""

import json
from pathlib import Path

from pydantic import ValidationError

from deitkit.errors import CheckpointError
from deitkit.run.record import Document, Record
from deitkit.system.files import write_text

FORMAT = 2


class ReliabilityBin(Record):
    """Images with a confidence in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class RowSummary(Record):
    """Statistics of a row, or of the teacher, on the test images; means over the seeds.

    Attributes:
        row: The row's name, or ``teacher``.
        seeds: That finished.
        top1: Accuracy as a fraction.
        ece: Expected calibration error, in [0, 1].
        ece_by_chance: That which a perfectly calibrated model would have on as many images, on average; None in files
            that do not tell.
        mce: Maximum calibration error, in [0, 1]: that of one bin, however few images it has.
        nll: Negative log-likelihood in nats.
        brier: Brier score, in [0, 2].
        agreement_overall: Share of images with the teacher's decision; this and the following are None for the
            teacher, and without a teacher.
        agreement_teacher_right: The same among images that the teacher classifies correctly.
        agreement_teacher_wrong: The same among the teacher's errors.
        agreement_corrected: Share of the teacher's errors that the row classifies correctly.
        divergence: KL(teacher || row) in nats.
        reliability: Of the images of all seeds; bins without an image are left out.
    """

    row: str
    seeds: tuple[int, ...]
    top1: float | None
    ece: float | None
    mce: float | None
    nll: float | None
    brier: float | None
    agreement_overall: float | None = None
    agreement_teacher_right: float | None = None
    agreement_teacher_wrong: float | None = None
    agreement_corrected: float | None = None
    divergence: float | None = None
    ece_by_chance: float | None = None
    reliability: tuple[ReliabilityBin, ...]


class Confusion(Record):
    """Images of class ``true`` that were predicted as ``decided``: ``count`` of the class's ``of``, their ``share``."""

    true: int
    decided: int
    count: int
    of: int
    share: float


class ClassSummary(Record):
    """Accuracy and confusions by class, over the images of all seeds.

    Attributes:
        row: The row's name, or ``teacher``.
        accuracy: By class (its recall); None for a class without images.
        precision: By class, the share of the answers with it that are right; 0 without any.
        f1: By class, the harmonic mean of both; None for a class without images.
        confusion: Class, predicted class and number of images, where there is at least one.
        most_confused: The most frequent errors.
    """

    row: str
    accuracy: tuple[float | None, ...]
    precision: tuple[float, ...] = ()
    f1: tuple[float | None, ...] = ()
    confusion: tuple[tuple[int, int, int], ...]
    most_confused: tuple[Confusion, ...]


class Disagreement(Record):
    """The share of images that each two rows classify differently; ``truth`` and ``teacher`` are among the rows."""

    rows: tuple[str, ...]
    shares: tuple[tuple[float | None, ...], ...]


class TokenSimilarity(Record):
    """Cosine of a student's class and distillation token.

    Attributes:
        student: The student's name.
        learned: Of the two learned vectors.
        cosine: Mean over images: of the input to the first block, and after each block.
        deviation: The standard deviations.
    """

    student: str
    learned: float | None
    cosine: tuple[float, ...]
    deviation: tuple[float, ...]


class AttentionSheet(Record):
    """A picture of a student's attention, ``analysis/FILE``, over test images by their index."""

    student: str
    seed: int
    file: str
    images: tuple[int, ...]


class Analysis(Document):
    """All that ``analysis.json`` holds.

    Attributes:
        seeds: Whose students were analyzed.
        n: Test images.
        notes: Remarks for the reader.
        disagreement: Of truth, teacher and rows.
        rows: The teacher, then the rows of the table.
        left_out: Rows of the table without a model under any of the seeds.
        classes: The teacher, the winner, and one row of each student, in the order of the table.
        tokens: Of the students with two tokens.
        attention: Of the students with tokens.
    """

    seeds: tuple[int, ...]
    n: int
    notes: tuple[str, ...] = ()
    disagreement: Disagreement
    rows: tuple[RowSummary, ...]
    left_out: tuple[str, ...] = ()
    classes: tuple[ClassSummary, ...]
    tokens: tuple[TokenSimilarity, ...]
    attention: tuple[AttentionSheet, ...]


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write ``analysis.json``; raise CheckpointError if it cannot be written."""
    write_text(folder / "analysis.json", json.dumps(analysis.model_dump(mode="json"), ensure_ascii=False) + "\n")


def read_analysis(folder: Path) -> Analysis | None:
    """Return the analysis in a run folder; None where it was not analyzed.

    Raises:
        CheckpointError: It is not JSON, has another format, or lacks a required field.
    """
    path = folder / "analysis.json"
    if not path.is_file():
        return None
    try:
        analysis = Analysis.model_validate_json(path.read_bytes())
    except ValidationError:
        analysis = None
    if analysis is None or analysis.format != FORMAT:
        raise CheckpointError(
            f"'{path}' is not an analysis of format {FORMAT}: delete it, or run `deitkit analyze` again"
        )
    return analysis
