import gzip
import io
import json
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torchvision import datasets

from deitkit.data.pixels import resize, to_channels
from deitkit.data.sources.named import DOWNLOADING, FASHION_FILES, NAMED_SETS
from source_helpers import load, refused, write_classes, write_parquet


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("DEITKIT_CACHE", str(elsewhere / "cache"))
    monkeypatch.setenv("DEITKIT_DATA", str(elsewhere / "data"))


def cifar_like(count, side=32, mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    shape = (count, side, side) if mode == "L" else (count, side, side, 3)
    return generator.integers(0, 256, shape, dtype=np.uint8), np.arange(count) % 10


def write_pngs(folder, pixels, labels):
    for index, (image, label) in enumerate(zip(pixels, labels)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{index:03}.png")


@pytest.mark.parametrize("where", [".", "cifar10", "CIFAR-10"])
@pytest.mark.parametrize("form", ["folders", "parquet"])
def test_cifar10_is_found_in_any_form(tmp_path, where, form):
    for split, count in (("train", 40), ("test", 20)):
        pixels, labels = cifar_like(count, seed=count)
        if form == "folders":
            write_pngs(tmp_path / where / split, pixels, labels)
        else:
            encoded = [_encoded(image) for image in pixels]
            (tmp_path / where).mkdir(exist_ok=True)
            table = pa.table({"img": [{"bytes": content, "path": None} for content in encoded], "label": labels})
            pq.write_table(table, tmp_path / where / f"{split}-00000-of-00001.parquet")
    data = load("cifar10", root=tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    pixels, labels = cifar_like(20, seed=20)
    known = {image.transpose(2, 0, 1).tobytes(): label for image, label in zip(pixels, labels)}
    assert [known[image.numpy().tobytes()] for image in data.test.images] == data.test.labels.tolist()
    small = load("cifar10", root=tmp_path, image_px=16, channels=1)
    assert torch.equal(small.test.images, to_channels(resize(data.test.images, 16), 1))


def test_what_was_assumed_of_a_named_set_is_kept(tmp_path):
    names = {kind: [f"{kind} {number}" for number in range(count)] for kind, count in (("fine", 100), ("coarse", 20))}
    features = {f"{kind}_label": {"_type": "ClassLabel", "names": names[kind]} for kind in names}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, count in (("train", 200), ("test", 100)):
        columns = {"img": [_encoded(image) for image in cifar_like(count, seed=count)[0]]}
        columns |= {f"{kind}_label": np.arange(count) % len(names[kind]) for kind in names}
        table = pa.table(columns).replace_schema_metadata(schema)
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    data = load("cifar100", root=tmp_path)
    assert any("fine_label" in line and "coarse_label" in line for line in data.remarks)


def _encoded(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("where", [".", "cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_python_batches_are_left_to_torchvision(tmp_path, monkeypatch, where):
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    (tmp_path / where / "data_batch_1").write_bytes(b"a pickle that nobody may open")
    refused("cifar10", "damaged", root=tmp_path)

    def fake(self, root, train):
        assert Path(root, self.base_folder, "data_batch_1").is_file()
        self.data, self.targets = cifar_like(40 if train else 20)
        self.targets, self.classes = self.targets.tolist(), list("abcdefghij")

    monkeypatch.setattr(datasets.CIFAR10, "__init__", fake)
    data = load("cifar10", root=tmp_path)
    assert data.class_names == tuple("abcdefghij")
    pixels, labels = cifar_like(20)
    np.testing.assert_array_equal(data.test.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("where", ["FashionMNIST/raw", "fashion_mnist", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, where, zipped):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 40), ("t10k", 20)):
        pixels, labels = cifar_like(count, 28, "L")
        _write_idx(folder / f"{split}-images-idx3-ubyte", pixels, zipped)
        _write_idx(folder / f"{split}-labels-idx1-ubyte", labels.astype(np.uint8), zipped)
    data = load("fashion_mnist", root=tmp_path)
    pixels, labels = cifar_like(20, 28, "L")
    np.testing.assert_array_equal(data.test.images[:, 0].numpy(), pixels)
    assert data.test.labels.tolist() == labels.tolist()
    assert data.class_names[9] == "Ankle boot"
    assert data.channels == 1
    (first,) = folder.glob("train-images*")
    first.write_bytes(first.read_bytes()[:-50])
    refused("fashion_mnist", first.name, "damaged", root=tmp_path)


def _write_idx(path, array, zipped):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    if zipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def test_what_only_looks_like_a_named_set_is_not_taken_for_it(tmp_path):
    write_classes(tmp_path / "train", {"a": 5, "b": 5})  # the root may hold other data sets
    refused("cifar10", "neither", root=tmp_path, download=False)
    write_classes(tmp_path / "cifar10" / "train", {str(label): 4 for label in range(10)})
    refused("cifar10", "no test split", root=tmp_path)
    write_classes(tmp_path / "cifar10" / "test", {str(label): 4 for label in range(10)})
    refused("cifar10", "is not cifar10", "(3, 32, 32)", root=tmp_path)


def test_other_parquet_sets_in_the_root_are_not_taken_for_it(tmp_path):
    tens = [label for label in range(10) for _ in range(3)]
    for split in ("train", "test"):
        write_parquet(tmp_path / "other" / f"{split}-0.parquet", tens, [str(label) for label in range(10)])
    refused("fashion_mnist", "neither", root=tmp_path, download=False)  # as many classes, of another size
    for split in ("train", "test"):
        write_parquet(tmp_path / "cars" / "data" / f"{split}-0.parquet", [0, 1, 1, 0], ["a", "b"])
    refused("cifar10", "neither", root=tmp_path, download=False)
    (tmp_path / "captions").mkdir()
    pq.write_table(pa.table({"image": [b""], "caption": ["a cat"]}), tmp_path / "captions" / "train-0.parquet")
    refused("cifar10", "neither", root=tmp_path, download=False)


def test_a_named_set_in_the_root_itself_keeps_its_own_errors(tmp_path):
    tens = [label for label in range(10) for _ in range(3)]
    write_parquet(tmp_path / "plain_text" / "train-0.parquet", tens, [str(label) for label in range(10)])
    refused("cifar10", "contains no test split of cifar10", root=tmp_path)
    write_parquet(tmp_path / "plain_text" / "test-0.parquet", tens, [str(label) for label in range(10)])
    refused("cifar10", "is not cifar10", root=tmp_path)


def test_hosts_and_files_are_those_of_torchvision():
    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        assert NAMED_SETS[name].url == kind.url
    assert NAMED_SETS["fashion_mnist"].url == datasets.FashionMNIST.mirrors[0]
    assert sorted(f"{file}.gz" for file in FASHION_FILES) == sorted(file for file, _ in datasets.FashionMNIST.resources)
    assert NAMED_SETS["flowers102"].url == datasets.Flowers102._download_url_prefix


def test_offline_and_absent_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    for name, kind in (
        ("cifar10", datasets.CIFAR10),
        ("cifar100", datasets.CIFAR100),
        ("fashion_mnist", datasets.FashionMNIST),
    ):
        monkeypatch.setattr(kind, "download", offline)
        monkeypatch.setattr("deitkit.data.sources.named.unreachable", lambda url: None)
        refused(name, str(tmp_path), "Name or service not known", "data.root", "DEITKIT_DATA", root=tmp_path)
        refused(name, str(tmp_path), "data.download", root=tmp_path, download=False)
    monkeypatch.setenv("DEITKIT_DATA", str(tmp_path / "from-environment"))
    refused("cifar10", "from-environment")


FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.mark.parametrize(
    "spell",
    [lambda name: name.replace("/", "-"), lambda name: name.replace("/", "_").replace(" ", "_").lower(),
     lambda name: str(FASHION.index(name))],
)  # fmt: skip
def test_fashion_mnist_in_class_folders_has_its_official_numbers(tmp_path, spell):
    for split, count in (("train", 40), ("test", 20)):
        pixels, labels = cifar_like(count, side=28, mode="L", seed=count)
        for index, (image, label) in enumerate(zip(pixels, labels)):
            folder = tmp_path / "fashion_mnist" / split / spell(FASHION[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:03}.png")
    data = load("fashion_mnist", root=tmp_path)
    assert data.class_names == FASHION
    pixels, labels = cifar_like(20, side=28, mode="L", seed=20)
    known = {image.tobytes(): label for image, label in zip(pixels, labels)}
    assert [known[image.numpy().tobytes()] for image in data.test.images] == data.test.labels.tolist()


def test_numbered_folders_of_cifar100_are_in_the_order_of_numbers(tmp_path):
    for split in ("train", "test"):
        pixels = (
            np.zeros((200, 32, 32, 3), np.uint8) + np.repeat(np.arange(100, dtype=np.uint8), 2)[:, None, None, None]
        )
        write_pngs(tmp_path / "cifar100" / split, pixels, np.repeat(np.arange(100), 2))
    data = load("cifar100", root=tmp_path)
    assert data.class_names == tuple(str(number) for number in range(100))
    assert data.test.images[:, 0, 0, 0].tolist() == data.test.labels.tolist()


def test_a_download_of_another_process_is_waited_for(tmp_path):
    """Half of its files would be taken for damaged ones."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = cifar_like(20, side=28, mode="L")
    files = {}
    for name in FASHION_FILES:
        array = pixels if "images" in name else labels.astype(np.uint8)
        header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        files[raw / f"{name}.gz"] = gzip.compress(header + array.tobytes())
    for path, content in files.items():
        path.write_bytes(content[: len(content) // 2])
    begun = threading.Event()

    def download():
        with FileLock(tmp_path / DOWNLOADING):
            begun.set()
            time.sleep(0.3)
            for path, content in files.items():
                path.write_bytes(content)

    threading.Thread(target=download).start()
    begun.wait()
    assert len(load("fashion_mnist", root=tmp_path).test) == 20


def test_one_process_at_a_time_downloads(tmp_path, monkeypatch):
    pixels, labels = cifar_like(20)

    def download(root, download):
        assert (tmp_path / "new" / DOWNLOADING).exists()
        with pytest.raises(Timeout):
            FileLock(tmp_path / "new" / DOWNLOADING).acquire(timeout=0)
        for split in ("train", "test"):
            write_pngs(tmp_path / "new" / split, pixels, labels)

    monkeypatch.setattr("deitkit.data.sources.named.unreachable", lambda url: None)
    monkeypatch.setattr("deitkit.data.sources.named._torchvision_class", lambda name: download)
    monkeypatch.setitem(NAMED_SETS, "cifar10", replace(NAMED_SETS["cifar10"], read=lambda place: None))
    assert len(load("cifar10", root=tmp_path / "new").test) == 20
    assert not (tmp_path / "new" / DOWNLOADING).exists()


def test_another_spelling_in_the_official_order_stays(tmp_path):
    hub = ["T - shirt / top", *FASHION[1:]]
    for split in ("train", "test"):
        pixels, labels = cifar_like(40, side=28, mode="L")
        table = {"image": [{"bytes": _encoded(image), "path": None} for image in pixels], "label": labels}
        features = {"label": {"names": hub, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        (tmp_path / "fashion_mnist").mkdir(exist_ok=True)
        shard = pa.table(table).replace_schema_metadata(metadata)
        pq.write_table(shard, tmp_path / "fashion_mnist" / f"{split}-00000-of-00001.parquet")
    assert load("fashion_mnist", root=tmp_path).class_names == tuple(hub)


def test_a_lock_that_cannot_be_taken_does_not_hide_the_images(tmp_path):
    pixels, labels = cifar_like(20)
    for split in ("train", "test"):
        write_pngs(tmp_path / "cifar10" / split, pixels, labels)
    (tmp_path / DOWNLOADING).mkdir()  # which nobody can open as a file
    assert len(load("cifar10", root=tmp_path).test) == 20
