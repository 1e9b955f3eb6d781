"""Fuzzing of files from strangers: a damaged one gives what it held, or one of deitkit's errors, and never runs.

A few cases of each kind run with the suite; `make fuzz` runs thousands.
"""

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import save
from torch import Tensor, nn

from conftest import striped_dataset
from deitkit.data.decode import SUFFIXES
from deitkit.data.decode_many import decode_images
from deitkit.data.listing import EncodedImages
from deitkit.errors import CheckpointError, DataError
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.models.saved import load_classifier, save_classifier
from deitkit.models.vit import DeiT
from deitkit.models.weights.initialise import read_weights
from deitkit.models.weights.read import read_state
from deitkit.recipe.schema import DataRecipe
from deitkit.run.state import load_tree, save_tree
from fuzz_helpers import cases, mutated

TREE = {"step": 3, "loss": [0.5, None], "model": {"weight": torch.arange(6.0).view(2, 3), "n": torch.tensor(4)}}


def a_student() -> DeiT:
    return DeiT(image_px=8, patch_px=4, channels=1, classes=3, width=8, depth=1, heads=2, tokens=("class",))


def torch_bytes(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


STATE = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
PICKLES = (b"\x80\x02", b"cos\nsystem\n", b"X\x01\0\0\0a", b"}", b"R", b".", b"\x85", b"q\0", b"h\xff", b"\x8a\xff")
WEIGHTS = {
    "safetensors": (save(STATE), (b'"F64"', b"[0,99]", b"[-1]", b'{"', b"\xff" * 8, b"[99999999]")),
    "zip": (torch_bytes(STATE), (b"PK\1\2", b"PK\5\6", b"\xff" * 4, *PICKLES)),
    "legacy": (torch_bytes(STATE, _use_new_zipfile_serialization=False), PICKLES),
    "student": (torch_bytes({"model": a_student().state_dict()}), PICKLES),
    "pickle": (pickle.dumps({"weight": [1.0, 2.0]}), PICKLES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.filterwarnings("ignore")
@cases(1.5)
@given(data=st.data())
def test_a_damaged_state_of_a_run_is_noticed(folder: Path, data: st.DataObject) -> None:
    path = folder / "tree.safetensors"
    save_tree(path, TREE)
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    try:
        loaded = load_tree(path)
    except CheckpointError:
        return
    assert same(loaded, TREE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("tensor", "dict", "list", "value", "x")), inner, max_size=2)
    ),
    max_leaves=8,
)


@cases(0.5)
@given(tree=json_values)
def test_a_state_that_somebody_made_up_is_refused_or_read(folder: Path, tree: Any) -> None:
    from deitkit.run.state import _checksum

    tensors = {"0": torch.zeros(2)}
    text = json.dumps(tree)
    metadata = {"tree": text, "sha256": _checksum(text, tensors)}
    path = folder / "made-up.safetensors"
    path.write_bytes(save(tensors, metadata=metadata))
    with contextlib.suppress(CheckpointError):
        load_tree(path)


@pytest.mark.parametrize("kind", WEIGHTS)
@cases(0.6)
@given(data=st.data())
@pytest.mark.parametrize("read", [read_state, read_weights])
def test_damaged_weights_are_tensors_or_refused(
    folder: Path, kind: str, read: Callable[[Path], Any], data: st.DataObject
) -> None:
    content, pieces = WEIGHTS[kind]
    path = folder / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    path.write_bytes(data.draw(mutated(content, pieces)))
    try:
        found = read(path)
    except CheckpointError:
        return
    state = found if isinstance(found, dict) else found.state
    assert state
    assert all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    assert all(value.numel() <= 8 * path.stat().st_size for value in state.values())


CARDS = {"deit": a_student, "cnn": lambda: CifarResNet(20, channels=1, classes=3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    names = striped_dataset().class_names
    for kind, build in CARDS.items():
        card = {"channels": 1, "class_names": list(names), "architecture": "cifar/resnet20"}
        save_classifier(home / kind, Classifier(build(), mean=(0.5,), std=(0.5,), image_px=None), card)
    return home


@pytest.mark.parametrize("kind", CARDS)
@cases(0.5)
@given(data=st.data())
def test_a_damaged_model_folder_is_refused(saved: Path, folder: Path, kind: str, data: st.DataObject) -> None:
    home = folder / kind
    home.mkdir(exist_ok=True)
    card = json.loads((saved / kind / "model.json").read_text())
    section = card["config"] if card["config"] and data.draw(st.booleans()) else card
    key = data.draw(st.sampled_from(sorted(section)))
    odd = st.sampled_from((None, 0, -1, 7, 1.5, "", "x", "none/none", [], [None], {}, True, 10**30, [0.0], ["class"]))
    if data.draw(st.booleans()):
        section[key] = data.draw(odd)
    else:
        del section[key]
    (home / "model.json").write_text(json.dumps(card))
    other = data.draw(st.sampled_from((kind, kind, kind, *CARDS)))
    (home / "model.safetensors").write_bytes((saved / other / "model.safetensors").read_bytes())
    try:
        classifier, _ = load_classifier(home, torch.device("cpu"))
    except CheckpointError:
        return
    state = read_state(home / "model.safetensors")
    assert all(
        torch.equal(value, state[name]) for name, value in classifier.model.state_dict().items() if name in state
    )


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    plain = zipfile.ZipFile(io.BytesIO(torch_bytes(STATE)))
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry) if "/data/" not in entry.filename else bytes(2**24))
    assert path.stat().st_size < 2**18
    with pytest.raises(CheckpointError, match="damaged or not a weights"):
        read_state(path)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "wide.pth"
    torch.save({"weight": torch.zeros(1, dtype=kind).expand(10**12)}, path)
    with pytest.raises(CheckpointError, match="damaged or not a weights"):
        read_state(path)


def image_bytes(kind: str) -> bytes:
    pixels = torch.arange(12 * 10 * 3, dtype=torch.uint8).view(12, 10, 3).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))
IMAGES = {kind: image_bytes(kind) for kind in KINDS}
PARTS = (
    b"\xff\xd8\xff\xe1",
    b"Exif\0\0",
    b"IHDR",
    b"IDAT",
    b"tRNS",
    b"\x21\xf9\4",
    b"RIFF",
    b"%!PS-Adobe",
    b"\xff" * 4,
)


@pytest.mark.parametrize("kind", IMAGES)
@cases(0.4)
@given(data=st.data())
def test_a_damaged_image_is_pixels_or_skipped_by_name(kind: str, data: st.DataObject) -> None:
    content = data.draw(mutated(IMAGES[kind], PARTS))
    contents = [content, IMAGES["PNG"]]
    encoded = EncodedImages(
        ["odd", "good"], lambda positions: (contents[position] for position in positions), str(hash(content))
    )
    channels = data.draw(st.sampled_from((1, 3)))
    try:
        decoded = decode_images(encoded, torch.arange(2), DataRecipe(image_px=6, channels=channels))
    except DataError:
        return
    assert decoded.images.shape == (2 - len(decoded.skipped), channels, 6, 6)
    assert decoded.skipped in ((), ("odd",))
    assert decoded.kept.tolist() == [not decoded.skipped, True]


def test_every_kind_of_image_is_fuzzed_that_is_read() -> None:
    kinds = {Image.registered_extensions()[suffix] for suffix in SUFFIXES}
    assert kinds <= set(IMAGES)
