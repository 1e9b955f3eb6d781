"""The recipes of the committed runs load, and their runs can be resumed."""

import json
from pathlib import Path

import pytest

from deitkit.recipe.load import load_recipe, parse_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import check_run

FOLDER = Path(__file__).parents[2] / "results"
COMMITTED, RESULTS = (sorted(FOLDER.rglob(name)) for name in ("recipe.yaml", "results.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_recipe_of_every_committed_run_loads_and_resumes(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    check_run(path.parent, recipe, resume=True)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_recipe_in_the_results_is_that_of_the_run(path: Path) -> None:
    recipe = parse_recipe(json.loads(path.read_text())["recipe"])
    beside = path.parent / "recipe.yaml"
    assert not beside.exists() or load_recipe(str(beside)) == recipe


def test_there_are_committed_runs() -> None:
    assert len(COMMITTED) >= 7
    assert len(RESULTS) >= 7
