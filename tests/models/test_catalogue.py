"""The catalogue of models: counted figures against published ones, timm's models, and hand calculation."""

import json
import math
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from deitkit.bench.inference_speed import catalogue_rows
from deitkit.bench.measure import count_flops
from deitkit.cli.main import app
from deitkit.models.catalogue import CATALOGUE, CatalogueModel
from deitkit.models.vit import DeiT
from deitkit.models.zoo import names
from deitkit.recipe.load import load_recipe

# The paper of ViT has one figure for each size: B is that of patch 16, L that of patch 32.
OTHERWISE = {"ViT-B/32": 88.3, "ViT-L/16": 304.7}
# Billions of multiply-adds: He et al. 2016 (ResNet-152 without projections), Radosavovic et al. 2020, Tan and Le 2019.
PUBLISHED_OPERATIONS = {
    "ResNet-152": 11.3, "RegNetY-4GF": 4.0, "RegNetY-8GF": 8.0, "RegNetY-12GF": 12.1, "RegNetY-16GF": 15.9,
    "RegNetX-400MF": 0.4, "EfficientNet-B7": 37,
}  # fmt: skip
STUDENTS = [model for model in CATALOGUE if model.student is not None]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in catalogue_rows()}


@pytest.mark.parametrize("model", CATALOGUE, ids=lambda model: model.row)
def test_parameters_are_the_published_ones(model: CatalogueModel, rows: dict[str, dict[str, Any]]) -> None:
    counted = rows[model.row]["parameters"] / 1e6
    if model.millions is None:
        assert "Ti" in model.row or "-S " in model.row  # at 384 px, which nobody published
        return
    digits = len(model.millions.partition(".")[2])
    # The paper of DeiT cuts: 5.7 M are its 5 M, 86.6 M its 86 M.
    as_printed = {f"{counted:.{digits}f}", f"{math.floor(counted * 10**digits) / 10**digits:.{digits}f}"}
    if model.row in OTHERWISE:
        assert model.millions not in as_printed
        assert counted == pytest.approx(OTHERWISE[model.row], abs=0.05)
    else:
        assert model.millions in as_printed


@pytest.mark.parametrize(("row", "billions"), PUBLISHED_OPERATIONS.items())
def test_operations_of_cnns_are_the_published_ones(row: str, billions: float, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[row]["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.025)


@pytest.mark.parametrize("model", [model for model in STUDENTS if model.teacher], ids=lambda model: model.row)
def test_students_are_timms_models_but_for_what_the_last_block_leaves_out(
    model: CatalogueModel, rows: dict[str, dict[str, Any]]
) -> None:
    with torch.device("meta"):
        ours, theirs = model.build(), timm.create_model(model.teacher.removeprefix("timm/"))
    assert isinstance(ours, DeiT)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    patches, width = (model.image_px // model.patch_px) ** 2, ours.config["width"]
    left_out = patches * 9 * width**2 + 2 * patches * (patches + 1) * width  # projection, MLP; rows of attention
    everything = count_flops(theirs.eval(), (3, model.image_px, model.image_px), backward=False) // 2
    assert rows[model.row]["multiply_adds"] == everything - left_out


@pytest.mark.parametrize("model", CATALOGUE, ids=lambda model: model.row)
def test_every_model_can_be_asked_for_in_a_recipe(model: CatalogueModel) -> None:
    recipe = load_recipe(None, [f"{key}={value}" for key, value in model.recipe_fields().items()])
    if model.student is not None:
        assert (recipe.model.name, recipe.model.patch_px) == (model.student, model.patch_px)
        assert recipe.data.image_px == model.image_px
        assert (recipe.methods == ("token-hard",)) == ("distillation" in model.tokens)
    if model.teacher is not None:
        assert model.teacher.partition(".")[0] in names()
    else:
        assert model.student is not None


def test_rows_are_unique_and_all_of_both_tables_are_there() -> None:
    known = [model.row for model in CATALOGUE]
    assert len(set(known)) == len(known)
    deit = {f"DeiT-{size}{kind}{px}" for size in ("Ti", "S", "B") for kind in ("", " distilled") for px in ("", " 384")}
    vit = {"ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16"}
    regnets = {"RegNetY-4GF", "RegNetY-8GF", "RegNetY-12GF", "RegNetY-16GF", "RegNetX-400MF"}
    assert set(known) == deit | vit | regnets | {"ResNet-50", "ResNet-152", "EfficientNet-B7"}


def test_the_command_lists_them_for_people_and_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(model for model in CATALOGUE if model.row in ("DeiT-Ti distilled 384", "RegNetX-400MF"))
    monkeypatch.setattr("deitkit.bench.inference_speed.CATALOGUE", few)
    listed = json.loads(CliRunner().invoke(app, ["models", "--json"], catch_exceptions=False).output)
    assert [row["model"] for row in listed] == [model.row for model in few]
    assert listed[1]["published_top1"] == 72.6
    assert "Radosavovic" in listed[1]["sources"]["RegNet"]
    shown = CliRunner().invoke(app, ["models"], catch_exceptions=False, env={"COLUMNS": "80"}).output.splitlines()
    assert shown[1].split() == ["DeiT-Ti", "distilled", "384", "384", "6.0", "4.37", "-", "1", "deit_tiny"]
    assert shown[2].split() == ["RegNetX-400MF", "224", "5.2", "0.40", "72.6", "4", "timm/regnetx_004"]
