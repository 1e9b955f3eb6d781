"""The folder of a comparison's winner."""

import filecmp
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from deitkit.comparison.rows import validation_scores
from deitkit.run.results import (
    Results,
)
from deitkit.system.files import copy_file, write_json

MODEL_FILES = ("model.safetensors", "model.json")


def copy_winner(results: Results, folder: Path, homes: Sequence[Path]) -> None:
    """Copy the winner's model to ``winner/``, and record the readout by which it won.

    Of several seeds or folds, whose students are in ``homes``, it is the one with the best validation accuracy. Files
    that were exported there from another winner or readout, and a winner where there is none any more, are deleted.
    """
    row, target = results.row(results.winner), folder / "winner"
    if row is None:
        shutil.rmtree(target, ignore_errors=True)
        return
    validation = validation_scores(row, results.recipe.get("compare", {}).get("by", "accuracy"))
    place = max(range(len(homes)), key=lambda place: validation[place] or 0.0)
    source = homes[place] / row.folder_name
    weights, described = target / "model.safetensors", target / "model.json"
    try:
        before = json.loads(described.read_text(encoding="utf-8")).get("readout")
    except (OSError, ValueError):  # there was no winner, or its card is damaged
        before = None
    same = weights.exists() and filecmp.cmp(source / weights.name, weights, shallow=False)
    if not same or before != row.readout:
        for exported in (*target.glob("*.onnx"), *target.glob("*.onnx.json")):
            exported.unlink()
    for name in MODEL_FILES:
        copy_file(source / name, target / name)
    card = json.loads(described.read_text(encoding="utf-8"))
    card |= {"readout": row.readout, "test_top1": row.top1[place]}
    write_json(described, card)
