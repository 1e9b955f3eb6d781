"""The command ``export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from deitkit.cli.console import console, errors, print_json, say
from deitkit.cli.options import Json, ModelArgument, Readout, Root
from deitkit.errors import RecipeError

if TYPE_CHECKING:
    from deitkit.export.record import ExportRecord


def export(
    model: ModelArgument,
    to: Annotated[Literal["onnx"], typer.Option("--to", help="The format.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", help="A new .onnx file; by default model.onnx in the model's folder.")
    ] = None,
    readout: Readout = None,
    images: Annotated[
        Literal["uint8", "float"], typer.Option("--input", help="uint8 from 0 to 255, or float from 0 to 1.")
    ] = "uint8",
    int8: Annotated[
        bool, typer.Option("--int8", help="Write FILE-int8.onnx too: a quarter of the size, in 8-bit integers.")
    ] = False,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            "--calibration-images", min=1, help="Validation images that int8 is calibrated on, 256 by default."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Data set of the check; by default that of the training.")
    ] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Write a model as an ONNX file, and compare both on the test images: answers, size and speed.

    For example `deitkit export runs/mine --int8`. The file takes RGB (or grey) images of the model's size in batches of
    any size, and gives probabilities: normalisation and softmax are inside, and its metadata hold the class names.
    `predict`, `evaluate`, `verify` and `bench infer --model` take it like a model folder.
    """
    from deitkit.export.export import CALIBRATION_IMAGES, ExportOptions, export_onnx, remarks
    from deitkit.models.onnx_file import is_onnx
    from deitkit.models.saved import model_folder

    folder = model_folder(model)
    file = out or folder / "model.onnx"
    if is_onnx(model):
        raise RecipeError(f"{model} is an ONNX file already: give the folder of a model")
    if not is_onnx(file):
        raise RecipeError(f"--out {file}: give a name that ends in .onnx")
    if calibration_images is not None and not int8:
        raise RecipeError(f"--calibration-images {calibration_images} is for int8 only: add --int8, or leave it out")
    options = ExportOptions(readout, images == "uint8", int8, calibration_images or CALIBRATION_IMAGES, data, root)
    record = export_onnx(folder, file, options, lambda text: say(text, errors))
    if as_json:
        print_json(record.model_dump(mode="json") | {"file": str(file)})
        return
    console.print(_table(record))
    for line in (*remarks(record), f"wrote {', '.join(row.file for row in record.rows if row.file)} in {file.parent}"):
        say(line)


def _table(record: "ExportRecord") -> Table:
    table = Table(
        "", "top-1 %", "balanced %", "same answers", "largest difference", "MB", "ms for an image",
        f"in a batch of {record.batch_size}", title=f"readout {record.readout}, {record.dataset}, n = {record.n:,}",
    )  # fmt: skip
    for row in record.rows:
        is_original = row.file is None
        table.add_row(
            f"{row.name}, {row.precision}" if is_original else row.name,
            f"{100 * row.top1:.2f}",
            f"{100 * row.balanced_accuracy:.2f}",
            "" if is_original else f"{row.same_top1:,}",
            "" if is_original else f"{row.largest_difference:.1e}",
            f"{row.file_bytes / 1e6:.2f}",
            f"{row.milliseconds:.2f}",
            f"{row.milliseconds_in_batch:.2f}",
        )
    return table
