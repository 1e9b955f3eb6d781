"""The paper's training recipe, whole: every ingredient of its Table 9 is a field, and they run together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deitkit.compare import compare
from deitkit.recipe import Recipe
from deitkit.runs import Silent


class Listener(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_run_says_at_which_rate_it_learns(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none]", "train.epochs=1", "train.learning_rate=0.016", "train.learning_rate_per=512")
    listener = Listener()
    compare(recipe, tmp_path / "run", watcher=listener)
    assert "learning rate 0.0005: 0.016 for 512 images, 16 in a step" in listener.said
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    # Of the epoch's last step, the fourth: three quarters down the cosine.
    assert record["learning_rate"] == pytest.approx(0.0005 * (1 - 0.5**0.5) / 2)
