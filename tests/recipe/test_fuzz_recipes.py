"""Fuzzing of recipes: whatever is given, a valid recipe comes of it or a RecipeError, and a valid one survives writing.

A few cases of each kind run with the suite; `make fuzz` runs thousands.
"""

from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from deitkit.errors import RecipeError
from deitkit.recipe.load import _section_of, dump_recipe, field_names, load_recipe, parse_recipe, shipped_recipes
from deitkit.recipe.schema import Recipe
from fuzz_helpers import cases, mutated

SHIPPED = shipped_recipes()
# What YAML makes something else of than it looks like, and what has to be escaped.
ODD = (
    "null", "~", "true", "0", "-1", "1e400", ".inf", "-.nan", "1:30", "0x_", "0b", "1_000", "2026-11-25", "2026-99-99",
    "[]", "{}", "[[[]]]", "{a: {b: {}}}", "[1, 1]", "&a [*a]", "&a {b: *a}", "*a", "<<: 1", "{<<: [{a: 1}]}", "!!int x",
    "!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!null x",
    "!!python/name:os.system", "!x y", "'", '"', "'a", "- a", "? a", ": ", "|", ">", "%YAML 9.9", "---", "...", "@",
    "`", "\ufeff", "\x85", "\u2028", "\0", "\\", "../..", "x" * 300, "9" * 5000, "[" * 300, "{a: " * 300,
)  # fmt: skip
keys = st.sampled_from(field_names()) | st.sampled_from(
    ["base", "variants", "variants.a", "variants.a.train.epochs", ""]
)
values = st.sampled_from(ODD) | st.text(max_size=20)
overrides = st.builds("{}={}".format, keys | st.text(max_size=10), values) | st.text(max_size=30)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def is_a_recipe_or_refused(source: str, changes: list[str] | None = None) -> None:
    try:
        recipe = load_recipe(source, changes or [])
    except RecipeError:
        return
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@cases(1.5)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
def test_any_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    is_a_recipe_or_refused(str(path))


@cases(2.5)
@given(data=st.data())
def test_any_change_of_a_shipped_recipe(path: Path, data: st.DataObject) -> None:
    text = SHIPPED[data.draw(st.sampled_from(sorted(SHIPPED)))]
    pieces = [piece.encode() for piece in (*ODD, "\n", "  ", ": ", "train:", "base: ", "variants:\n  a: ")]
    path.write_bytes(data.draw(mutated(text[text.index("\nname:") :].encode(), pieces)))
    is_a_recipe_or_refused(str(path))


@cases(2.5)
@given(source=st.sampled_from(sorted(SHIPPED)), changes=st.lists(overrides, min_size=1, max_size=3))
def test_any_override(source: str, changes: list[str]) -> None:
    is_a_recipe_or_refused(source, changes)


@cases(1.5)
@given(tree=st.dictionaries(keys.map(lambda key: key.partition(".")[0]) | st.text(max_size=5), trees, max_size=4))
def test_any_tree(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    is_a_recipe_or_refused(str(path))


@cases(0.3)
@given(source=st.text(max_size=300) | st.text("a/.", max_size=2000) | values)
def test_any_name(source: str) -> None:
    is_a_recipe_or_refused(source)


st.register_type_strategy(Path, st.text(max_size=8).map(Path))


def sections(section: type[BaseModel] = Recipe) -> st.SearchStrategy[dict[str, Any]]:
    """Draw values for some fields of a section, from their types and bounds."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            fields[name] = sections(inner)
        elif name not in ("variants", "teachers"):
            bounded = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            fields[name] = st.from_type(bounded).filter(lambda value, name=name: accepts(section, name, value))  # type: ignore[misc]
    return st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen})
    )


def accepts(section: type[BaseModel], name: str, value: Any) -> bool:
    try:
        section.model_validate({name: value})
    except ValidationError as error:
        return any(problem["loc"][:1] not in ((name,), ()) for problem in error.errors())
    return True


@cases(2)
@given(tree=sections(), changes=st.dictionaries(st.sampled_from(field_names()), st.integers(1, 9), max_size=1))
@example(tree={"baseline": {"name": "\x85"}}, changes={})  # a line break to YAML
def test_any_valid_recipe_survives_being_written_and_read(tree: dict[str, Any], changes: dict[str, int]) -> None:
    for variants in ({"one": changes}, {}):
        try:
            recipe = parse_recipe({**tree, "variants": variants})
            break
        except RecipeError:
            continue
    else:
        assume(False)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_an_alias_bomb_is_refused_at_once(path: Path) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    for top in ("name: *a11", "variants: {one: {name: *a11}}", "seeds: *a11"):
        path.write_text("\n".join([*lines, top]))
        with pytest.raises(RecipeError, match="aliases"):
            load_recipe(str(path))


def test_a_recipe_that_holds_itself_is_refused(path: Path) -> None:
    for text in ("variants: &a {b: *a}", "&a {train: *a}", "seeds: &a [*a]"):
        path.write_text(text)
        with pytest.raises(RecipeError):
            load_recipe(str(path))
