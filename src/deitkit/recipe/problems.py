"""The sentences for values that the schema refuses, instead of pydantic's: field, value, what is allowed.

What a file or an override must look like is said where it is read, in ``load``.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

ABBREVIATIONS = {
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "warmup_lr": "warmup_learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "opt": "optimizer",
    "smoothing": "label_smoothing",
    "reprob": "erase",
    "clip_grad": "clip_norm",
    "img_size": "image_px",
    "patch_size": "patch_px",
}  # other tools' names for fields

# What a field of a type takes, by pydantic's names of the problems; of all others, pydantic's own words are clear.
ALLOWED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "path_type": "the path of a file or folder",
    "dict_type": "a mapping, as variants={short: {train.epochs: 10}}",
}


def sentences(error: ValidationError, fields: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with a recipe.

    Args:
        error: Of the schema.
        fields: Every dotted key of a recipe, with its default as YAML; a section has none.
    """
    problems = error.errors()
    places = [problem["loc"] for problem in problems]
    alternatives = {place[:-1] for place in places if place and str(place[-1]).startswith("literal[")}
    by_place: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in problems:
        place = problem["loc"]
        inside = any(len(other) > len(place) and other[: len(place)] == place for other in places)
        if problem["type"] == "too_short" and inside:
            continue  # pydantic counts the valid entries only
        by_place.setdefault(place[:-1] if place[:-1] in alternatives else place, []).append(problem)
    for place, found in by_place.items():
        yield _sentence(".".join(map(str, place)), found, fields)


def _sentence(where: str, problems: Sequence[Any], fields: Mapping[str, str]) -> str:
    """Say what is wrong with a field; several problems are those of the types that it may have."""
    kind, value = problems[0]["type"], problems[0]["input"]
    message = str(problems[0]["msg"]).removeprefix("Value error, ")
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if kind == "extra_forbidden" and where in fields:
        section, _, name = where.rpartition(".")
        return f"key '{where}' is written in its section in a file: {section}: {{{name}: {shown}}}"
    if kind == "extra_forbidden":
        return f"unknown key '{where}': {nearest(where, list(fields)) or 'see `deitkit recipes --fields`'}"
    if not where:
        return message
    if kind == "tuple_type":
        if where == "seeds" and isinstance(value, int):
            return f"seeds={value}: write a list, as seeds={list(range(max(1, value)))}, or --seeds {max(1, value)}"
        is_one = isinstance(value, str | int | float)
        return f"{where}={value if is_one else shown}: write a list, as {where}=[{value if is_one else '...'}]"
    if kind == "too_short":
        return f"{where}=[]: name at least one, as {where}={fields.get(where)}"
    if kind == "model_type":
        inside = (f"{key}={default}" for key, default in fields.items() if key.startswith(f"{where}.") and default)
        example = next(inside, "{name: cifar/resnet20}")
        return f"{where}={shown}: this is a section: leave it out, or write its fields, as {example}"
    if kind == "value_error":
        return f"{where}={shown}: {message}"
    allowed = [ALLOWED.get(one["type"], str(one["msg"]).removeprefix("Input should be ")) for one in problems]
    if kind == "string_type":
        allowed = ["text" + _quoted(where, value)]
    return f"{where}={shown}: input should be {' or '.join(allowed)}"


def _quoted(where: str, value: Any) -> str:
    """Say how to write what YAML took for something else than text, such as a name that ends in a colon."""
    if isinstance(value, dict) and len(value) == 1:
        [(key, inner)] = value.items()
        value = f"{key}:" if inner is None else f"{key}: {inner}"
    is_entry = where.rpartition(".")[2].isdecimal()  # of a list, which is given as a whole
    if is_entry or value is None or isinstance(value, dict | list):
        return ""
    return f": quote it, as \"{where}='{value}'\""


def nearest(name: str, known: Sequence[str], separator: str = ".") -> str:
    """Return a question with the names most like one, such as ``did you mean train.epochs?``; empty if none is."""
    head, dot, last = name.rpartition(separator)
    last = ABBREVIATIONS.get(last, last)
    name = head + dot + last
    if name in known:
        return f"did you mean {name}?"
    near = [key for key in known if key.rpartition(separator)[2] == last]
    near += [key for key in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if key not in near]
    return f"did you mean {' or '.join(near[:3])}?" if near else ""
