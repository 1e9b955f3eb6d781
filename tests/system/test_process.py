"""Holding back signals while a library reads a file."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

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
def test_an_interrupt_while_a_state_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "checkpoint.safetensors", []
    save_state(path, {"w": torch.zeros(3)})

    @contextmanager
    def interrupted(*arguments: object, **options: object) -> Iterator[object]:
        """Open a file of safetensors; like its extension, turn what a signal's handler raises into a ValueError."""
        with safe_open(*arguments, **options) as file:
            try:
                signal.raise_signal(signal.SIGINT)
            except Interrupted as error:
                raise ValueError(str(error)) from None
            yield file

    monkeypatch.setattr("deitkit.run.state.safe_open", interrupted)
    with pytest.raises(Interrupted):
        load_state(path, said.append)
    assert said == []
    assert path.exists()
