"""`deitkit export`: write a model as ONNX, and measure every file beside the model on the same images and cores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import SKETCHED, share_of_sketch
from deitkit.errors import CheckpointError, DataError, RecipeError
from deitkit.evaluation.apply import load_data_of
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import balanced_accuracy, readout_scores, top_k_accuracy
from deitkit.evaluation.speed import seconds_per_batch
from deitkit.export.graph import Deployed, build_onnx, import_onnx, load_for_export, onnx_card
from deitkit.export.int8 import quantise
from deitkit.export.record import ExportRecord, ExportRow
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.onnx_file import OnnxGraph, import_onnxruntime, open_session
from deitkit.run.provenance import envelope
from deitkit.system.device import Precision, describe_machine
from deitkit.system.files import write_bytes, write_json
from deitkit.system.words import without_folders

CPU = torch.device("cpu")
FORMAT = 1
TOLERANCE = 1e-3  # of probabilities in float32; other kernels give about 1e-6
BATCH_SIZE = 32
REPEATS = 5
LEAST_KNOWN = 0.5  # share of the images that a model was trained on that must be among those of its data set
FEWEST_KNOWN = 16  # images of a sketch that must be expected among those of the data set, for that share to tell
LOST_POINTS = 0.01  # accuracy that int8 may cost without a word
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Attributes:
        readout: Of the answers; None for that of the model's card, else the default one.
        takes_bytes: Whether images are uint8 from 0 to 255, else float32 from 0 to 1.
        int8: Write a file in 8-bit integers too.
        calibration_images: Validation images to calibrate it on.
        data: Data set of the check; None for that of the training.
        root: Folder of named data sets.
        public: Leave folders of this machine out of the figures too; they are never in the ONNX files.
    """

    readout: str | None = None
    takes_bytes: bool = True
    int8: bool = False
    calibration_images: int = CALIBRATION_IMAGES
    data: str | None = None
    root: Path | None = None
    public: bool = False


def export_onnx(
    folder: Path, out: Path, options: ExportOptions, say: Callable[[str], None] = lambda text: None
) -> ExportRecord:
    """Write ``out`` and, with ``int8``, a file beside it; check and time both, and keep the figures beside ``out``.

    Args:
        folder: Of the model.
        out: A new file whose name ends in .onnx.
        options: What to write.
        say: Receives each stage, which takes seconds.

    Raises:
        CheckpointError: The model cannot be read, or the file would not answer as the model does.
        DataError: The images of the check cannot be loaded.
        RecipeError: A package is missing, the file exists, or the model does not have the readout.
    """
    import_onnx()
    files = {"ONNX": out, **({"ONNX int8": int8_file(out)} if options.int8 else {})}
    for file in (*files.values(), record_file(out)):
        if file.exists():
            raise RecipeError(f"--out {file} already exists: name a new file")
    classifier, card, readout = load_for_export(folder, options.readout)
    dataset = _images_to_check_on(card, options)
    card = card.published()
    say("building the graph")
    deployed = Deployed(classifier, readout, options.takes_bytes)
    contents = {"ONNX": build_onnx(deployed, card, folder)}
    if options.int8:
        say("calibrating int8")
        own = onnx_card(deployed, card, folder)
        contents["ONNX int8"] = quantise(contents["ONNX"], own, dataset.validation, options.calibration_images)
    say("checking on the test images")
    rows = _measure(classifier, readout, contents, files, dataset, folder / "model.safetensors")
    if not rows[1].largest_difference <= TOLERANCE:
        raise CheckpointError(
            f"{out} would not answer as {folder} does: a probability differs by {rows[1].largest_difference:.2g}; "
            "nothing was written; try another version of torch or onnxruntime"
        )
    record = ExportRecord(
        **envelope(FORMAT),
        source=folder.name,
        readout=readout,
        dataset=without_folders(dataset.name) if options.public else dataset.name,
        n=len(dataset.test),
        calibration_images=min(options.calibration_images, len(dataset.validation)) if options.int8 else None,
        batch_size=BATCH_SIZE,
        machine=machine_of_exports(),
        rows=rows,
    )
    try:
        for kind, content in contents.items():
            write_bytes(files[kind], content)
        write_json(record_file(out), record.model_dump(mode="json"))
    except BaseException:  # Ctrl-C too
        for file in (*files.values(), record_file(out)):
            file.unlink(missing_ok=True)
        raise
    return record


def _images_to_check_on(card: ModelCard, options: ExportOptions) -> Dataset:
    """Load the data set of the options, or that of the training if it is the same here."""
    name = options.data or card.dataset
    if name is None:
        raise RecipeError("the model's card names no data set to check the file on: give one with --data")
    dataset = load_data_of(card, name, options.root)
    known, least = torch.cat([dataset.train.hashes, dataset.validation.hashes]), LEAST_KNOWN * card.labelled_share
    # Of few labels among many images a sketch may hold none.
    can_tell = options.data is None and SKETCHED * card.labelled_share >= FEWEST_KNOWN
    if can_tell and share_of_sketch(known, card.trained_on or "") < least:
        raise DataError(
            f"data {name} has other images here than the model was trained on: run this where its run began, or name "
            "the images to check it on with --data"
        )
    return dataset


def machine_of_exports() -> dict[str, Any]:
    """Return all of a machine that decides a file's answers and times."""
    return describe_machine(Precision.choose("auto", CPU)) | {"onnxruntime": import_onnxruntime().__version__}


def int8_file(out: Path) -> Path:
    """Return the name of the file in 8-bit integers beside a float32 file."""
    return out.with_name(f"{out.stem}-int8.onnx")


def record_file(out: Path) -> Path:
    """Return the name of the file of figures beside an ONNX file."""
    return out.with_name(f"{out.stem}.onnx.json")


def lost_by_int8(record: ExportRecord) -> float:
    """Return the accuracy that int8 costs, as a fraction; 0 without a file in int8."""
    return max((record.rows[0].top1 - row.top1 for row in record.rows if row.precision == "int8"), default=0.0)


def remarks(record: ExportRecord) -> list[str]:
    """Return what a user should know of the figures, as sentences without a full stop."""
    quantised, points = [row for row in record.rows if row.precision == "int8"], lost_by_int8(record)
    lost = [
        f"int8 loses {100 * points:.1f} points of accuracy: try more --calibration-images (of photographs like those "
        "it will see), or use the float32 file"
    ] * (points > LOST_POINTS)
    slower = [
        "int8 is not faster than float32 on this processor: measure it where it will run"
        for row in quantised
        if row.milliseconds > record.rows[1].milliseconds
    ]
    return lost + slower


def _measure(
    classifier: Classifier,
    readout: str,
    contents: Mapping[str, bytes],
    files: Mapping[str, Path],
    dataset: Dataset,
    weights: Path,
) -> tuple[ExportRow, ...]:
    """Return a row for the model in PyTorch and for each file."""
    channels = dataset.channels
    models = {"PyTorch": classifier}
    for kind, content in contents.items():
        graph = OnnxGraph(open_session(content))
        models[kind] = Classifier(graph, mean=(0.0,) * channels, std=(1.0,) * channels).eval()
    single = _milliseconds(models, 1, dataset)
    in_batch = _milliseconds(models, BATCH_SIZE, dataset)
    exact = Precision(CPU, torch.float32)
    probabilities = {}
    for kind, model in models.items():
        scores = readout_scores(predict(model, dataset.test, exact))
        probabilities[kind] = scores[readout if kind == "PyTorch" else "class"].double().softmax(dim=-1)
    return tuple(
        ExportRow(
            name=kind,
            file=None if kind == "PyTorch" else files[kind].name,
            precision=_precision(kind),
            file_bytes=weights.stat().st_size if kind == "PyTorch" else len(contents[kind]),
            milliseconds=single[kind],
            milliseconds_in_batch=in_batch[kind],
            **_agreement(probabilities[kind], probabilities["PyTorch"], dataset),
        )
        for kind in models
    )


def _precision(kind: str) -> str:
    if kind == "PyTorch":
        return Precision.choose("auto", CPU).name  # of its times; its probabilities are those of float32
    return "int8" if kind.endswith("int8") else "fp32"


def _agreement(
    ours: Float[Tensor, "n classes"], theirs: Float[Tensor, "n classes"], dataset: Dataset
) -> dict[str, Any]:
    labels = dataset.test.labels
    return {
        "top1": top_k_accuracy(ours, labels),
        "balanced_accuracy": balanced_accuracy(ours, labels),
        "largest_difference": (ours - theirs).abs().max().item(),
        "same_top1": int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum()),
    }


def _milliseconds(models: Mapping[str, Classifier], batch_size: int, dataset: Dataset) -> dict[str, float]:
    """Return the milliseconds for an image of each model, in turn; PyTorch in the precision of its use."""
    places = torch.arange(batch_size) % len(dataset.test)
    view = dataset.test.pixels(places).float() / 255
    seconds = seconds_per_batch(models, view, Precision.choose("auto", CPU), REPEATS)
    return {kind: 1000 * taken / batch_size for kind, taken in seconds.items()}
