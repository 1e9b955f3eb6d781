"""Recipes: what is accepted, what is refused and in which words."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import deitkit.recipe.load
from deitkit.errors import RecipeError
from deitkit.models.vit import size_in_words
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.load import (
    describe_fields,
    dump_recipe,
    expand_variants,
    field_names,
    load_recipe,
    parse_recipe,
    shipped_recipes,
)
from deitkit.recipe.schema import Recipe, TeacherRecipe


def test_every_shipped_file_has_its_place_in_the_list() -> None:
    files = (Path(deitkit.recipe.load.__file__).parent / "shipped").glob("*.yaml")
    assert sorted(path.stem for path in files) == sorted(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_say_what_they_do_their_command_cost_and_result(name: str) -> None:
    head = shipped_recipes()[name].split("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("Command:", "Cost:", "Result:"):
        assert word in head, f"{name} does not state its {word}"


def test_overrides_reach_nested_fields() -> None:
    recipe = load_recipe(
        "digits", ["train.epochs=7", "seeds=[3, 4]", "teacher.train.learning_rate=1e-3", "model.width=null"]
    )
    assert (recipe.train.epochs, recipe.seeds, recipe.teacher.train.learning_rate) == (7, (3, 4), 0.001)
    assert recipe.model.width is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trian.epochs=3"], ["unknown key 'trian'", "did you mean train"]),
        (["train.epoch=3"], ["unknown key 'train.epoch'", "train.epochs"]),
        (["train.epochs=many"], ["train.epochs='many'", "integer"]),
        (["train.epochs=0"], ["train.epochs=0", "greater than 0"]),
        (["augment.crop=padd"], ["augment.crop='padd'", "'pad'"]),
        (["train.epochs"], ["write key=value"]),
        (["train.epochs=[1"], ["not valid YAML"]),
        (["seeds=[1, 1]"], ["a seed twice"]),
        (["methods=[none, none]"], ["a method twice"]),
        (["train.schedule_epochs=1"], ["train.schedule_epochs=1"]),
        (["teacher.mean=[0.5]", "teacher.std=null"], ["belong together"]),
        (["teacher.mean=[0.5]", "teacher.std=[0]"], ["must be positive"]),
        (["teacher.mean=[123.7]", "teacher.std=[0.2]"], ["teacher.mean=[123.7] is of values from 0 to 255", "by 255"]),
        (["teachers=[{mean: [0.5], std: [58.4]}]"], ["teachers.0.std=[58.4] is of values from 0 to 255", "by 255"]),
        (["teachers=[{mean: [0.5]}]"], ["teachers.0.mean and teachers.0.std belong together"]),
        (["teachers=[{}, {train: {epochs: 1, warmup_epochs: 2}}]"], ["teachers.1.train.warmup_epochs=2"]),
        (["teachers=[{nmae: cifar/resnet20}]"], ["unknown key 'teachers.0.nmae'", "teacher.name"]),
        (["teachers=[{}, {}]", "teacher.name=cifar/resnet56"], ["teacher and teachers exclude each other"]),
        (["teacher.train.ema_decay=0.9"], ["unknown key 'teacher.train.ema_decay'", "did you mean train.ema_decay"]),
        (["teacher.train.precision=fp32"], ["unknown key 'teacher.train.precision'", "did you mean train.precision"]),
        (["train.warmup_epochs=1000"], ["warmup_epochs"]),
        (["train.epochs=20", "baseline.warmup_epochs=50"], ["baseline.warmup_epochs=50 exceeds train.epochs=20"]),
        (["train.learning_rate=.nan"], ["train.learning_rate"]),
        (["methods=token-hard"], ["methods=token-hard: write a list, as methods=[token-hard]"]),
        (["seeds=3"], ["seeds=3: write a list, as seeds=[0, 1, 2], or --seeds 3"]),
        (["train.min_learning_rate=1"], ["train.min_learning_rate=1 exceeds train.learning_rate="]),
        (["teacher.train.min_learning_rate=9"], ["teacher.train.min_learning_rate=9 exceeds"]),
        (
            ["teacher.pretrained=true", "teacher.checkpoint=a.pth"],
            ["teacher.pretrained and teacher.checkpoint exclude"],
        ),
        (["baseline.pretrained=true", "baseline.checkpoint=a.pth"], ["baseline.pretrained and baseline.checkpoint"]),
        (["train.lr=0.1"], ["unknown key 'train.lr': did you mean train.learning_rate?"]),
        (["teacher.train.wd=0.1"], ["did you mean teacher.train.weight_decay?"]),
        (["device=tpu"], ["device='tpu': input should be 'auto', 'cpu', 'cuda', 'mps' or 'xpu'"]),
        (["train.epochs=true"], ["train.epochs=True: true is not a value of this field"]),
        (["augment.mixup=true"], ["augment.mixup=True: true is not a value"]),
        (["augment.flip=false"], ["false is not a value"]),
    ],
)
def test_mistakes_are_told_by_field_and_value(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seeds=[-1]", "seeds.0=-1: input should be greater than or equal to 0"),
        ("seeds=[0.5]", "seeds.0=0.5: input should be an integer"),
        ("seeds=[true]", "seeds=[True]: true is not a value of this field"),
        ("seeds=[]", "seeds=[]: name at least one, as seeds=[0]"),
        ("seeds=null", "seeds=None: write a list, as seeds=[...]"),
        ("methods=[]", "methods=[]: name at least one, as methods=[none, soft, hard, token-hard]"),
        ("methods=[3]", "methods.0=3: input should be text"),
        ("speed.micro_batch_size=0", "speed.micro_batch_size=0: input should be 'auto' or greater than 0"),
        ("speed.compile=3", "speed.compile=3: input should be 'auto' or true or false"),
        (
            "train=null",
            "train=None: this is a section: leave it out, or write its fields, as train.optimizer=adamw",
        ),
        (
            "teachers=[3]",
            "teachers.0=3: this is a section: leave it out, or write its fields, as {name: cifar/resnet20}",
        ),
        ("data.name=csv:", "data.name={'csv': None}: input should be text: quote it, as \"data.name='csv:'\""),
        ("data.name=a: b", "data.name={'a': 'b'}: input should be text: quote it, as \"data.name='a: b'\""),
        ("name=3", "name=3: input should be text: quote it, as \"name='3'\""),
        (
            "variants={a: {seeds: [0.5]}}",
            "variants.a: seeds.0=0.5: input should be an integer",
        ),
    ],
)
def test_a_refused_value_is_said_in_our_words(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", [override])
    assert str(error.value) == sentence


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", ["train.epochs=-1", "data.nam=x", "seeds=a"])
    assert all(word in str(error.value) for word in ("train.epochs=-1", "data.nam", "seeds"))


def test_an_unknown_recipe_names_its_neighbours() -> None:
    with pytest.raises(RecipeError, match="did you mean digits"):
        load_recipe("digit")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "1: 2", "!!python/object/apply:os.system ['true']", "name: {a: 1}"])
def test_malformed_files_are_recipe_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(str(path))


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("middle.yaml").write_text("base: digits\nname: middle\ntrain: {epochs: 3}\nbaseline: {name: teacher}\n")
    Path("last.yaml").write_text("name: last\nbase: middle.yaml\ntrain: {batch_size: 8}\nbaseline: null\nseeds: [5]\n")
    assert load_recipe("last.yaml", ["model.depth=2"]) == load_recipe(
        "digits", ["name=last", "train.epochs=3", "train.batch_size=8", "seeds=[5]", "model.depth=2"]
    )


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("digit", ["recipe 'digit'", "did you mean digits"]),
        ("mine.yaml", ["'mine.yaml' is based on 'mine.yaml'"]),
        ("other.yaml", ["recipe 'other.yaml' is based on 'mine.yaml'", "remove one base"]),
        ("[digits]", ["base=['digits'] of recipe 'mine.yaml'"]),
    ],
)
def test_a_base_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"base: {base}\n")
    Path("other.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("mine.yaml")
    for word in words:
        assert word in str(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(field_names()), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "other"]), values, max_size=4))
def test_any_tree_is_a_recipe_or_a_recipe_error(tree: dict) -> None:
    try:
        recipe = parse_recipe(tree)
    except RecipeError:
        return
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_every_field_has_a_meaning() -> None:
    for field, _, meaning in describe_fields():
        assert meaning, f"{field} is not described"


def test_a_name_of_a_model_brings_its_own_size() -> None:
    mixed = load_recipe("own-images").model
    assert (mixed.name, mixed.width, mixed.depth, mixed.heads) == ("micro", 128, 6, 4)
    for short in ("model.name=deit_tiny", "model=deit_tiny"):
        named = load_recipe("own-images", [short]).model
        assert (named.name, named.width, named.depth, named.heads) == ("deit_tiny", None, None, None)
        assert named.patch_px == mixed.patch_px
    wider = load_recipe("own-images", ["model.name=deit_tiny", "model.width=96"]).model
    assert (wider.width, wider.depth, wider.heads) == (96, None, None)
    assert load_recipe("own-images", ["model.width=96"]).model.depth == 6


def test_a_recipe_and_a_variant_that_name_a_model_have_its_size_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: own-images\nmodel: {name: deit_small, heads: 3}\n")
    mine = load_recipe(str(tmp_path / "mine.yaml")).model
    assert (mine.name, mine.width, mine.depth, mine.heads) == ("deit_small", None, None, 3)
    tiny = "variants={tiny: {model.name: deit_tiny}}"
    for spelled in ("model=deit_small", "model.name=deit_small"):
        small = load_recipe("digits", ["model.width=48", "model.heads=3", f"variants.small.{spelled}"])
        assert expand_variants(small)["small"].model.width is None, "its own size, however it is named"
    variant = expand_variants(load_recipe("own-images", [tiny]))["tiny"].model
    assert (variant.name, variant.width, variant.depth, variant.heads) == ("deit_tiny", None, None, None)


def test_a_variant_of_a_student_from_pretrained_weights_has_their_size_too() -> None:
    small = ["model.pretrained=timm/deit_small_patch16_224", "data.image_px=224", "variants.short.train.epochs=5"]
    variant = expand_variants(load_recipe("own-images", small))["short"]
    assert resolved(variant).model.name == "deit_small"


def test_a_mixture_of_a_name_and_other_dimensions_is_named_as_such() -> None:
    assert size_in_words(load_recipe("own-images").model) == "micro with width 128, depth 6, heads 4"
    assert size_in_words(load_recipe("own-images", ["model.name=deit_tiny"]).model) == "deit_tiny"
    assert size_in_words(load_recipe("own-images", ["model.name=deit_tiny", "model.width=192"]).model) == "deit_tiny"


def test_one_of_several_teachers_is_changed_by_its_number() -> None:
    both = "teachers=[cifar/resnet20, {name: cifar/resnet32, allow_weak: false}]"
    recipe = load_recipe("digits", [both, "teachers.1.allow_weak=true", "teachers.0.train.epochs=3"])
    assert [(one.name, one.allow_weak, one.train.epochs) for one in recipe.teachers] == [
        ("cifar/resnet20", False, 3), ("cifar/resnet32", True, TeacherRecipe().train.epochs)
    ]  # fmt: skip
    for override, words in (("teachers.2.fit=head", "numbered 0 to 1"), ("teachers.x.fit=head", "numbered 0 to 1")):
        with pytest.raises(RecipeError, match=rf"'{override[9]}' is not the number of a teacher; .*{words}"):
            load_recipe("digits", [both, override])
    with pytest.raises(RecipeError, match="there are none"):
        load_recipe("digits", ["teachers.0.fit=head"])


def test_an_empty_list_of_teachers_keeps_the_recipes_teacher(tmp_path: Path) -> None:
    plain = load_recipe("digits")
    assert load_recipe("digits", ["teachers=[]"]) == plain
    (tmp_path / "own.yaml").write_text("base: digits\nname: digits\nteachers: []\n")
    assert load_recipe(str(tmp_path / "own.yaml")) == plain


def test_split_seeds_are_those_that_every_library_takes() -> None:
    assert load_recipe("digits", [f"data.split_seed={2**32 - 1}"]).data.split_seed == 2**32 - 1
    with pytest.raises(RecipeError, match=r"data.split_seed=4294967296: .* less than 4294967296"):
        load_recipe("digits", [f"data.split_seed={2**32}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {epochs: 5}\nmodel: {name: micro}\ntrain: {batch_size: 3}\n",
            "has 'train' twice, again in line 3: correct",
        ),
        ("train: {epochs: 1, epochs: 7}\n", "has 'epochs' twice, again in line 1"),
        ("# nothing yet\n", r"is empty: write the fields that differ"),
        ("null\n", "is empty"),
        ("train.epochs: 3\n", r"key 'train\.epochs' is written in its section in a file: train: \{epochs: 3\}"),
    ],
)
def test_a_file_that_says_less_than_it_seems_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_merged_section_may_be_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: &same {epochs: 5}\nteacher: {train: {<<: *same, epochs: 7}}\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.train.epochs, recipe.teacher.train.epochs) == (5, 7)
