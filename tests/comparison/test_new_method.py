"""A new method is one row of METHODS, and at most one loss: everything else follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import Float
from torch import Tensor
from typer.testing import CliRunner

from deitkit.cli.main import app
from deitkit.comparison.compare import compare
from deitkit.distillation.methods import METHODS, SIGNALS, Method, Signal, Term
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
