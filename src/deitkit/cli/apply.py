"""The commands that apply a saved model: ``evaluate`` and ``predict``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deitkit.cli.console import console, plain, print_json, say
from deitkit.cli.options import Json, ModelArgument
from deitkit.system.words import counted


def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", help="A named data set, folder:PATH or parquet:PATH.")],
    root: Annotated[Path | None, typer.Option("--root", help="The folder of the named data sets.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a saved model on the test images of a data set, for every readout."""
    from deitkit.evaluation.apply import evaluate_model
    from deitkit.models.saved import model_folder

    result = evaluate_model(model_folder(model), data, root)
    if as_json:
        print_json(result)
        return
    table = Table("readout", "top-1 %", "95 % interval", "top-5 %", title=f"{result['dataset']}, n = {result['n']}")
    for row in result["readouts"]:
        low, high = row["top1_ci95"]
        top5 = "" if row["top5"] is None else f"{100 * row['top5']:.2f}"
        table.add_row(row["readout"], f"{100 * row['top1']:.2f}", f"{100 * low:.2f} to {100 * high:.2f}", top5)
    console.print(table)
    if result["trained_on"] > 0:
        say(f"about {100 * result['trained_on']:.1f} % of these images are training images of this model")


def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    readout: Annotated[
        str | None, typer.Option("--readout", help="class, distillation, joint or joint-logits.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Show this many classes for each image.")] = 3,
    as_json: Json = False,
) -> None:
    """Classify images with a trained model."""
    from deitkit.evaluation.apply import predict_files
    from deitkit.models.saved import model_folder

    predictions = predict_files(model_folder(model), images, readout=readout, top=top)
    if as_json:
        print_json(predictions)
        return
    table = Table("image", "class", "probability")
    left_out = [prediction for prediction in predictions if "error" in prediction]
    for prediction in predictions:
        for place, (name, probability) in enumerate(prediction["classes"]):
            table.add_row("" if place else plain(prediction["image"]), plain(name), f"{100 * probability:.1f} %")
    console.print(table)
    for prediction in left_out[:5]:
        say(f"left out: {prediction['image']} cannot be decoded ({prediction['error']})")
    if left_out:
        say(f"{len(predictions) - len(left_out)} of {counted(len(predictions), 'image')} answered")
