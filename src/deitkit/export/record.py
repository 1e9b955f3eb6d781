"""What `deitkit export` measured of its files, beside the model that they were made from."""

from typing import Any

from deitkit.run.record import Document, Record


class ExportRow(Record):
    """One form of the model.

    Attributes:
        name: ``PyTorch``, ``ONNX`` or ``ONNX int8``.
        file: Its file; None for the original.
        precision: ``fp32``, ``bf16`` or ``int8``.
        top1: Of the test images, as a fraction.
        balanced_accuracy: Mean over classes, as a fraction.
        largest_difference: Of a probability, relative to PyTorch in float32.
        same_top1: Test images with PyTorch's decision, in float32.
        file_bytes: Size of the file.
        milliseconds: For a single image; the median.
        milliseconds_in_batch: For an image in a batch of ``batch_size``; the median.
    """

    name: str
    file: str | None
    precision: str
    top1: float
    balanced_accuracy: float
    largest_difference: float
    same_top1: int
    file_bytes: int
    milliseconds: float
    milliseconds_in_batch: float


class ExportRecord(Document):
    """The file beside an ONNX file.

    Attributes:
        source: The model's folder, its last name only.
        readout: What the files answer by.
        dataset: Of the test images.
        n: Number of test images.
        calibration_images: Of the quantisation; None without.
        batch_size: Of ``milliseconds_in_batch``.
        machine: Where it was measured.
        rows: The original first.
    """

    source: str
    readout: str
    dataset: str
    n: int
    calibration_images: int | None
    batch_size: int
    machine: dict[str, Any]
    rows: tuple[ExportRow, ...]
