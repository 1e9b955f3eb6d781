"""Holding back signals while a library reads a file."""

import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deitkit.errors import Interrupted
from deitkit.run.state import load_state, save_state
from deitkit.system.process import signals_held


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGINT raises Interrupted, as on the command line."""

    def on_signal(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGINT, on_signal)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupting")
def test_a_signal_is_raised_once_when_the_block_ends_and_its_handler_is_back() -> None:
    reached = []

    def read() -> None:
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    with pytest.raises(Interrupted):
        read()
    assert reached == ["the end"]
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interrupting")
def test_an_interrupt_while_a_state_is_read_is_no_damage(tmp_path: Path) -> None:
    path, tree = tmp_path / "checkpoint.safetensors", {"w": [torch.zeros(64, 64)] * 200}
    said: list[str] = []
    ends: Counter[str] = Counter()
    save_state(path, tree)
    timed = signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    randomly = random.Random(0)
    for _ in range(100):
        try:
            signal.setitimer(signal.ITIMER_REAL, randomly.uniform(0.0001, 0.012))
            ends["read" if load_state(path, said.append) else "lost"] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            ends["interrupted"] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, timed)
    assert said == []
    assert ends["lost"] == 0
    assert ends["interrupted"] > 10
    assert path.exists()
