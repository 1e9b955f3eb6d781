"""Weights files of strangers: read safely, unwrapped, and loaded whole or refused."""

import argparse
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deitkit.errors import CheckpointError
from deitkit.models.built import BuiltClassifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.weights.read import (
    Checkpoint,
    file_sha256,
    head_layers,
    load_into,
    read_checkpoint,
    read_state,
)


def small_model(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict, DataParallel": lambda state: {"state_dict": prefixed("module.", state), "best_prec1": 0.9},
    "model with the arguments": lambda state: {"model": state, "args": argparse.Namespace(lr=1), "epoch": 3},
    "a tensor beside the wrapper": lambda state: {"model": state, "rng_state": torch.zeros(8)},
    "model_ema first": lambda state: {"model": prefixed("x", state), "model_ema": state},
    "state_dict_ema first": lambda state: {"state_dict": prefixed("x", state), "state_dict_ema": state},
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled and parallel": lambda state: prefixed("_orig_mod.module.model.", state),
    "blocks compiled": lambda state: {name.replace(".", "._orig_mod.", 1): value for name, value in state.items()},
    "FSDP": lambda state: prefixed("_fsdp_wrapped_module.0._checkpoint_wrapped_module.", state),
    "a name that no list has": lambda state: prefixed("lit.backbone.", state),
    "teacher": lambda state: {"student": prefixed("x", state), "teacher": state},
    "nested": lambda state: {"model": {"state_dict": state}},
}


def read_for(model: nn.Module, path: Path, head: str) -> Checkpoint:
    return read_checkpoint(path, BuiltClassifier(model, head, "test"))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".pth.tar"])
def test_wrapped_checkpoints_are_unwrapped(wrapping: str, suffix: str, tmp_path: Path) -> None:
    state, path = small_model().state_dict(), tmp_path / f"weights{suffix}"
    torch.save(WRAPPINGS[wrapping](state), path)
    read = read_for(small_model(), path, "2").state
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_safetensors_are_read(tmp_path: Path) -> None:
    state, path = small_model().state_dict(), tmp_path / "weights.safetensors"
    save_file(prefixed("module.", state), path)
    assert read_state(path).keys() == prefixed("module.", state).keys(), "for no model, they are as in the file"
    read = read_for(small_model(), path, "2").state
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


BESIDE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "weights of classes": (
        lambda state: prefixed("model.", state) | {"class_weights": torch.ones(3)},
        ("its tensors outside of 'model' are left out (class_weights)",),
    ),
    "another classifier": (
        lambda state: prefixed("backbone.", state) | {f"head.{n}": torch.ones(1) for n in "abcdef"},
        ("its tensors outside of 'backbone' are left out (head.a, head.b, head.c, head.d and 2 more)",),
    ),
    "an average": (
        lambda state: prefixed("model.", {n: v + 1 for n, v in state.items()}) | prefixed("ema_model.module.", state),
        ("of its parts ema_model.module, model, 'ema_model.module' is read",),
    ),
    "a student": (
        lambda state: prefixed("student.", {n: v + 1 for n, v in state.items()}) | prefixed("teacher.", state),
        ("of its parts teacher, student, 'teacher' is read",),
    ),
    "heads for training": (lambda state: prefixed("module.", state | {"aux1.fc.weight": torch.ones(1)}), ()),
    "a loss": (lambda state: prefixed("module.", state | {"criterion.weight": torch.ones(3)}), ()),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_what_is_beside_a_model_in_its_file_is_left_out(beside: str, tmp_path: Path) -> None:
    written, remarks = BESIDE[beside]
    model, state = small_model(), small_model().state_dict()
    torch.save({"state_dict": written(dict(state))}, tmp_path / "weights.pth")
    assert read_for(model, tmp_path / "weights.pth", "2").remarks == remarks
    assert load_into(model, read_state(tmp_path / "weights.pth"), head="2", source="x") is False
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_architecture_behind_a_prefix_is_refused_by_its_own_names() -> None:
    deeper = prefixed("module.", CifarResNet(32, classes=10).state_dict())
    with pytest.raises(CheckpointError, match="24 of 63 layers do not fit"):
        load_into(CifarResNet(20, classes=10), deeper, head="linear", source="x")
    with pytest.raises(CheckpointError, match=r"first: 0\.weight: absent in the file"):
        load_into(small_model(), {"a.0.weight": torch.ones(5, 4), "b": torch.ones(1)}, head="2", source="x")


def test_numbers_of_numpy_beside_the_weights_are_not_built(tmp_path: Path) -> None:
    state = small_model().state_dict()
    beside = {"best_acc": np.float64(0.9), "epoch": np.int64(3), "history": np.arange(4.0), "best": np.float32(1)}
    torch.save({"state_dict": state, **beside}, tmp_path / "weights.pth")
    assert read_state(tmp_path / "weights.pth").keys() == state.keys()


class Trap:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    torch.save({"state_dict": small_model().state_dict(), "trap": Trap(sprung)}, path)
    with pytest.raises(CheckpointError, match=r"could run code and are not read: .*safetensors"):
        read_state(path)
    assert not sprung.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(small_model(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        read_state(tmp_path / "model.pt")


def truncated(state: dict[str, Tensor]) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()[:-200]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pth", b""),
        ("a.pth", b"not a checkpoint at all"),
        ("a.pth", bytes(range(256))),
        ("a.pth", b"PK\x03\x04 broken"),
        ("a.pth", truncated(small_model().state_dict())),
        ("a.safetensors", b""),
        ("a.safetensors", b"not a checkpoint at all"),
        ("a.safetensors", b"\xff" * 64),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert str(caught.value) == f"checkpoint {path} is damaged or not a weights file: copy or download it again"


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.ones(3), {1: torch.ones(3)}])
def test_files_without_tensors_by_name_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="contains no tensors by name"):
        read_state(tmp_path / "a.pth")


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": [1.0]}))
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "a.pkl")


@pytest.mark.parametrize(("name", "words"), [("absent.pth", "does not exist: check its name"), (".", "is a folder")])
def test_missing_files_and_folders_are_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_state(tmp_path / name)


def test_all_is_loaded() -> None:
    model, other = small_model(), small_model()
    assert load_into(model, other.state_dict(), head="2", source="x") is False
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_batch_counts_may_be_missing() -> None:
    state = small_model().state_dict()
    del state["1.num_batches_tracked"]
    assert load_into(small_model(), state, head="2", source="x") is False


def test_a_head_of_other_classes_stays_new_and_is_reported() -> None:
    model, state = small_model(), small_model(classes=7).state_dict()
    before = model[2].weight.clone()
    assert load_into(model, state, head="2", source="x") is True
    assert torch.equal(model[2].weight, before)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_an_absent_head_stays_new_as_a_whole() -> None:
    model, state = small_model(), small_model().state_dict()
    del state["2.weight"]
    before = model[2].bias.clone()
    assert load_into(model, state, head="2", source="x") is True
    assert torch.equal(model[2].bias, before)


def test_a_classifier_behind_a_dropout_is_loaded() -> None:
    model, state = small_model(), small_model().state_dict()
    nested = {name.replace("2.", "2.1.", 1) if name.startswith("2.") else name: state[name] for name in state}
    assert load_into(model, nested, head="2", source="x") is False
    assert torch.equal(model[2].weight, state["2.weight"])
    assert torch.equal(model[2].bias, state["2.bias"])
    two = nested | {"2.3.weight": torch.zeros(3, 3)}
    assert load_into(model, two, head="2", source="x") is True
    assert head_layers(two, "2") == ["2.1", "2.3"]


def nested(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Linear(4, 5), **parts})


@pytest.mark.parametrize(("classes", "is_new"), [(3, False), (7, True)])
def test_a_classifier_in_place_of_the_module_around_ours_is_loaded(classes: int, is_new: bool) -> None:
    ours = nested(classifier=nn.Sequential(nn.Dropout(), nn.Linear(5, 3)))
    theirs = nested(classifier=nn.Linear(5, classes)).state_dict()
    assert load_into(ours, theirs, head="classifier.1", source="x") is is_new
    assert torch.equal(ours.classifier[1].weight, theirs["classifier.weight"]) is not is_new
    deep = nested(classifier=nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)))
    with pytest.raises(CheckpointError, match=r"classifier\.0\.weight: absent in the file"):
        load_into(deep, theirs, head="classifier.1", source="x")


def test_layers_that_are_named_like_what_tools_add_are_loaded() -> None:
    ours, theirs = (nested(aux1=nn.Linear(2, 2), loss=nn.Linear(2, 2), head=nn.Linear(5, 3)) for _ in range(2))
    for state in (theirs.state_dict(), prefixed("module.", theirs.state_dict())):
        assert load_into(ours, state, head="head", source="x") is False
        assert torch.equal(ours.loss.weight, theirs.loss.weight)
        assert torch.equal(ours.aux1.weight, theirs.aux1.weight)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"0.weight": torch.zeros(5, 9)}, r"0.weight: \(5, 9\) in the file, \(5, 4\) in the model"),
        ({"0.bias": None}, r"0.bias: absent in the file, \(5,\) in the model"),
        ({"9.bias": torch.zeros(2)}, r"9.bias: \(2,\) in the file, absent in the model"),
    ],
)
def test_other_differences_leave_the_model_untouched(change: dict[str, Tensor | None], first: str) -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {**small_model().state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"checkpoint x is not a Sequential .*1 of \d layers .*first: {first}"):
        load_into(model, state, head="2", source="x")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_deeper_network_is_not_loaded_by_half() -> None:
    deeper = CifarResNet(32, classes=10).state_dict()
    with pytest.raises(CheckpointError, match="24 of 63 layers do not fit"):
        load_into(CifarResNet(20, classes=10), deeper, head="linear", source="x")


def test_a_name_that_begins_like_the_head_is_not_the_head() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "head_dist": nn.Linear(2, 2)})
    state = {name: value for name, value in model.state_dict().items() if "dist" not in name}
    with pytest.raises(CheckpointError, match="head_dist"):
        load_into(model, state, head="head", source="x")


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()


def test_weights_for_other_channels_name_the_field() -> None:
    colour, grey = (nn.Sequential(nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 4, 3)) for channels in (3, 1))
    for model, theirs, channels in ((grey, colour, 3), (colour, grey, 1)):
        with pytest.raises(CheckpointError, match=rf"so set data\.channels={channels}"):
            load_into(model, theirs.state_dict(), head="head", source="weights.pth")
    other = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 4, 3))
    with pytest.raises(CheckpointError, match="name the architecture of the checkpoint"):
        load_into(colour, other.state_dict(), head="head", source="weights.pth")


PLAIN = {"conv.weight": torch.full((2, 3), 1.0), "head.bias": torch.zeros(2)}
AVERAGED = {f"module.{name}": value + 1 for name, value in PLAIN.items()} | {"n_averaged": torch.tensor(5)}


@pytest.mark.parametrize(
    ("content", "first", "remarks"),
    [
        ({"model": PLAIN, "model_ema": AVERAGED}, 2.0, ("of its parts model_ema, model, 'model_ema' is read",)),
        ({"state_dict": {f"model.{k}": v for k, v in PLAIN.items()} | {"criterion.weight": torch.ones(8)}}, 1.0, ()),
        ({"state_dict": {f"net.{k}": v for k, v in PLAIN.items()}}, 1.0, ()),
        ({"state_dict": {f"network.module.{k}": v for k, v in PLAIN.items()}, "epoch": 3}, 1.0, ()),
        (PLAIN | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)}, 1.0, ()),
        (AVERAGED, 2.0, ()),
        ({"loss_fn.pos_weight": torch.ones(2)} | PLAIN, 1.0, ()),
    ],
)
def test_what_training_tools_wrap_and_add_is_taken_off(
    tmp_path: Path, content: dict[str, Any], first: float, remarks: tuple[str, ...]
) -> None:
    torch.save(content, tmp_path / "weights.pth")
    model = nn.ModuleDict({"conv": nn.Linear(3, 2, bias=False), "head": nn.Linear(1, 2)})
    checkpoint = read_for(model, tmp_path / "weights.pth", "head")
    assert checkpoint.state.keys() == PLAIN.keys()
    assert checkpoint.state["conv.weight"][0, 0] == first
    assert checkpoint.remarks == remarks
