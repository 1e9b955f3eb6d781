"""Reading and writing recipes: a YAML file plus ``key=value`` overrides, and the messages for mistakes in them.

The fields are in ``schema``.
"""

from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from deitkit.errors import RecipeError
from deitkit.recipe.contradictions import BASE
from deitkit.recipe.problems import nearest, sentences
from deitkit.recipe.schema import Recipe
from deitkit.recipe.section import from_home

# Fields that a variant must not change, and what its rows share with those of the base for that reason.
PAIRED_BY = {
    "seeds": "seeds",
    "data.name": "test images",
    "data.test_images": "test images",
    "data.test_fraction": "test images",
    "data.split_seed": "test images",
    "data.folds": "test images",
    "data.fold": "test images",
}

DIMENSIONS = ("width", "depth", "heads")  # of a student, which its named size has

MOST_VALUES, MOST_LEVELS = 10_000, 20  # of a recipe; the shipped ones stay below 100 and 5


# In the order of use: first steps, one's own images, CIFAR-10 on a CPU, then what needs a day, a GPU or ImageNet.
SHIPPED = (
    "digits", "own-images", "cifar10-cpu", "methods-cifar10-cpu", "ablation-cifar10-cpu", "teachers-cifar10-cpu",
    "finetune-cpu", "transfer-fashion-cpu", "fashion-mnist", "cifar10-short", "cifar10-patch8", "cifar10-seed-cpu",
    "cifar10", "cifar10-seed", "cifar10-seed-corrected", "patient-cifar10", "cifar100", "imagenet-deit-tiny",
    "imagenet-deit-small", "imagenet-deit-base", "imagenet-deit-tiny-distilled", "imagenet-deit-small-distilled",
    "imagenet-deit-base-distilled", "ablation-imagenet", "finetune-384", "finetune-cifar10-sgd",
    "finetune-cifar10-adamw",
)  # fmt: skip


def shipped_recipes() -> dict[str, str]:
    """Return the text of every shipped recipe by its name, in the order of use."""
    folder = resources.files("deitkit.recipe") / "shipped"
    return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in SHIPPED}


def load_recipe(source: str | Recipe | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and validate it.

    Args:
        source: The name of a shipped recipe, a path to a YAML file, or a recipe; None for the defaults. Fields that a
            file leaves out are taken from its ``base``, if it names one.
        overrides: ``key=value`` with dotted keys; values are YAML. A section with a name has a short form:
            ``data=cifar10`` is ``data.name=cifar10``.

    Raises:
        RecipeError: The recipe is invalid; the message lists all problems, and the nearest keys of an unknown one.
    """
    if isinstance(source, Recipe):
        tree = source.model_dump(mode="json", exclude_unset=True)
    else:
        tree = _read_tree(source) if source is not None else {}
    _forget_sizes(tree, {_apply(tree, override) for override in overrides})
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a tree of plain values, variants included; raise RecipeError with all problems at once."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("; ".join(sentences(error, _defaults()))) from None
    expand_variants(recipe)
    return recipe


def expand_variants(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe as ``base`` and each of its variants, all without variants of their own.

    Raises:
        RecipeError: A variant is invalid or cannot be compared with the base; the message lists all problems.
    """
    base = recipe.model_copy(update={"variants": {}})
    expanded, problems = {BASE: base}, []
    for name, changes in recipe.variants.items():
        tree = base.model_dump(exclude_unset=True) | {"name": f"{recipe.name}-{name}"}
        if "teachers" in tree:
            tree["teachers"] = [*tree["teachers"]]  # of a tuple, so that a variant can change one
        try:
            paths = [_path(key, value) for key, value in changes.items()]
            for path, value in zip(paths, changes.values(), strict=True):
                _set(tree, path, value)
            _forget_sizes(tree, [".".join(path) for path in paths])
            expanded[name] = Recipe.model_validate(tree)
        except RecipeError as error:
            problems.append(f"variants.{name}: {error}")
        except ValidationError as error:
            problems += [f"variants.{name}: {sentence}" for sentence in sentences(error, _defaults())]
        else:
            problems += [f"variants.{name}: {problem}" for problem in _incomparable(expanded[name], base)]
    if problems:
        raise RecipeError("; ".join(problems))
    return expanded


def changed_fields(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, old value and new value of each difference between two dumped recipes."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from changed_fields(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif _are_sections(old) and _are_sections(new) and len(old) == len(new):
        for pair in zip(old, new, strict=True):
            yield from changed_fields(*pair, key)
    elif old != new:
        yield key, old, new


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _incomparable(variant: Recipe, base: Recipe) -> Iterator[str]:
    """Yield the reasons why a variant's figures do not belong in one table with the base's."""
    changes = [change for change in changed_fields(base.model_dump(), variant.model_dump()) if change[0] != "name"]
    for key, old, new in changes:
        if key in PAIRED_BY:
            yield f"{key}={new!r} must stay {old!r}: differences to the base are taken over the same {PAIRED_BY[key]}"
    if variant.variants:
        yield "a variant has no variants of its own: name the fields that it changes"
    if not changes:
        yield "changes nothing: name a field that differs from the base, or set the variant to null to drop it"


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that loads to an equal recipe."""
    content = recipe.model_dump(mode="json")
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != content:  # PyYAML does not escape U+0085, which is a line break
        text = yaml.safe_dump(content, sort_keys=False)
    return text


def field_names(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return every dotted key of a recipe."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        inner = _section_of(field.annotation)
        if inner is not None:
            names += field_names(inner, f"{prefix}{name}.")
    return names


def describe_fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted key, default and meaning of every field that holds a value."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}{name}.")
        else:
            default = field.get_default()
            shown = yaml.safe_dump(_plain_value(default), default_flow_style=True).removesuffix("...\n").strip()
            yield prefix + name, shown, _meaning(section, name)


def _defaults() -> dict[str, str]:
    """Return every dotted key with its default as YAML; that of a section is empty."""
    return dict.fromkeys(field_names(), "") | {key: default for key, default, _ in describe_fields()}


def _meaning(section: type[BaseModel], name: str) -> str:
    """Return a field's description, from the nearest section in the inheritance order that describes it."""
    fields = [base.model_fields.get(name) for base in section.__mro__ if issubclass(base, BaseModel)]
    return next((field.description for field in fields if field is not None and field.description), "")


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is tuple:
        return None  # a list of sections is one value: its entries have no dotted keys
    options = get_args(annotation) or (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _read_tree(source: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a recipe and fill in the fields of its ``base``, recursively.

    Args:
        source: A shipped name or a path.
        above: The recipes whose ``base`` led here.
    """
    tree = _parse(source)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"base={base!r} of recipe '{source}' must be the name of a recipe or a file")
    if base in (*above, source):
        raise RecipeError(f"recipe '{source}' is based on '{base}', which is based on it: remove one base")
    return _merged(_read_tree(base, (*above, source)), tree)


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the base with its values replaced by the tree's; sections are merged field by field."""
    if tree.get("teachers"):
        base = {key: value for key, value in base.items() if key != "teacher"}
    both = {key for key in base if isinstance(base[key], dict) and isinstance(tree.get(key), dict)}
    if "model" in both:
        _forget_sizes(base, {f"model.{field}" for field in tree["model"]})
    return base | tree | {key: _merged(base[key], tree[key]) for key in both}


def _forget_sizes(tree: dict[str, Any], given: Collection[str]) -> None:
    """Remove the size of a student that is given another name or pretrained weights, which bring their own.

    Args:
        tree: Of a recipe.
        given: Fields by dotted keys, which stay.
    """
    if {"model.name", "model.pretrained"} & {*given}:
        for field in ("name", *DIMENSIONS):
            if f"model.{field}" not in given:
                tree["model"].pop(field, None)


def _parse(source: str) -> dict[str, Any]:
    shipped = shipped_recipes()
    if source in shipped:
        text = shipped[source]
    elif (read := _read_file(source)) is not None:
        text = read
    else:
        near = nearest(source, list(shipped)) or f"shipped are {', '.join(shipped)}."
        raise RecipeError(f"recipe '{source}' is neither a shipped recipe nor a file: {near} See `deitkit recipes`")
    tree = _load_yaml(text, f"recipe '{source}'", "correct the file and run again")
    if tree is None:
        raise RecipeError(f"recipe '{source}' is empty: write the fields that differ from the defaults")
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise RecipeError(
            f"recipe '{source}' must be a mapping of field names to values, such as 'train: {{epochs: 20}}'"
        )
    return tree


def _read_file(source: str) -> str | None:
    """Return the text of a recipe file; None if the file does not exist."""
    try:
        path = from_home(Path(source))
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except (OSError, ValueError) as error:  # a name too long for a file, or a file without read permission
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"recipe '{source[:200]}' cannot be read ({reason.lower()}): name another file") from None


class _RepeatedKey(Exception):  # noqa: N818 - a fact of a text
    """A key that a mapping has twice, and its line."""


class _Loader(yaml.SafeLoader):
    """Reads plain values as ``yaml.safe_load`` does, but refuses what that drops silently: the first of equal keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names - {"<<"}:
                raise _RepeatedKey(f"'{key.value}' twice, again in line {key.start_mark.line + 1}")
            names.add(str(key.value))
        return node


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Join the two halves in which JSON writes a character beyond 16 bits, such as an emoji; refuse a lone half."""
    return loader.construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16")


_Loader.add_constructor("tag:yaml.org,2002:str", _text)


def _read_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _load_yaml(text: str, what: str, remedy: str) -> Any:
    """Parse YAML without Python objects, and limit its size.

    Raises:
        RecipeError: The text is not valid YAML, or aliases make it larger than any recipe (or endless).
    """
    try:
        tree = _read_yaml(text)
    except _RepeatedKey as error:
        raise RecipeError(f"{what} has {error}: {remedy}") from None
    except Exception as error:  # PyYAML's constructors raise many types for a tag that does not suit its value
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        raise RecipeError(f"{what} is not valid YAML{line}: {remedy}") from None
    rest, count = [(tree, 0)], 0
    while rest:
        value, level = rest.pop()
        inner = (
            (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        rest += [(entry, level + 1) for entry in inner]
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            raise RecipeError(
                f"{what} has more than {MOST_VALUES} values or {MOST_LEVELS} levels, aliases included: {remedy}"
            )
    return tree


def _apply(tree: dict[str, Any], override: str) -> str:
    """Set the field of an override in a tree, and return its dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"'{override}' is not an override: write key=value, such as train.epochs=20")
    value = _load_yaml(text, f"the value of '{override}'", "quote it")
    # The fields of a variant stay dotted: variants, its name, the field.
    path = key.split(".", 2) if key.startswith("variants.") else _path(key, value)
    _set(tree, path, value)
    return ".".join(path)


def _path(key: str, value: Any) -> list[str]:
    """Return the keys on the way to a field, after expanding the short form of a section with a name."""
    if isinstance(value, str) and "name" in getattr(_section_of(_field_type(key)), "model_fields", ()):
        key += ".name"
    return key.split(".")


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, last = path
    if path[0] == "teacher" and tree.get("teachers"):
        given = f"{'.'.join(path)}={value!r}"
        raise RecipeError(f"{given}: teacher and teachers exclude each other: list every teacher in teachers")
    place: Any = tree
    if path == ["teachers"] and value:  # they replace the recipe's only teacher
        tree.pop("teacher", None)
    if path[0] == "teachers" and len(path) > 2:
        place, parents = _entry(tree.get("teachers"), path), parents[2:]
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    place.pop(last, None)  # if a variant's field is given in two ways, the later one counts
    place[last] = value


def _entry(teachers: Any, path: list[str]) -> dict[str, Any]:
    """Return the fields of one of several teachers, whose field is given by its number, as in ``teachers.0.mean``."""
    count = len(teachers) if isinstance(teachers, list) else 0
    if not path[1].isdigit() or int(path[1]) >= count:
        numbers = (
            f"they are numbered 0 to {count - 1}" if count else "there are none: write teachers=[{name: ...}, ...]"
        )
        raise RecipeError(f"{'.'.join(path)}: '{path[1]}' is not the number of a teacher; {numbers}")
    entry = teachers[int(path[1])]
    teachers[int(path[1])] = entry = dict(entry) if isinstance(entry, dict) else {"name": entry}
    return entry


def _field_type(key: str) -> Any:
    field = Recipe.model_fields.get(key)
    return field.annotation if field is not None else None
