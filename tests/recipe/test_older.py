"""Recipes of version 0.1, as run folders hold them: they load, and their runs can be resumed."""

from pathlib import Path

import pytest
import yaml

from deitkit.errors import RecipeError
from deitkit.recipe.load import expand_variants, load_recipe, parse_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.folder import check_run

COMMITTED = sorted((Path(__file__).parents[2] / "results").rglob("recipe.yaml"))
OLDER = """
published: [seed, paper]
speed: {side_by_side: true}
distillation: {dkd_temperature: 5.0, dkd_target_weight: 2.0, dist_inter_weight: 3.0, standardised_weight: 7.0,
  consistent_temperature: 1.5, soft_weight: 0.3}
teacher:
  name: cifar/resnet56
  cache: true
  train: {epochs: 4, warmup_epochs: 0, ema_decay: null, precision: auto}
  also: [{name: cifar/resnet20, train: {ema_decay: null, precision: auto}}]
variants: {warm: {distillation.dkd_temperature: 6.0}}
"""


def test_older_fields_move_to_their_place() -> None:
    tree = yaml.safe_load(OLDER)
    recipe = parse_recipe(tree)
    settings = recipe.distillation
    assert (settings.dkd.temperature, settings.dkd.target_weight, settings.dkd.others_weight) == (5, 2, 8)
    assert (settings.dist.inter_weight, settings.standardised.teacher_weight) == (3, 7)
    assert (settings.consistent.temperature, settings.soft_weight) == (1.5, 0.3)
    assert [teacher.name for teacher in recipe.all_teachers] == ["cifar/resnet56", "cifar/resnet20"]
    assert recipe.teachers[0].cache
    assert recipe.teachers[0].train.epochs == 4
    assert recipe.published == ("reproduction", "paper")
    assert expand_variants(recipe)["warm"].distillation.dkd.temperature == 6
    assert tree == yaml.safe_load(OLDER), "the tree was changed"


def test_a_run_of_version_0_1_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(OLDER)
    check_run(tmp_path, load_recipe(str(tmp_path / "recipe.yaml")), resume=True)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_recipe_of_every_committed_run_loads_and_resumes(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    check_run(path.parent, recipe, resume=True)


def test_there_are_committed_runs() -> None:
    assert len(COMMITTED) >= 7


def test_of_an_older_and_a_present_name_the_later_one_counts(tmp_path: Path) -> None:
    older, present = "distillation.dkd_temperature=5", "distillation.dkd.temperature=7"
    assert load_recipe("digits", [older, present]).distillation.dkd.temperature == 7
    assert load_recipe("digits", [present, older]).distillation.dkd.temperature == 5
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("distillation: {dkd_temperature: 5}")
    second.write_text(f"base: {first}\ndistillation: {{dkd: {{temperature: 7}}}}")
    assert load_recipe(str(second)).distillation.dkd.temperature == 7
    first.write_text("distillation: {dkd: {temperature: 5}}")
    second.write_text(f"base: {first}\ndistillation: {{dkd_temperature: 7}}")
    assert load_recipe(str(second)).distillation.dkd.temperature == 7
    second.write_text("distillation: {dkd_temperature: 5, dkd: {temperature: 7}}")
    with pytest.raises(
        RecipeError, match=r"unknown key 'distillation\.dkd_temperature': did you mean .*dkd\.temperature"
    ):
        load_recipe(str(second))


def test_an_older_field_beside_a_wrong_section_is_a_mistake_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"distillation\.dkd=3"):
        parse_recipe({"distillation": {"dkd": 3, "dkd_temperature": 5}})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.also.0.name=cifar/resnet56"], "unknown key 'teacher.also'"),
        (["teachers=[{}, {}]", "teacher.also=[{}]"], "teacher.also=.*exclude each other"),
        (["teachers=[{}, {}]", "teacher.name=cifar/resnet20"], "teacher.name='cifar/resnet20': .*exclude each other"),
        (["teachers=[{}, {}]", "variants.x.teacher.also=[{}]"], "variants.x: teacher.also=.*exclude each other"),
    ],
)
def test_no_older_field_is_dropped_without_a_word(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("digits", overrides)
