"""Images that are decoded on the way are those that would lie in memory, bit for bit, and mistakes are told."""

import gc
import io
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import CPU_FP32, TINY
from deitkit.comparison import estimate
from deitkit.comparison.compare import compare
from deitkit.data import stream, survey
from deitkit.data.batches import Batches
from deitkit.data.cache import cache_folder
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.data.decode import decode_image
from deitkit.data.decode_many import decode_all
from deitkit.data.stream import StreamedImages
from deitkit.errors import DataError
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import DataRecipe
from deitkit.run.observer import Watcher

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three classes of JPEG files of different sizes; one file is damaged."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("bee", "fly", "wasp")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(14):
            noise = draw.integers(0, 120, (20 + index, 24, 3)) + 40 * label
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "photos" / name / f"{index:02}.jpg")
    (tmp_path / "photos" / "fly" / "05.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """The same images, in a parquet file."""
    files = sorted(photos.glob("*/*.jpg"))
    labels = [sorted(entry.name for entry in photos.iterdir()).index(file.parent.name) for file in files]
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "all.parquet", row_group_size=7)
    return tmp_path / "all.parquet"


def load(name: str, **fields: Any) -> Dataset:
    return load_dataset(DataRecipe(name=name, image_px=16, **fields))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize(("workers", "repeats"), [(0, 1), (0, 3), (2, 1), (2, 3)])
def test_streamed_batches_are_those_in_memory(
    kind: str, workers: int, repeats: int, photos: Path, shards: Path
) -> None:
    name = f"folder:{photos}" if kind == "folder" else f"parquet:{shards}"
    resident, streamed = load(name, streaming=False), load(name, streaming=True, workers=workers)
    assert isinstance(resident.train.images, torch.Tensor)
    assert isinstance(streamed.train.images, StreamedImages)
    assert (streamed.mean, streamed.std) == (resident.mean, resident.std)
    assert streamed.skipped == resident.skipped
    assert len(streamed.skipped) == 1
    assert streamed.image_px == (16, 16)
    assert streamed.channels == 3
    for part in ("train", "validation", "test"):
        mine, other = getattr(streamed, part), getattr(resident, part)
        assert torch.equal(torch.cat(list(mine.batches(4))), other.images), part
        assert torch.equal(mine.labels, other.labels), part
    ours, theirs = (Batches(data.train, 4, 7, CPU, repeats=repeats) for data in (streamed, resident))
    for epoch, first_step in ((0, 0), (1, 0), (3, 2)):
        pairs = list(zip(ours.epoch(epoch, first_step), theirs.epoch(epoch, first_step), strict=True))
        assert len(pairs) == ours.steps_per_epoch - first_step
        for mine, other in pairs:
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
    ours.close()


def test_processes_that_decode_ahead_end_at_once_when_they_are_closed(photos: Path) -> None:
    batches = Batches(load(f"folder:{photos}", streaming=True, workers=2).train, 4, 7, CPU)
    first = batches.batch(0, 0)[0]
    workers = psutil.Process().children()
    assert len(workers) == 2
    batches.close()
    # Told to end, and not killed after the patience of torch: they exit by themselves.
    assert [process.wait(timeout=0.5) for process in workers if process.is_running()] in ([], [0], [0, 0], [None] * 2)
    assert not any(process.is_running() for process in workers)
    assert torch.equal(batches.batch(0, 0)[0], first)
    batches.close()


def test_a_training_leaves_no_process_behind(photos: Path, tmp_path: Path) -> None:
    fields = [*TINY, f"data.name=folder:{photos}", "data.image_px=16", "data.streaming=true", "data.workers=1",
              "data.train_images=null", "data.test_images=null", "methods=[none]", "train.epochs=1",
              "train.batch_size=4"]  # fmt: skip
    before = psutil.Process().children()
    gc.disable()
    try:
        compare(load_recipe("digits", fields), tmp_path / "run", watcher=Watcher())
        assert psutil.Process().children() == before
    finally:
        gc.enable()


def test_an_estimate_leaves_no_process_behind(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "LEAST_VIEWS", 0)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which would wait seconds for each process
    fields = [*TINY, f"data.name=folder:{photos}", "data.image_px=16", "data.streaming=true", "data.workers=1",
              "data.train_images=null", "data.test_images=null", "methods=[none]", "train.batch_size=4"]  # fmt: skip
    recipe = load_recipe("digits", fields)
    gc.disable()
    try:
        found = estimate.estimate_training(recipe, load_dataset(recipe.data), tmp_path / "run", CPU_FP32)
        assert found is not None
        assert not psutil.Process().children()
    finally:
        gc.enable()


@pytest.mark.parametrize(("free_images", "largest"), [(10_000, 5), (16, 1), (0, 1), (48, 3)])
def test_parts_of_batches_fit_in_shared_memory(
    free_images: int, largest: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(f"folder:{photos}", streaming=True, workers=2)
    images = data.train.images
    assert isinstance(images, StreamedImages)
    expected = [images.decode(part) for part in torch.arange(20).split(10)]
    monkeypatch.setattr(stream, "free_shared_memory", lambda: free_images * 3 * 16 * 16)
    sent = []
    parts = StreamedImages._parts

    def watched(self: StreamedImages, *inputs: Any) -> Any:
        for part in parts(self, *inputs):
            sent.append(len(part))
            yield part

    monkeypatch.setattr(StreamedImages, "_parts", watched)
    drawn = torch.get_rng_state()
    found = list(images.batches(torch.arange(20).split(10)))
    assert torch.equal(torch.get_rng_state(), drawn), "the caller's own draws go on"
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True, True]
    assert max(sent) == largest
    ahead = 2 * stream.PARTS_AHEAD * max(sent)
    assert ahead <= max(stream.MOST_SHARED * free_images, 2 * stream.PARTS_AHEAD)


def test_crops_of_one_image_are_cut_by_one_worker(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(f"folder:{photos}", streaming=True, workers=5).train.images
    assert isinstance(images, StreamedImages)
    indices = torch.tensor([3, 3, 3, 1, 1, 1, 7, 7, 7, 2])
    boxes = torch.zeros(4, 10, dtype=torch.float64)
    parts = [part for part, _ in images._parts([(indices, boxes)], deque())]
    assert [part.tolist() for part in parts] == [[3, 3, 3], [1, 1, 1], [7, 7, 7], [2]]


def test_an_image_that_is_repeated_is_decoded_and_sent_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(f"folder:{photos}", streaming=True, workers=0)
    asked: list[int] = []
    decode = StreamedImages.decode

    def watched(self: StreamedImages, indices: torch.Tensor) -> torch.Tensor:
        asked.append(len(indices))
        return decode(self, indices)

    monkeypatch.setattr(StreamedImages, "decode", watched)
    images, _ = Batches(data.train, 12, 7, CPU, repeats=3).batch(0, 0)
    assert asked == [4]
    assert images.shape == (12, 3, 16, 16)
    assert torch.equal(images[0], images[2])


def test_what_a_pass_found_is_kept(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(f"parquet:{shards}", streaming=True, workers=0)
    monkeypatch.setattr("deitkit.data.survey.decode_all", lambda *_: pytest.fail("decoded again"))
    again = load(f"parquet:{shards}", streaming=True, workers=0)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train.pixels(torch.arange(3)), first.train.pixels(torch.arange(3)))
    monkeypatch.undo()
    for file in (cache_folder() / "encoded").glob("*.bin"):
        file.unlink()
    assert len(load(f"parquet:{shards}", streaming=True, workers=0).train.pixels(torch.arange(3))) == 3


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for index in range(9):
            pixels = np.full((16, 16), 10 * index + (100 if name == "light" else 0), np.uint8)
            Image.fromarray(pixels).convert("RGB").save(tmp_path / name / f"{index}.png")
    streamed, resident = load(f"folder:{tmp_path}", streaming=True, workers=0), load(f"folder:{tmp_path}")
    assert streamed.channels == resident.channels == 1
    assert streamed.mean == resident.mean
    assert torch.equal(torch.cat(list(streamed.train.batches(5))), resident.train.images)


def test_images_stream_where_they_would_fill_the_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load(f"folder:{photos}").train.images, torch.Tensor)
    memory = psutil.virtual_memory()
    monkeypatch.setattr("deitkit.data.stream.psutil.virtual_memory", lambda: memory._replace(available=40_000))
    assert isinstance(load(f"folder:{photos}", workers=0).train.images, StreamedImages)
    with pytest.raises(DataError, match=r"data\.streaming=true, but data\.name=digits fits in memory"):
        load_dataset(DataRecipe(name="digits", streaming=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_while_it_is_used_is_named(photos: Path, workers: int) -> None:
    data = load(f"folder:{photos}", streaming=True, workers=workers)
    for file in photos.glob("bee/*.jpg"):
        file.unlink()
    with pytest.raises(DataError, match=r"bee.*can no longer be decoded.*put it back"):
        list(Batches(data.train, 8, 0, CPU).epoch(0))


def test_a_comparison_on_streamed_images_is_the_same(
    tiny_recipe: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    results = []
    for streaming in ("true", "false"):
        recipe = tiny_recipe(
            f"data.name=folder:{photos}", "data.image_px=16", f"data.streaming={streaming}", "data.workers=1",
            "data.train_images=null", "data.test_images=null", "data.train_px=16", "methods=[none, hard]",
            "train.batch_size=8", "teacher.train.batch_size=8",
        )  # fmt: skip
        folder = tmp_path / streaming
        compare(recipe, folder, watcher=Watcher())
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results.append([(record["train_loss"], record["validation"]) for record in records])
        assert 0 <= records[0]["shares"]["waiting"] <= 1
    assert results[0] == results[1]


def test_flat_files_hold_what_the_shards_held(shards: Path) -> None:
    data = load(f"parquet:{shards}", streaming=True, workers=0)
    first = pq.read_table(shards)["image"][0].as_py()["bytes"]
    assert Image.open(io.BytesIO(first)).size == (24, 20)
    pixels = torch.from_numpy(decode_image(first, 3, 16).copy())
    everything = torch.cat(
        [torch.cat(list(getattr(data, part).batches(9))) for part in ("train", "validation", "test")]
    )
    assert (everything == pixels).flatten(1).all(dim=1).sum() == 1


def test_a_flat_file_that_was_cut_off_is_written_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path / "cache"))

    def pixels() -> torch.Tensor:
        return torch.cat(list(load(f"parquet:{shards}", streaming=True, workers=0).train.batches(9)))

    first = pixels()
    (flat,) = (cache_folder() / "encoded").glob("*.bin")
    flat.write_bytes(flat.read_bytes()[:-100])
    assert torch.equal(pixels(), first)


def test_shards_are_written_once_for_all_sizes_and_divisions(shards: Path) -> None:
    folder = cache_folder() / "encoded"
    before = {*folder.glob("*.bin")}
    for px, fields in ((16, {}), (12, {}), (16, {"split_seed": 3}), (16, {"fit": "pad"})):
        recipe = DataRecipe(name=f"parquet:{shards}", image_px=px, workers=0, streaming=True, **fields)
        data, plain = load_dataset(recipe), load_dataset(recipe.model_copy(update={"streaming": False}))
        assert torch.equal(data.train.pixels(torch.arange(9)), plain.train.images[:9])
    assert len({*folder.glob("*.bin")} - before) == 1


def test_verify_knows_the_data_of_earlier_runs_when_surveys_change(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(f"folder:{photos}", streaming=True, workers=0)
    of_key, of_files = survey._VERSIONS
    monkeypatch.setattr(survey, "_VERSIONS", (of_key, of_files + 1))
    seen: list[str] = []
    monkeypatch.setattr(survey, "decode_all", lambda *given: seen.append(given[-1]) or decode_all(*given))
    assert load(f"folder:{photos}", streaming=True, workers=0).fingerprint == first.fingerprint
    assert seen == ["checking images"], "it is made anew"
