"""Processes of torchrun: which they are, what they share, and what each gets of a batch and a machine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deitkit.errors import RecipeError
from deitkit.system import ranks as module
from deitkit.system.process import processes_here, were_started
from deitkit.system.ranks import ALONE, Ranks, join_ranks

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [16, 17, 31, 64])
def test_places_divide_a_batch_and_keep_mirrored_pairs_together(batch: int, count: int) -> None:
    parts = [Ranks(rank, count).places(batch) for rank in range(count)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(batch))
    for part in parts:
        assert torch.equal(part.flip(0), batch - 1 - part), "the part in reverse order is the batch in reverse order"
        assert len(part) >= 2
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    assert torch.equal(ALONE.places(batch), torch.arange(batch))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_spans_divide_images_once_and_all_get_very_few(count: int) -> None:
    spans = Ranks(0, count).spans(100)
    assert [place for span in spans for place in range(100)[span]] == list(range(100))
    assert Ranks(0, 8).spans(5) == [slice(0, 5)] * 8


def test_only_torchrun_makes_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not were_started()
    monkeypatch.setenv("WORLD_SIZE", "4")  # some machines set it for everyone
    assert not were_started()
    assert join_ranks() is ALONE
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert were_started()
    assert processes_here() == 2
    monkeypatch.setenv("DEITKIT_UNITS_HERE", "3")
    assert processes_here() == 6


def test_restarts_on_several_machines_are_refused_by_one_process_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        join_ranks()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RecipeError, match="--max-restarts is for one machine, since on several each counts restarts"):
        join_ranks()


class Store(dict[str, bytes]):
    """A store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_one_refusal_is_that_of_all_and_an_end_ends_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    first, other = Ranks(0, 2, store), Ranks(1, 2, store)
    monkeypatch.setattr(Ranks, "any", lambda self, flag: flag or any(key.startswith("refusal") for key in store))
    assert first.agreed_refusal() == ""
    assert [other.agreed_refusal("no images"), first.agreed_refusal()] == ["no images"] * 2
    first.broadcast(None)
    first.broadcast_end(143)
    assert other.receive() is None
    with pytest.raises(SystemExit, match="143"):
        other.receive()
    assert ALONE.agreed_refusal("alone") == "alone"


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (2, "cpu:gloo,cuda:nccl")])
def test_tensors_on_the_cpu_always_have_a_backend(gpus: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Any] = []
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_current", ALONE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", joined.append)
    init = lambda backend, **settings: joined.append(backend)  # noqa: E731
    monkeypatch.setattr(module, "dist", SimpleNamespace(
        rendezvous=lambda url: iter([("store", 1, 4)]), PrefixStore=lambda name, store: name, init_process_group=init,
    ))  # fmt: skip
    ranks = join_ranks()
    assert (ranks.rank, ranks.count) == (1, 4)
    assert joined == [*([1] if gpus else []), backend]
    if gpus:
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(RecipeError, match=r"--nproc-per-node=2 exceeds the 2 GPUs of this machine: use at most 2"):
            join_ranks()
