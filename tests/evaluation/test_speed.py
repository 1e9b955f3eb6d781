"""How often a time is measured."""

import time

import pytest
import torch
from torch import Tensor, nn

from deitkit.evaluation import speed
from deitkit.evaluation.speed import MOST_SINGLE, seconds_per_batch
from deitkit.models.classifier import Classifier
from deitkit.system.device import Precision


class Counted(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.calls = seconds, 0

    def forward(self, view: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        return view.new_zeros(len(view), 2)


def calls(seconds: float, images: int) -> int:
    model = Counted(seconds)
    classifier = Classifier(model, mean=(0.5,), std=(0.5,)).eval()
    precision = Precision.choose("fp32", torch.device("cpu"))
    seconds_per_batch({"a": classifier}, torch.zeros(images, 1, 4, 4), precision, repeats=3)
    return model.calls


def test_a_moment_is_measured_often_and_what_takes_long_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS_OF_SINGLE", 1.0)  # as users have it
    assert calls(0.0, 1) == MOST_SINGLE + 5
    assert calls(0.5, 1) == 4 + 4, "twice, each with a warm-up"
    assert calls(0.001, 8) == 4
