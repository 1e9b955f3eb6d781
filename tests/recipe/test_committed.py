"""The recipes of the committed runs load, and their runs can be resumed."""

from pathlib import Path

import pytest

from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import check_run

COMMITTED = sorted((Path(__file__).parents[2] / "results").rglob("recipe.yaml"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_recipe_of_every_committed_run_loads_and_resumes(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    check_run(path.parent, recipe, resume=True)


def test_there_are_committed_runs() -> None:
    assert len(COMMITTED) >= 7
