"""Measuring an ONNX file again, and comparing it with what was recorded when it was written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from deitkit.errors import CheckpointError
from deitkit.evaluation.apply import load_data_of
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
from deitkit.export.export import machine_of_exports
from deitkit.export.record import ExportRecord
from deitkit.models.saved import load_classifier
from deitkit.run.record import parse_json
from deitkit.system.device import Precision

TOLERANCE_ELSEWHERE = 0.005  # on another processor or version, where rounding decides images between two classes


@dataclass(frozen=True)
class VerifiedFile:
    """Accuracy of an ONNX file, as recorded and as measured now."""

    recorded: float
    measured: float
    tolerance: float
    dataset: str
    n: int

    @property
    def holds(self) -> bool:
        """Whether both are equal within the tolerance."""
        return abs(self.recorded - self.measured) <= self.tolerance


def verify_onnx(file: Path, data: str | None = None, root: Path | None = None) -> VerifiedFile:
    """Measure an ONNX file on the test images of its record.

    Args:
        file: With its record beside it.
        data: Where the data set lies now; None for the record's name.
        root: Folder of named data sets.

    Raises:
        CheckpointError: The file is damaged or not of deitkit, or its record is missing or damaged.
        DataError: The images cannot be loaded.
    """
    device = torch.device("cpu")
    classifier, card = load_classifier(file, device)
    record = _record_of(file)
    recorded = next((row.top1 for row in record.rows if row.file == file.name), None)
    if recorded is None:
        raise CheckpointError(f"the record beside {file} has no row of it: give it the name that it was written with")
    dataset = load_data_of(card, data or record.dataset, root)
    precision = Precision(device, torch.float32)
    (scores,) = readout_scores(predict(classifier, dataset.test, precision)).values()
    return VerifiedFile(
        recorded,
        top_k_accuracy(scores, dataset.test.labels),
        0.0 if machine_of_exports() == record.machine else TOLERANCE_ELSEWHERE,
        dataset.name,
        len(dataset.test),
    )


def _record_of(file: Path) -> ExportRecord:
    """Return the figures beside an ONNX file; a file in int8 shares those of the float32 one."""
    for stem in (file.stem, file.stem.removesuffix("-int8")):
        path = file.with_name(f"{stem}.onnx.json")
        if path.exists():
            try:
                return ExportRecord.model_validate(parse_json(path.read_text(encoding="utf-8")))
            except (ValidationError, ValueError):
                raise CheckpointError(f"{path} is damaged: export the model again") from None
    raise CheckpointError(f"{file} has no record beside it, {path.name}: copy both from where it was written")
