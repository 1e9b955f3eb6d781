"""Images, files and names as they lie about: every kind of bad data, in memory and streamed."""

import html
import io
import itertools
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image

from deitkit.cli.apply import predict
from deitkit.comparison.compare import compare
from deitkit.comparison.describe import describe_data
from deitkit.data import decode
from deitkit.data.cache import cache_folder
from deitkit.data.dataset import load_dataset
from deitkit.data.duplicates import find_duplicates, pixel_hashes
from deitkit.data.listing import Listing
from deitkit.errors import DataError, RecipeError
from deitkit.evaluation.classify import Classification
from deitkit.recipe.schema import DataRecipe
from deitkit.run.observer import Watcher
from deitkit.system.user_code import import_user_code
from source_helpers import png, refused, write_classes

STREAMED = pytest.mark.parametrize("fields", [{"streaming": False}, {"streaming": True, "workers": 0}])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def load(name, **fields):
    return load_dataset(DataRecipe(name=str(name), **fields))


# Images


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def on_white(image):
    """Composite by hand: pixel times alpha, and white times the rest."""
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


COLOURS = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
RGB, RGBA = Image.fromarray(COLOURS[..., :3].copy()), Image.fromarray(COLOURS)
CMYK, PALETTE, GREY = RGB.convert("CMYK"), RGB.quantize(16), RGB.convert("L")
DEEP = np.random.default_rng(2).integers(0, 65536, (8, 8), dtype=np.uint16)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "blue")]}

# What is in the file, what it must look like, and by how much a lossy or rounded one may differ.
KINDS = {
    "plain": (encode(RGB), RGB, 0),
    "grey": (encode(GREY), GREY.convert("RGB"), 0),
    "bilevel": (encode(GREY.convert("1")), GREY.convert("1").convert("RGB"), 0),
    "palette": (encode(PALETTE), PALETTE.convert("RGB"), 0),
    "alpha": (encode(RGBA), on_white(RGBA), 1),
    "alpha, webp": (encode(RGBA, "WEBP", lossless=True, exact=True), on_white(RGBA), 1),
    "grey and alpha": (encode(RGBA.convert("LA")), on_white(RGBA.convert("LA")), 1),
    "cmyk, tiff": (encode(CMYK, "TIFF"), CMYK.convert("RGB"), 0),
    "cmyk, jpeg": (encode(Image.new("CMYK", (8, 8), (0, 200, 100, 50)), "JPEG", quality=100), (205, 44, 125), 4),
    "16 bits, png": (encode(DEEP), np.repeat(DEEP[..., None] / 257, 3, axis=2), 0.5),
    "16 bits, tiff": (encode(DEEP, "TIFF"), np.repeat(DEEP[..., None] / 257, 3, axis=2), 0.5),
    "animated gif": (encode(Image.new("RGB", (8, 8), "red"), "GIF", **FRAMES), (255, 0, 0), 0),
    "animated png": (encode(RGB, **FRAMES), RGB, 0),
    "animated webp": (encode(RGB, "WEBP", lossless=True, **FRAMES), RGB, 0),
    "pages of a tiff": (encode(RGB, "TIFF", **FRAMES), RGB, 0),
    "damaged metadata": (encode(RGB, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0"), RGB, 0),
}
for damage in (b"Exif\0\0" + b"\0" * 32, b"Exif\0\0II*\0", b"Exif\0\0not a TIFF at all"):
    KINDS |= {
        f"metadata {damage!r}": (encode(RGB, exif=damage), RGB, 0),
        f"metadata {damage!r}, webp": (encode(RGB, "WEBP", lossless=True, exif=damage), RGB, 0),
        f"metadata {damage!r}, jpeg": (
            encode(Image.new("RGB", (8, 8), "red"), "JPEG", quality=100, dpi=(72, 72), exif=damage), (254, 0, 0), 2
        ),
    }  # fmt: skip


TURNED = Image.new("RGB", (8, 8), "red")
TURNED.paste("blue", (0, 0, 4, 8))
for tag, kind, value in ((0x0100, 2, b"no"), (0x011A, 2, b"no"), (0x0102, 2, b"no"), (0x0100, 8, b"\xfd\xff\0\0")):
    # A little-endian TIFF header and two entries: the orientation, and one of a type that its tag does not have.
    entries = (
        struct.pack("<HHHII", 2, 0x0112, 3, 1, 6),
        struct.pack("<HHI4s", tag, kind, len(value) // kind or 1, value),
    )
    broken = b"Exif\0\0II*\0" + struct.pack("<I", 8) + b"".join(entries) + struct.pack("<I", 0)
    content = encode(TURNED.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=100, subsampling=0, exif=broken)
    KINDS[f"rotated, damaged metadata {tag:x} {kind}"] = (content, TURNED, 4)


def one_of_many(root, content):
    """Write a data set of which one training image is this file."""
    for part, label in itertools.product(("train", "test"), "ab"):
        (root / part / label).mkdir(parents=True)
        for index in range(3 if part == "train" else 1):
            (root / part / label / f"{index}.png").write_bytes(png(index, size=(8, 8)))
    (root / "train" / "a" / "odd.png").write_bytes(content)
    return f"folder:{root}"


def all_images(data):
    splits = (data.train, data.validation, data.test)
    return torch.cat([split.pixels(torch.arange(len(split))) for split in splits]).permute(0, 2, 3, 1).double()


@STREAMED
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_looks_as_it_is_meant(tmp_path, kind, fields):
    content, expected, tolerance = KINDS[kind]
    images = all_images(load(one_of_many(tmp_path, content), **fields))
    assert len(images) == 9
    expected = torch.from_numpy(np.broadcast_to(np.asarray(expected, dtype=float), (8, 8, 3)).copy())
    assert ((images - expected).abs().flatten(1).max(dim=1).values <= tolerance + 1e-9).sum() == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_torchvisions(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quadrants = np.zeros((16, 16, 3), np.uint8)
    quadrants[:8, :8], quadrants[:8, 8:], quadrants[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    content = encode(quadrants, "JPEG", exif=exif, quality=100, subsampling=0)
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    expected = decode_image(encoded, mode="RGB", apply_exif_orientation=True).permute(1, 2, 0)
    images = all_images(load(one_of_many(tmp_path, content), image_px=16))
    assert ((images - expected).abs().flatten(1).max(dim=1).values <= 3).sum() == 1


BOMB = encode(np.zeros((90, 90), np.uint8))


@STREAMED
@pytest.mark.parametrize("content", [b"", encode(COLOURS)[:-60], encode(RGB, "JPEG")[:300], b"<html>404</html>", BOMB])
def test_what_cannot_be_decoded_is_left_out_and_named(tmp_path, content, fields, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    name = one_of_many(tmp_path, content)
    data = load(name, image_px=8, **fields)
    assert data.skipped == ("train/a/odd.png",)
    assert len(all_images(data)) == 8
    refused(name, "'train/a/odd.png' cannot be decoded", "set data.corrupt=skip", corrupt="error", **fields)


# Files


@STREAMED
def test_links_and_hidden_files(tmp_path, fields):
    photos = write_classes(tmp_path / "photos", {"a": 20, "b": 20})
    for name in (".DS_Store", "._000.png", "Thumbs.db", "desktop.ini", ".hidden.png"):
        (photos / "a" / name).write_bytes(b"\0\5\x16\7")
        (photos / name).write_bytes(b"")
    (photos / ".cache").mkdir()
    os.mkfifo(photos / "a" / "pipe.png")
    (photos / "a" / "up").symlink_to(photos, target_is_directory=True)
    (photos / "loop").symlink_to("loop")
    assert load(f"folder:{photos}", **fields).skipped == ()
    (photos / "a" / "itself.png").symlink_to("itself.png")
    (photos / "a" / "gone.png").symlink_to("nowhere.png")
    (photos / "a" / "linked.png").symlink_to("000.png")
    data = load(f"folder:{photos}", **fields)
    assert data.skipped == ("a/gone.png", "a/itself.png")
    assert data.class_names == ("a", "b")
    assert len(all_images(data)) == 41
    refused(f"folder:{photos}", "'a/gone.png' cannot be decoded", corrupt="error", **fields)


def test_one_class_or_one_image_is_a_sentence(tmp_path):
    one = write_classes(tmp_path / "one", {"cat": 5})
    write_classes(one / "cat", {"more": 5})
    refused(f"folder:{one}", "has 1 class", "at least 2 are needed: add another")
    for inner in ("data", "train"):
        archive = tmp_path / f"archive-{inner}" / "flowers"
        write_classes(archive if inner == "data" else archive / inner, {"rose": 5, "lily": 5})
        told = f"has 1 class, but at least 2 are needed: did you mean folder:{archive}?"
        refused(f"folder:{archive.parent}", told)
        refused(f"folder:{archive.parent}/", told)
    few = write_classes(tmp_path / "few", {"cat": 5, "dog": 1})
    refused(f"folder:{few}", "class 'dog'", "has 1 image for train, validation and test", "at least 3: add images")
    write_classes(tmp_path / "split" / "train", {"cat": 5, "dog": 1})
    write_classes(tmp_path / "split" / "test", {"cat": 1, "dog": 1})
    refused(f"folder:{tmp_path / 'split'}", "class 'dog'", "has 1 image for train and validation", "at least 2")


@STREAMED
def test_rows_without_an_image_are_named_and_those_without_a_label_refused(tmp_path, fields):
    images = [{"bytes": png(index), "path": None} for index in range(20)]
    images[3], images[8] = None, {"bytes": None, "path": "elsewhere.png"}
    table = pa.table({"image": pa.array(images), "label": [0, 1] * 10, "caption": [None] * 20, "box": [[1.5]] * 20})
    pq.write_table(table, tmp_path / "set.parquet")
    data = load(f"parquet:{tmp_path}", **fields)
    assert data.skipped == ("set.parquet row 3", "set.parquet row 8")
    assert len(all_images(data)) == 18
    for labels, told in (([None] * 20, "20 of 20 labels"), ([0, 1] * 9 + [0, 7 * 10**9], "1 of 20 labels are outside")):
        pq.write_table(table.set_column(1, "label", pa.array(labels)), tmp_path / "set.parquet")
        refused(f"parquet:{tmp_path}", told, "set.parquet", **fields)


def test_hostile_names_are_one_line_and_any_script_stays():
    error = DataError("class 'a\nb\x1b[31m\u2028\udce9' of 貓, قطة, می\u200cخواهم")
    assert str(error) == r"class 'a\nb\x1b[31m\u2028\udce9' of 貓, قطة, می" + "\u200cخواهم"


# Duplicates


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4), (1, 1, 1)])
def test_hashes_tell_images_apart_as_their_bytes_do(shape):
    images = np.random.default_rng(0).integers(0, 4, (600, *shape), dtype=np.uint8)
    images[300:] = images[:300][::-1]  # equal ones in other chunks
    images[7, -1, -1, -1] += 1  # the last byte counts
    hashes, contents = pixel_hashes(images).tolist(), [image.tobytes() for image in images]
    assert len(set(hashes)) == len(set(contents)) == len(set(zip(hashes, contents)))


def test_pairs_are_those_of_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randint(-20, 20, (30,), generator=generator), torch.randint(-20, 20, (40,), generator=generator)
    naive = [
        [place, train.tolist().index(value)] for place, value in enumerate(test.tolist()) if value in train.tolist()
    ]
    assert find_duplicates(train, test).tolist() == naive
    assert find_duplicates(train[:0], test).shape == (0, 2)


def write_split(root, kind, pixels, train):
    """Write images of two classes, the first ones for training; return what messages call each."""
    names, rows = [], {"train": [], "test": []}
    for index, image in enumerate(pixels):
        part = "train" if index < train else "test"
        file = root / part / "ab"[index % 2] / f"{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        rows[part].append({"image": file.read_bytes(), "label": index % 2, "extra": {"more": [None, "columns"]}})
        names.append(str(file.relative_to(root)))
        if kind == "parquet":
            names[-1] = f"{part}-0.parquet row {len(rows[part]) - 1}"
    if kind == "parquet":
        for part, some in rows.items():
            pq.write_table(pa.Table.from_pylist(some), root / f"{part}-0.parquet")
    return names


@STREAMED
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_test_images_that_were_trained_on_are_counted_and_named(tmp_path, kind, fields):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 12, 16, 3), dtype=np.uint8)
    pixels[40:50] = pixels[:10]
    names = write_split(tmp_path, kind, pixels, train=40)
    data = load(f"{kind}:{tmp_path}", image_px=8, **fields)
    trained = {some.numpy().tobytes() for some in data.train.pixels(torch.arange(len(data.train)))}
    tests = data.test.pixels(torch.arange(len(data.test)))
    assert data.duplicates.count == sum(image.numpy().tobytes() in trained for image in tests)
    assert 5 <= data.duplicates.count <= 10  # validation images are no training images
    assert len(data.duplicates.examples) == 5
    assert set(data.duplicates.examples) < {(names[40 + index], names[index]) for index in range(10)}
    assert len(data.test) == 20, "nothing is removed"
    assert load(f"{kind}:{tmp_path}", image_px=8, **fields).duplicates == data.duplicates, "as kept in the cache"
    cropped = load(f"{kind}:{tmp_path}", image_px=8, eval_crop=0.5, **fields)
    assert cropped.duplicates == data.duplicates, "another crop of an image is the same image"


def test_duplicates_of_decoded_sets_are_called_by_their_place(monkeypatch):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4), dtype=np.uint8))
    official_test = torch.arange(40) >= 30
    pixels[33:37] = pixels[3]
    listing = Listing(pixels, torch.arange(40) % 2, official_test, ("a", "b"))
    monkeypatch.setattr("deitkit.data.sources.choose.list_named", lambda *_: listing)
    seeds = (load("cifar10", split_seed=seed, image_px=8).duplicates for seed in range(9))
    examples = tuple((f"test image {place}", "training image 3") for place in range(3, 7))
    assert {(found.count, found.examples) for found in seeds} == {(4, examples), (0, ())}  # trained on or validated
    assert load("digits").duplicates.count == 0


def test_a_comparison_tells_of_duplicates(tiny_recipe, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    pixels[40:50] = pixels[:10]
    write_split(tmp_path / "data", "folder", pixels, train=40)
    said = []
    results = compare_once(tiny_recipe, tmp_path, said, f"data.name=folder:{tmp_path / 'data'}")
    found = results.dataset.duplicates
    assert len(found.examples) == 5
    test, train = found.examples[0]
    sentence = f"{found.count} test images are also among the training images, such as '{test}' (as '{train}')"
    assert sum(line.startswith(sentence) for line in said) == 1
    assert sum(note.startswith(sentence) for note in results.notes) == 1
    written = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert written["dataset"]["duplicates"] == {
        "count": found.count,
        "examples": [list(p) for p in found.examples],
    }
    for name in ("table.md", "table.tex", "report.html"):
        assert "also among the training images" in (tmp_path / "run" / name).read_text(encoding="utf-8")


def test_validation_images_that_are_test_or_training_images_are_told(tiny_recipe, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    for part, places in (("train", range(20)), ("val", [*range(40, 50), *range(3)]), ("test", range(40, 60))):
        for place in places:
            folder = tmp_path / "data" / part / "ab"[place % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[place]).save(folder / f"{place}.png")
    said = []
    results = compare_once(tiny_recipe, tmp_path, said, f"data.name=folder:{tmp_path / 'data'}")
    for words in ("10 validation images are also among the test", "3 validation images are also among the training"):
        assert sum(line.startswith(words) for line in said) == 1
        assert sum(note.startswith(words) for note in results.notes) == 1


def compare_once(tiny_recipe, tmp_path, said, *overrides):
    """Run a comparison of one method into ``tmp_path / "run"``, and return its results."""
    watcher = Watcher()
    watcher.say = said.append
    recipe = tiny_recipe(
        "methods=[none]", "train.batch_size=8", "train.epochs=1", "data.train_images=null", "data.test_images=null",
        "augment.crop=none", *overrides,
    )  # fmt: skip
    return compare(recipe, tmp_path / "run", watcher=watcher)


# Names

NAMES = (
    "貓", "قطة", "کتاب\u200cخانه", "naïve café", "a/b\\..", "two\nlines", 'quo"te\'s', "<script>alert(1)</script>",
    "$x_1^2$ & [red]", "\x1b[31m",
)  # fmt: skip


def test_class_names_of_any_kind_go_all_the_way(tiny_recipe, tmp_path, capsys, monkeypatch):
    rows = [
        {"image": png(8 * label + index, size=(8, 8)), "label": name}
        for label, name in enumerate(NAMES)
        for index in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[::4]), tmp_path / "test-0.parquet")
    results = compare_once(tiny_recipe, tmp_path, [], f"data.name=parquet:{tmp_path}")
    run = tmp_path / "run"
    names = sorted(NAMES)
    assert results.dataset.class_names == tuple(names)
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["dataset"]["class_names"] == names
    page = (run / "report.html").read_text(encoding="utf-8")
    listed = re.search('<ul class="names">(.*?)</ul>', page, re.DOTALL)[1]
    assert [html.unescape(item) for item in re.findall("<li>(.*?)</li>", listed, re.DOTALL)] == names
    assert "<script>alert" not in page
    assert all((run / f"table.{suffix}").stat().st_size for suffix in ("md", "csv", "tex"))
    photo = tmp_path / "photos" / "1.png"
    photo.parent.mkdir()
    photo.write_bytes(png(1, size=(8, 8)))
    photo.with_name("._1.png").write_bytes(b"\0")
    (answer,) = list(Classification(run / "winner", [photo.parent], top=10))
    assert sorted(name for name, _ in answer["classes"]) == names
    predict(run / "winner", [photo.parent], top=10)
    table = capsys.readouterr().out
    assert "\x1b" not in table
    assert r"two\nlines" in table
    assert "<script>alert(1)</script>" in table
    assert "[red]" in table
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    photo.write_bytes(BOMB)
    with pytest.raises(DataError, match=r"1\.png cannot be decoded .*more than 5,000 pixels"):
        list(Classification(run / "winner", [photo]))


@STREAMED
def test_folders_with_names_that_are_no_utf8(tmp_path, fields):
    photos = write_classes(tmp_path / "photos", {"b": 8})
    old, bad = (os.fsdecode(name) for name in (b"caf\xe9", b"\xe9.png"))
    write_classes(photos, {old: 20}, start=8)
    (photos / old / bad).write_bytes(b"no image")
    data = load(f"folder:{photos}", **fields)
    assert data.class_names == ("b", r"caf\udce9")
    assert data.skipped == (r"caf\udce9/\udce9.png",)
    assert json.dumps([data.class_names, data.skipped], ensure_ascii=False).encode("utf-8")


def test_images_of_a_part_of_16_bits_are_told_to_be_nearly_black(tmp_path):
    levels = np.random.default_rng(0).integers(0, 4096, (40, 8, 8), dtype=np.uint16)  # 12 bits
    for name, images in (("dark", levels), ("whole", 16 * levels)):
        for number, image in enumerate(images):
            file = tmp_path / name / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    dark, whole = ("; ".join(describe_data(load(f"folder:{tmp_path / name}"))) for name in ("dark", "whole"))
    assert "the training images are nearly black (mean 0.03" in dark
    assert "nearly black" not in whole


def test_a_relative_folder_that_is_not_there_is_looked_for_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"folder 'photos' does not exist in {tmp_path}: data\.name=folder:PATH needs"):
        load("folder:photos")
    for name in (f"folder:{tmp_path}/x", f"csv:{tmp_path}/x.csv", f"parquet:{tmp_path}/x"):
        with pytest.raises(DataError, match=r"x[^ ]*' does not exist: "):
            load(name)


@STREAMED
def test_what_cannot_be_read_for_a_while_is_not_left_out_for_ever(tmp_path, fields, monkeypatch):
    name = one_of_many(tmp_path / "photos", encode(RGB))
    opened = decode._opened

    def flaky(encoded):
        if isinstance(encoded, Path) and encoded.name == "odd.png":
            raise OSError(5, "Input/output error")
        return opened(encoded)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_opened", flaky)
        assert load(name, **fields).skipped == ("train/a/odd.png",)
    assert load(name, **fields).skipped == (), "the disk is well again"

    def full(encoded):
        raise MemoryError

    monkeypatch.setattr(decode, "_opened", full)
    with pytest.raises(MemoryError):  # which the command line tells, and which is no fault of a file
        load(name, corrupt="error", **fields)


def test_an_unknown_user_in_a_path_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = "~no-such-user/photos"
    for kind in ("folder", "csv", "parquet"):
        refused(f"{kind}:{unknown}", f"'{unknown}' does not exist in {tmp_path}")
    refused(unknown, f"data.name={unknown} is not a data set")
    refused("digits", f"'{unknown}' does not exist", unlabelled=f"folder:{unknown}")
    monkeypatch.setenv("DEITKIT_DATA", unknown)
    refused("cifar10", f"cifar10 is neither in '{unknown}/cifar10' nor in", download=False)
    monkeypatch.setenv("DEITKIT_CACHE", unknown)
    assert cache_folder() == Path(unknown)
    monkeypatch.setenv("DEITKIT_IMPORT", f"{unknown}/mine.py")
    with pytest.raises(RecipeError, match=r"mine\.py is not a file: name a Python file"):
        import_user_code()
