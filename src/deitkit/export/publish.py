"""`deitkit publish`: a student's folder in the layout of the Hugging Face Hub, with a model card written from its run.

Files are timm's, which transformers opens too; beside them are deitkit's card and an ONNX file.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from deitkit import __version__
from deitkit.data.pixels import evaluation_frame
from deitkit.distillation.methods import METHODS
from deitkit.errors import CheckpointError, RecipeError, reason_of
from deitkit.export.export import ExportOptions, export_onnx
from deitkit.export.graph import load_for_export
from deitkit.export.record import ExportRecord
from deitkit.models.card import ModelCard
from deitkit.models.onnx_file import is_onnx
from deitkit.models.saved import model_folder, read_card
from deitkit.models.weights.export import Changes, ExportedModel, prepare_export
from deitkit.models.weights.export_layouts import LAYOUTS, largest_difference, require_same_logits
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
        licence: As the Hub names it, such as ``apache-2.0``; None if none was chosen.
        onnx: What to export beside it; None for no ONNX file.
    """

    name: str | None = None
    licence: str | None = None
    onnx: ExportOptions | None = None


def publish(model: Path, out: Path, options: PublishOptions, say: Callable[[str], None]) -> Path:
    """Write a folder that timm and transformers open by its path, and return the path of its model card.

    Args:
        model: A student's folder, or a run folder (its winner).
        out: A new or empty folder.
        options: What to publish.
        say: Receives each stage, which takes seconds.

    Raises:
        CheckpointError: The model is not a student, or its files would not answer as it does.
        RecipeError: ``out`` is not empty, or timm has no such model.
    """
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
    _, _, readout = load_for_export(folder, options.onnx.readout if options.onnx else None)
    try:
        _write_timm(exported, folder, out)
        onnx = export_onnx(folder, out / "model.onnx", options.onnx, say) if options.onnx is not None else None
        results = _results_of(model, folder)
        if results is not None:
            write_text(out / "recipe.yaml", yaml.safe_dump(without_folders(results.recipe), sort_keys=False))
        facts = _facts(exported, card, readout, onnx, results, options, folder, out)
        write_text(out / "README.md", _rendered(facts))
    except BaseException:  # Ctrl-C too
        shutil.rmtree(out, ignore_errors=True)  # it was new or empty
        raise
    return out / "README.md"


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a published folder to the Hugging Face Hub, and return its address.

    Raises:
        RecipeError: There is no network, no login, or no right to write there.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        is_public = private and not api.repo_info(name).private  # an existing one stays what it was
        if is_public:
            raise PermissionError("this name is a public repository already")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Published with deitkit")
    except Exception as error:  # of the network, of HTTP, of the token, of the name
        reason = reason_of(error)
        raise RecipeError(
            f"--push {name} failed ({reason}): check the network, the name USER/NAME and the login (hf auth login); "
            f"{folder} is complete and can be uploaded later"
        ) from None
    return str(address)


def _write_timm(exported: ExportedModel, folder: Path, out: Path) -> None:
    layout = LAYOUTS["timm"]
    layout.write(exported, out)
    require_same_logits(largest_difference(exported, layout, out), folder, out)
    if to_timm(exported.state).keys() == exported.state.keys():  # so that deitkit reads the same weights
        write_json(out / "model.json", read_card(folder).published().written())


def _results_of(model: Path, folder: Path) -> Results | None:
    """Return the results of the run that a model lies in, for RUN, RUN/winner and RUN/seed-N/METHOD."""
    for place in (model, folder.parent, folder.parent.parent):
        if (place / "results.json").exists():
            return read_results(place)
    return None


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
        "origin": f"It was made from {exported.about['source']}.",
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
    if facts["licence"] is not None:
        facts = facts | {"licence": json.dumps(facts["licence"])}
    return environment.get_template("model_card.md.j2").render(facts)
