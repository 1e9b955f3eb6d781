"""Fuzzing of layouts: folders, parquet files and checkpoints as strangers arrange them give images or one sentence."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from deitkit.data.dataset import load_dataset
from deitkit.data.listing import EncodedImages, Listing
from deitkit.data.sources.folders import list_folder
from deitkit.data.sources.parquet import list_parquet
from deitkit.errors import CheckpointError, DataError
from deitkit.models.weights.read import read_checkpoint
from deitkit.recipe.schema import DataRecipe
from fuzz_helpers import cases


def png(level: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2), level).save(stream, "PNG")
    return stream.getvalue()


PICTURE = png()
WORDS = ("ant", "bee", "cafe\u0301", "caf\u00e9", "Ant", "1", "", " ", "train", "a/b", "雪")
SPLITS = ("train", "Train", "training", "test", "Test", "TESTING", "val", "validation", "valid", "unlabelled", "dev")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def emptied(folder: Path) -> Path:
    """Return the folder without anything in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return folder


Result = TypeVar("Result")


def attempt(call: Callable[[], Result], kind: type[Exception]) -> Result | None:
    """Return the result of a call; None if it is refused in one sentence."""
    try:
        return call()
    except kind as error:
        told = str(error)
    assert "\n" not in told
    return None


def check(listing: Listing) -> None:
    """Check that a listing is one: as many labels as images, each of a class, and no class twice."""
    labels = listing.labels
    assert len(labels) > 0
    assert 0 <= int(labels.min()) <= int(labels.max()) < len(listing.class_names)
    assert len(set(listing.class_names)) == len(listing.class_names)
    assert listing.official_test is None or len(listing.official_test) == len(labels)
    assert isinstance(listing.images, EncodedImages)
    assert len(listing.images.names) == len(labels)
    everything = list(listing.images.read(list(range(len(labels)))))
    assert len(everything) == len(labels)
    assert not any("\n" in remark for remark in listing.remarks)


@st.composite
def label_columns(draw: st.DrawFn, rows: int) -> tuple[pa.Array, list[str] | None]:
    """Draw labels of some type, and class names or None."""
    kind = draw(st.sampled_from(("named", "named", "bare", "text", "from one", "odd")))
    classes = draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    names = draw(st.lists(st.sampled_from(WORDS), min_size=classes, max_size=classes))
    if kind == "named":
        return pa.array(numbers, pa.int64()), names
    if kind == "bare":
        return pa.array(numbers, draw(st.sampled_from((pa.int8(), pa.uint16(), pa.int64())))), None
    if kind == "from one":
        return pa.array([number + 1 for number in numbers]), draw(st.sampled_from((names, None)))
    if kind == "text":
        return pa.array([names[number] for number in numbers], pa.string()), None
    odd: list[pa.Array] = [
        pa.array([None] * rows, pa.int64()),
        pa.array([float(number) for number in numbers]),
        pa.array([[number] for number in numbers], pa.list_(pa.int64())),
        pa.array([number % 2 == 0 for number in numbers]),
        pa.array([-1] * rows),
        pa.array([names[number] for number in numbers]).dictionary_encode(),
    ]
    return odd[draw(st.integers(0, len(odd) - 1))], None


def image_columns(kind: str, rows: int) -> pa.Array:
    if kind == "struct":
        return pa.array([{"bytes": PICTURE, "path": None}] * rows)
    if kind == "path":
        return pa.array([{"bytes": None, "path": f"{row}.png"} for row in range(rows)])
    if kind == "missing":
        return pa.array([{"bytes": PICTURE if row % 2 else None, "path": "x.png"} for row in range(rows)])
    return pa.array([PICTURE] * rows, pa.binary()) if kind == "bytes" else pa.array(["x.png"] * rows)


@st.composite
def parquet_files(draw: st.DrawFn) -> list[tuple[str, pa.Table]]:
    """Draw parquet files: names of splits, shards and configurations, columns and types."""
    found = []
    image = draw(st.sampled_from(("image", "img", "picture", "png")))
    label = draw(st.sampled_from(("label", "labels", "fine_label", "target", "class")))
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(0, 5))
        labels, names = draw(label_columns(rows))
        columns = {
            image: image_columns(draw(st.sampled_from(("struct", "struct", "bytes", "path", "missing", "text"))), rows),
            label: labels,
        }
        if draw(st.booleans()):
            columns[draw(st.sampled_from(("image_id", "coarse_label", "image", "label")))] = pa.array(list(range(rows)))
        features: dict[str, Any] = {label: {"names": names, "_type": "ClassLabel"}} if names is not None else {}
        if draw(st.integers(0, 9)) == 0:
            features[image] = draw(st.sampled_from(({"_type": "Image"}, None, "Image", {"_type": 3})))
        schema = pa.schema(
            [(name, column.type) for name, column in columns.items()],
            metadata={"huggingface": str({"info": {"features": features}}).replace("'", '"').replace("None", "null")},
        )
        stem = draw(st.sampled_from(SPLITS))
        number = draw(st.sampled_from(("", "-0", "-00000-of-00002", "-00001-of-00002", "_corrupted", ".v2")))
        folder = draw(st.sampled_from(("", "", "data/", "plain_text/", "default/train/", "other/")))
        found.append((f"{folder}{stem}{number}.parquet", pa.table(columns, schema=schema)))
    return found


@cases(4)
@given(files=parquet_files())
def test_any_parquet_layout(place: Path, files: list[tuple[str, pa.Table]]) -> None:
    folder = emptied(place)
    for name, table in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)
    listing = attempt(lambda: list_parquet(folder), DataError)
    if listing is not None:
        check(listing)
        assert len(listing.labels) <= sum(len(table) for _, table in files)
        attempt(lambda: load_dataset(DataRecipe(name=f"parquet:{folder}", image_px=2)), DataError)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Draw files of a data set: splits, classes, subfolders and endings."""
    part = st.sampled_from((*SPLITS, *(word for word in WORDS if word and "/" not in word), ".hidden", "__MACOSX"))
    ending = st.sampled_from((".png", ".PNG", ".jpg", ".jfif", ".txt", ".webp", "", ".json", ".png.bak"))
    paths = draw(st.lists(st.tuples(st.lists(part, min_size=0, max_size=3), ending), min_size=1, max_size=14))
    return [("/".join([*parts, f"file{number}{end}"]), PICTURE) for number, (parts, end) in enumerate(paths)]


@cases(5)
@given(tree=trees())
def test_any_tree_of_folders(place: Path, tree: list[tuple[str, bytes]]) -> None:
    folder = emptied(place)
    for name, content in tree:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listing = attempt(lambda: list_folder(folder), DataError)
    if listing is not None:
        check(listing)
        assert set(listing.labels.tolist()) == set(range(len(listing.class_names))), "every class has an image"
        counted = sum(int(remark.split()[2]) for remark in listing.remarks if remark.split()[2].isdigit())
        assert len(listing.labels) + counted <= len(tree)


STATE = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema", "model_ema", "weights", "state_dict_ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
ADDED = ("n_averaged", "criterion.weight", "0.total_ops", "epoch", "args")


@st.composite
def checkpoints(draw: st.DrawFn) -> Any:
    """Draw a checkpoint as tools write it: prefixes, counters and losses inside, wrappers around, extras beside."""
    prefix = "".join(draw(st.lists(st.sampled_from(PREFIXES), max_size=3)))
    content: Any = {f"{prefix}{name}": value for name, value in STATE.items()}
    for name in draw(st.lists(st.sampled_from(ADDED), max_size=3)):
        content[name] = torch.tensor(3) if name != "args" else {"lr": 0.1}
    for wrapper in draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)):
        content = {wrapper: content}
        if draw(st.booleans()):
            content |= {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
        if draw(st.integers(0, 3)) == 0:
            content |= {draw(st.sampled_from(WRAPPERS)): dict(STATE)}
    return content


@cases(5)
@given(content=checkpoints())
def test_any_wrapping_of_a_checkpoint(place: Path, content: Any) -> None:
    path = place / "weights.pth"
    torch.save(content, path)
    read = attempt(lambda: read_checkpoint(path), CheckpointError)
    if read is not None:
        for name, value in read.state.items():
            known = next((known for known in STATE if name.endswith(known)), None)
            assert known is None or torch.equal(value, STATE[known]), name
