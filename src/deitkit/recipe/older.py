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


def renamed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree in which the flat settings of single losses are in the sections of these losses.

    A setting stays where it is, and is refused as unknown, if its new name has a value too.
    """
    tree: dict[str, Any] = deepcopy(dict(stored))
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            *_, inner, field = new.split(".")
            place = tree[section].setdefault(inner, {})
            if isinstance(place, dict) and field not in place:
                place[field] = tree[section].pop(name)
    return tree


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's tree of plain values with the present names of its fields; the argument is not changed."""
    tree = renamed(stored)
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
    also = teacher.get("also") if isinstance(teacher, dict) else None
    if not isinstance(also, list | tuple) or (also and tree.get("teachers")):
        return  # refused as an unknown key, if it is set
    tree["teacher"].pop("also")
    if also:
        tree["teachers"] = [tree.pop("teacher"), *also]
