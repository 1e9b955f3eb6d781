"""A new method is one row of METHODS, and at most one loss: everything else follows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import Float
from torch import Tensor
from typer.testing import CliRunner

from conftest import CPU_FP32, striped_dataset
from deitkit.cli.main import app
from deitkit.comparison.compare import compare
from deitkit.comparison.environment import require_same_ingredients, write_environment
from deitkit.comparison.prepare import dry_run
from deitkit.distillation.methods import METHODS, SIGNALS, Method, Signal, Term
from deitkit.errors import CheckpointError, RecipeError
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher


def squared_error(logits: Tensor, teacher_logits: Tensor, targets: Tensor, settings: Any) -> Float[Tensor, ""]:
    return (logits.float() - teacher_logits.float()).square().mean()


LABELS = Term("class", "labels", lambda settings: 1.0)
NEW = (
    Method("regression", ("class",), (LABELS, Term("class", "squared", lambda settings: 0.1)), "logit regression",
           "squared error of the teacher's logits", "Logits were regressed for the first time."),
    Method("token-regression", ("class", "distillation"), (LABELS, Term("distillation", "squared", lambda settings: 1)),
           "DeiT, logit regression", "a token whose head regresses the teacher's logits"),
)  # fmt: skip


@pytest.mark.reports
def test_a_method_added_at_run_time_is_trained_titled_and_reported(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIGNALS, "squared", Signal(squared_error, "soft"))
    for method in NEW:
        monkeypatch.setitem(METHODS, method.name, method)
    recipe = tiny_recipe("methods=[none, regression, token-regression]", "train.epochs=1", "train.batch_size=32")
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    rows = {row.row: row for row in results.rows}
    assert rows["regression/class"].label == "logit regression"
    assert rows["token-regression/joint"].label == "DeiT, logit regression: class + distillation"
    assert (rows["regression/class"].teacher, rows["regression/class"].labels) == ("soft", True)
    assert all(row.kind == "student" and row.status == "ok" for row in results.rows)
    assert all((row.differences.get("labels") is None) == (row.method == "none") for row in results.rows)
    for name in ("table.md", "report.html", "table.tex"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "logit regression (regression, class)" in text, name
        assert "DeiT, logit regression: class + distillation (token-regression, joint)" in text, name
        assert text.count("Logits were regressed for the first time.") >= 1, name
    assert "token-regression" in (tmp_path / "run" / "curves.svg").read_text(encoding="utf-8")
    listed = CliRunner().invoke(app, ["methods"]).stdout
    assert "a token whose head regresses the teacher's logits" in " ".join(listed.split())


def test_its_loss_is_tried_and_needs_all_logits_unless_it_says_otherwise(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "regression", NEW[0])
    plain, top = (
        tiny_recipe("methods=[regression]", "teacher.cache=true", *more) for more in ((), ("teacher.cache_top=2",))
    )
    data = striped_dataset()
    monkeypatch.setitem(SIGNALS, "squared", Signal(squared_error))
    with pytest.raises(RecipeError, match="the loss of 'regression' fails on random logits"):
        dry_run(plain, data, CPU_FP32)
    monkeypatch.setitem(SIGNALS, "squared", Signal(squared_error, "soft"))
    dry_run(plain, data, CPU_FP32)
    with pytest.raises(RecipeError, match="the loss of regression depends on all logits"):
        dry_run(top, data, CPU_FP32)
    monkeypatch.setitem(SIGNALS, "squared", Signal(squared_error, "soft", by_softmax=True))
    dry_run(top, data, CPU_FP32)


def test_losses_that_need_three_classes_are_named_for_two(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("methods=[soft, dkd, dist, token-standardised]")
    said = "dist and token-standardised: with 2 classes a part of the loss has no gradient, or all of it"
    for classes in (2, 3):
        remarks, _ = dry_run(recipe, striped_dataset(classes=classes), CPU_FP32)
        assert any(said in remark for remark in remarks) == (classes == 2)


def test_a_loss_in_the_place_of_a_shipped_one_is_not_mixed_into_a_run(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, data = tiny_recipe("methods=[soft]"), striped_dataset()
    monkeypatch.setitem(SIGNALS, "soft", Signal(squared_error, "soft"))
    write_environment(recipe, data, tmp_path, CPU_FP32)
    require_same_ingredients(recipe, data, tmp_path)
    monkeypatch.setitem(METHODS, "soft", replace(METHODS["soft"], terms=(LABELS,)))
    with pytest.raises(CheckpointError, match="begun with another version of the method soft than is here now"):
        require_same_ingredients(recipe, data, tmp_path)
