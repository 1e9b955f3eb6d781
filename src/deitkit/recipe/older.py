"""Recipes of version 0.1: renamed fields move to their new place, and fields without an effect are dropped.

Run folders keep whole recipes, so that an older run can be reported, verified and resumed.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# Dotted old and new names.
RENAMED = {
    "distillation.dkd_target_weight": "distillation.dkd.target_weight",
    "distillation.dkd_others_weight": "distillation.dkd.others_weight",
    "distillation.dkd_temperature": "distillation.dkd.temperature",
    "distillation.dist_inter_weight": "distillation.dist.inter_weight",
    "distillation.dist_intra_weight": "distillation.dist.intra_weight",
    "distillation.dist_temperature": "distillation.dist.temperature",
    "distillation.standardised_label_weight": "distillation.standardised.label_weight",
    "distillation.standardised_weight": "distillation.standardised.teacher_weight",
    "distillation.standardised_temperature": "distillation.standardised.temperature",
    "distillation.consistent_temperature": "distillation.consistent.temperature",
}


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's tree of plain values with the present names of its fields; the argument is not changed."""
    tree: dict[str, Any] = deepcopy(dict(stored))
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            *_, inner, field = new.split(".")
            tree[section].setdefault(inner, {})[field] = tree[section].pop(name)
    if isinstance(tree.get("speed"), dict):
        tree["speed"].pop("side_by_side", None)
    _list_teachers(tree)
    several = tree.get("teachers")
    for teacher in (tree.get("teacher"), *(several if isinstance(several, list | tuple) else ())):
        train = teacher.get("train") if isinstance(teacher, dict) else None
        if isinstance(train, dict):
            for field, default in (("ema_decay", None), ("precision", "auto")):
                if train.get(field) == default:  # any other value is refused: it never had an effect
                    train.pop(field, None)
    if isinstance(tree.get("published"), list | tuple):
        tree["published"] = ["reproduction" if table == "seed" else table for table in tree["published"]]
    return tree


def _list_teachers(tree: dict[str, Any]) -> None:
    """Turn ``teacher.also``, a list of further teachers, into the list ``teachers``."""
    teacher = tree.get("teacher")
    if not isinstance(teacher, dict) or "also" not in teacher:
        return
    also = teacher.pop("also")
    if isinstance(also, list | tuple) and also:
        tree["teachers"] = [tree.pop("teacher"), *also]
