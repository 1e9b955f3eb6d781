"""The commands that apply a saved model: ``evaluate`` and ``predict``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deitkit.cli.console import console, plain, print_json, say
from deitkit.cli.options import Json, ModelArgument, Readout, Root
from deitkit.errors import Interrupted
from deitkit.system.words import counted

if TYPE_CHECKING:
    from deitkit.evaluation.classify import Prediction

MOST_REASONS = 5  # files that are named because they cannot be decoded


def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", help="A named data set, folder:PATH, parquet:PATH or csv:FILE.")],
    root: Root = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Measure on all its images, such as new ones, also of some of the classes."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a saved model on the test images of a data set, for every readout.

    Data without a test split are divided as for its training, and only the test images are measured.
    """
    from deitkit.evaluation.apply import evaluate_model
    from deitkit.models.saved import model_folder

    result = evaluate_model(model_folder(model), data, root, everything=everything)
    if as_json:
        print_json(result)
        return
    n = f"{result['n']:,}"
    table = Table("readout", "top-1 %", "95 % interval", "top-5 %", title=f"{result['dataset']}, n = {n}")
    for row in result["readouts"]:
        low, high = row["top1_ci95"]
        top5 = "" if row["top5"] is None else f"{100 * row['top5']:.2f}"
        table.add_row(row["readout"], f"{100 * row['top1']:.2f}", f"{100 * low:.2f} to {100 * high:.2f}", top5)
    console.print(table)
    for remark in result["remarks"]:
        say(remark)
    if result["drawn_from"] is not None:
        say(f"these are {n} of {result['drawn_from']:,} images, since there is no test split: --all measures on all")
    if result["trained_on"] is None:
        say("nothing records which images this model was trained on: some of these may be among them")
    elif result["trained_on"] > 0:
        say(f"about {100 * result['trained_on']:.1f} % of these images are training images of this model")


def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    readout: Readout = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Show this many classes for each image.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a line for each image to this new .csv or .jsonl file.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option("--embeddings", help="Write the features before the head to this new .parquet file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify images with a trained model: a few as a table, any number into a file.

    For example `deitkit predict runs/mine photos --out answers.csv`. Images are decoded ahead by several processes and
    never all in memory. One that cannot be decoded is named, counted and left out.
    """
    from deitkit.cli.prediction_files import PredictionFiles, with_progress
    from deitkit.evaluation.classify import Classification
    from deitkit.models.saved import model_folder

    embed = embeddings is not None
    classification = Classification(model_folder(model), images, readout=readout, top=top, embed=embed)
    total, done, failed = len(classification), 0, 0
    shown: list[Prediction] = []
    reasons: list[Prediction] = []
    try:
        with PredictionFiles(out, embeddings, top) as files:
            for prediction in with_progress(classification, total):
                files.add(prediction)
                done += 1
                if "error" in prediction:
                    failed += 1
                    reasons = reasons if failed > MOST_REASONS else [*reasons, prediction]
                if out is None:
                    shown.append(prediction.copy())
                    shown[-1].pop("embedding", None)
    except KeyboardInterrupt:
        kept = " and ".join(str(path) for path in (out, embeddings) if path is not None)
        raise Interrupted(
            f"stopped after {done:,} of {counted(total, 'image')}" + (f", which are in {kept}" if kept else "")
        ) from None
    if as_json:
        print_json(shown if out is None else {"images": total, "classified": total - failed, "file": str(out)})
        return
    if out is None:
        _print_answers(shown)
    for remark in classification.remarks:
        say(remark)
    for prediction in reasons:
        say(f"left out: {prediction['image']} cannot be decoded ({prediction['error']})")
    if failed or out is not None:
        say(f"{total - failed:,} of {counted(total, 'image')} classified" + (f", in {out}" if out is not None else ""))


def _print_answers(predictions: list["Prediction"]) -> None:
    table = Table("image", "class", "probability")
    for prediction in predictions:
        for place, (name, probability) in enumerate(prediction["classes"]):
            table.add_row("" if place else plain(prediction["image"]), plain(name), f"{100 * probability:.1f} %")
    console.print(table)
