"""`deitkit publish`: a student's folder in the layout of the Hugging Face Hub, with a model card written from its run.

Files are timm's, which transformers opens too; beside them are deitkit's card and ONNX files.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from deitkit import __version__
from deitkit.data.pixels import evaluation_frame
from deitkit.distillation.methods import METHODS
from deitkit.errors import CheckpointError, RecipeError
from deitkit.export.export import (
    LOST_POINTS,
    ExportOptions,
    export_onnx,
    int8_file,
    lost_by_int8,
    record_file,
    remarks,
)
from deitkit.export.graph import load_for_export
from deitkit.export.hub import check_licence
from deitkit.export.record import ExportRecord
from deitkit.models.card import ModelCard
from deitkit.models.onnx_file import is_onnx
from deitkit.models.saved import model_folder, read_card
from deitkit.models.weights.export import Changes, ExportedModel, prepare_export
from deitkit.models.weights.export_layouts import LAYOUTS, largest_difference, removed_on_failure, require_same_logits
from deitkit.models.weights.formats import to_timm
from deitkit.report.table import escape_markdown, markdown_table
from deitkit.run.results import FoldResults, Results, read_results
from deitkit.system.files import write_json, write_text
from deitkit.system.words import counted, without_folders

MOST_NAMES = 20
_FIT = {
    "crop": "Resize the shorter side to {side} px (bicubic) and keep the centre of {px} px.",
    "pad": "Put the image on a black square, resize it to {side} px (bicubic) and keep the centre of {px} px.",
    "squash": "Resize the image to {side} x {side} px (bicubic) and keep the centre of {px} px.",
}


@dataclass(frozen=True)
class PublishOptions:
    """What to publish.

    Attributes:
        name: Under which it is published, such as ``user/name``; None for the folder's.
        licence: One of ``LICENCES``, such as ``apache-2.0``; None if none was chosen.
        onnx: What to export beside it; None for no ONNX file.
        readout: By which deitkit and the ONNX files answer; None for that of the model's card, else the default one.
    """

    name: str | None = None
    licence: str | None = None
    onnx: ExportOptions | None = None
    readout: str | None = None


def publish(model: Path, out: Path, options: PublishOptions, say: Callable[[str], None]) -> Path:
    """Write a folder that timm and transformers open by its path, and return the path of its model card.

    Args:
        model: A student's folder, or a run folder (its winner).
        out: A new or empty folder.
        options: What to publish.
        say: Receives each stage, which takes seconds, and what 8-bit integers cost.

    Raises:
        CheckpointError: The model is not a trained student, or its files would not answer as it does.
        RecipeError: ``out`` is not empty, timm has no such model, the Hub does not know the licence, or the model does
            not have the readout.
    """
    check_licence(options.licence)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out} already exists: name a new folder")
    model = model.absolute()  # the run is looked for in the folders above, also from within the model's
    folder = model_folder(model)
    if is_onnx(folder):
        raise RecipeError(f"{folder} is an ONNX file: give the folder of the model that it was made from")
    card = read_card(folder)
    exported = prepare_export(folder, Changes())
    if exported.only_readout:
        raise CheckpointError(
            f"{folder} has two heads of which only the class head was trained, but timm answers by both: export it "
            "with deitkit convert --to transformers"
        )
    _require_trained(exported, folder)
    _, _, readout = load_for_export(folder, options.readout)
    with removed_on_failure(out):
        _write_timm(exported, card, options.readout, folder, out)
        onnx = None if options.onnx is None else _write_onnx(folder, out, replace(options.onnx, readout=readout), say)
        results = _results_of(folder, card)
        if results is not None:
            write_text(out / "recipe.yaml", yaml.safe_dump(without_folders(results.recipe), sort_keys=False))
        facts = _facts(exported, card, readout, onnx, results, options, folder, out)
        write_text(out / "README.md", _rendered(facts))
    return out / "README.md"


def _require_trained(exported: ExportedModel, folder: Path) -> None:
    """Raise CheckpointError if a classifier is as an adapted model's begins."""
    if not all(values.any() for name, values in exported.state.items() if re.fullmatch(r"head.*\.weight", name)):
        raise CheckpointError(
            f"{folder} has a classifier that is all zero, since it is new: train it first (model.checkpoint={folder})"
        )


def _write_onnx(folder: Path, out: Path, options: ExportOptions, say: Callable[[str], None]) -> ExportRecord:
    """Write the ONNX files, without the one in int8 if that loses much accuracy, and return their figures."""
    file = out / "model.onnx"
    record = export_onnx(folder, file, options, say)
    lost = lost_by_int8(record)
    if lost > LOST_POINTS:
        int8_file(file).unlink()
        rows = tuple(row for row in record.rows if row.precision != "int8")
        record = record.model_copy(update={"rows": rows, "calibration_images": None})
        write_json(record_file(file), record.model_dump(mode="json"))
        say(
            f"{int8_file(file).name} is left out, since it loses {100 * lost:.1f} points of accuracy: deitkit export "
            "--int8 with more --calibration-images may lose less"
        )
    for remark in remarks(record):
        say(remark)
    return record


def _write_timm(exported: ExportedModel, card: ModelCard, readout: str | None, folder: Path, out: Path) -> None:
    layout = LAYOUTS["timm"]
    layout.write(exported, out)
    require_same_logits(largest_difference(exported, layout, out), folder, out)
    if to_timm(exported.state).keys() == exported.state.keys():  # so that deitkit reads the same weights
        written = card.published().written()
        if readout not in (None, card.readout):
            written = {name: value for name, value in written.items() if name != "test_top1"} | {"readout": readout}
        write_json(out / "model.json", written)


def _results_of(folder: Path, card: ModelCard) -> Results | None:
    """Return the results of the run that trained a model: of RUN/winner, RUN/teacher and RUN/seed-N/METHOD.

    Return None of a model that only lies below a run folder, such as one that `deitkit convert` wrote there.
    """
    is_student = re.fullmatch(r"seed-\d+", folder.parent.name) is not None
    home = folder.parent.parent if is_student else folder.parent
    if "changes" in card.written() or not (home / "results.json").exists():
        return None
    results = read_results(home)
    if is_student:
        return results if folder.name in {row.folder_name for row in results.rows} else None
    return results if folder.name == "winner" or _is_teacher(folder) else None


def _is_teacher(folder: Path) -> bool:
    return re.fullmatch(r"teacher(-\d+)?", folder.name) is not None


def _facts(
    exported: ExportedModel,
    card: ModelCard,
    readout: str,
    onnx: ExportRecord | None,
    results: Results | None,
    options: PublishOptions,
    folder: Path,
    out: Path,
) -> dict[str, Any]:
    px, names = card.side, list(exported.class_names)
    has_both = len(exported.architecture.tokens) == 2
    name = options.name or out.name
    shown = None if results is None else type(results).model_validate(without_folders(results.model_dump()))
    is_winner = folder.name == "winner"
    learned = METHODS.get(str(card.method))
    return {
        "title": PurePath(name).name,
        "name": name,
        "where": f"hf-hub:{name}" if options.name else f"local-dir:{name}",
        "licence": options.licence,
        "version": __version__,
        "parameters": f"{card.parameters:,}",
        "channels": "grey images" if card.channels == 1 else "colour images",
        "channel_count": card.channels,
        "px": px,
        "classes": len(names),
        "names": names[:MOST_NAMES],
        "more": f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "",
        "readout": readout,
        "their_readout": "the mean of both heads' logits" if has_both else "their only head",
        "difference": "; answers near a boundary can differ" if has_both and readout != "joint-logits" else "",
        "has_card": (out / "model.json").exists(),
        "onnx": onnx,
        "preparation": _FIT[exported.fit].format(side=evaluation_frame(px, card.eval_crop)[0], px=px),
        "mean": ", ".join(f"{value:.4f}" for value in exported.mean),
        "std": ", ".join(f"{value:.4f}" for value in exported.std),
        "results": shown,
        "table": "" if shown is None else markdown_table(shown),
        "data": "" if shown is None else _data(shown),
        "limits": "" if shown is None else _limits(shown, card, is_winner),
        "is_winner": is_winner,
        "method": card.method,
        "has_teacher": learned is not None and learned.teacher_signal is not None,
        "is_grey": card.channels == 1,
        "pads": exported.fit == "pad",
        "is_teacher": _is_teacher(folder),
        "source": exported.about["source"],
        "changes": exported.about["changes"],
    }


def _data(results: Results) -> str:
    data = results.dataset
    text = (
        f"{escape_markdown(data.name)}: {data.train:,} training, {data.validation:,} validation and {data.test:,} test "
        f"images of {counted(data.classes, 'class')}."
    )
    copies = [found for found in (data.duplicates, data.near_duplicates) if found is not None and found.count]
    if copies:
        count = sum(found.count for found in copies)
        text += f" Of the test images {count:,} equal or nearly equal a training image."
    return text


def _limits(results: Results, card: ModelCard, is_winner: bool) -> str:
    if isinstance(results, FoldResults):
        return f"The table is of {len(results.folds)} models, one for each fold; this is one of them."
    if len(results.seeds) == 1:
        return "One seed was trained: the tests compare these students, not their methods."
    if not is_winner and card.seed is None:
        return f"{len(results.seeds)} seeds were trained."
    this = "the one with the best validation accuracy" if is_winner else f"seed {card.seed}"
    return f"{len(results.seeds)} seeds were trained; this is {this}."


def _rendered(facts: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deitkit.export", package_path=""),
        autoescape=False,  # noqa: S701 - Markdown: `md` escapes what comes from the user
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment.get_template("model_card.md.j2").render(facts)
