"""Images without labels: where they come from, what is left out, and that they never meet a label."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import TINY
from deitkit.comparison.compare import compare
from deitkit.comparison.images import load_images
from deitkit.data import survey
from deitkit.data.dataset import Dataset, add_unlabelled, as_read, load_dataset
from deitkit.data.duplicates import share_in_sketch, sketch
from deitkit.data.stream import StreamedImages
from deitkit.errors import DataError
from deitkit.evaluation.seen_images import data_recipe_of
from deitkit.models.card import ModelCard
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import DataRecipe
from deitkit.run.observer import Watcher

WriteImages = Callable[..., Path]


def with_unlabelled(**fields: object) -> Dataset:
    recipe = DataRecipe(**fields)  # type: ignore[arg-type]
    return add_unlabelled(load_dataset(recipe), recipe)


def save(path: Path, colour: tuple[int, ...] | int, px: int = 20, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (px, px), colour).save(path)


def test_the_rest_are_the_training_images_that_are_left_out() -> None:
    data = with_unlabelled(name="digits", train_images=100, unlabelled="rest")
    whole = load_dataset(DataRecipe(name="digits"))
    assert data.unlabelled is not None
    assert len(data.train) + len(data.unlabelled) == len(whole.train) == 1294
    assert data.unlabelled.labels.unique().tolist() == [-1]
    ours = torch.cat([data.train.hashes, data.unlabelled.hashes]).sort().values
    assert torch.equal(ours, whole.train.hashes.sort().values)
    assert torch.equal(data.test.images, whole.test.images)


def test_a_folder_of_any_depth_size_and_mode_is_read(write_images: WriteImages, tmp_path: Path) -> None:
    write_images(tmp_path / "photos")
    save(tmp_path / "more" / "a.png", (1, 2, 3), px=40)
    save(tmp_path / "more" / "deep" / "er" / "b.png", 90, mode="L")
    save(tmp_path / "more" / ".hidden" / "c.png", (9, 9, 9))
    (tmp_path / "more" / "notes.txt").write_text("no image")
    (tmp_path / "more" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    data = with_unlabelled(name=f"folder:{tmp_path / 'photos'}", image_px=16, unlabelled=f"folder:{tmp_path / 'more'}")
    assert data.unlabelled is not None
    assert data.unlabelled.images.shape == (2, 3, 16, 16)
    assert data.unlabelled.images[:, :, 0, 0].tolist() == [[1, 2, 3], [90, 90, 90]]
    remarks = "; ".join(data.remarks)
    assert "1 file (1 .txt) (unlabelled)" in remarks
    assert "left out: 1 unlabelled file that cannot be decoded, first broken.jpg" in remarks


def test_grey_data_takes_colour_photographs_as_grey(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for number, name in enumerate("ab"):
            for index in range(4):
                save(tmp_path / "grey" / part / name / f"{index}.png", 100 * number + index, mode="L")
    save(tmp_path / "more" / "a.png", (200, 200, 200))
    data = with_unlabelled(name=f"folder:{tmp_path / 'grey'}", image_px=8, unlabelled=f"folder:{tmp_path / 'more'}")
    assert data.unlabelled is not None
    assert data.unlabelled.images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_grey_copies_of_test_images_are_left_out_whatever_the_channels(
    tmp_path: Path, channels: int | None, streaming: bool
) -> None:
    for part in ("train", "test", "more"):
        for number, name in enumerate("ab"):
            for index in range(4):
                level = 100 * number + index + (50 if part == "train" else 0)
                save(tmp_path / "grey" / part / name / f"{index}.png", level, mode="L")
    (tmp_path / "grey" / "more").rename(tmp_path / "more")
    save(tmp_path / "more" / "new.png", 90, mode="L")
    found = with_unlabelled(
        name=f"folder:{tmp_path / 'grey'}", image_px=8, channels=channels, streaming=streaming, workers=0,
        unlabelled=f"folder:{tmp_path / 'more'}",
    )  # fmt: skip
    assert found.unlabelled is not None
    assert len(found.unlabelled) == 1
    card = ModelCard(mean=(0.5,), std=(0.5,), class_names=("a", "b"), channels=found.channels, input_px=(8, 8))
    again = load_dataset(data_recipe_of(card, f"folder:{tmp_path / 'grey'}", None))
    assert share_in_sketch(again.train.hashes, sketch(found.train.hashes)) == 1, "as the model's card says"


def test_validation_and_test_images_are_left_out(write_images: WriteImages, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", parts=("train",))
    for number, name in enumerate(("cat", "dog")):
        for index in range(12):
            save(photos / "test" / name / f"{index}.png", (200, 5 * index, 40 * number), px=16)
    held_out = load_dataset(DataRecipe(name=f"folder:{photos}")).names("validation", 0)
    save(tmp_path / "more" / "new.png", (1, 2, 3), px=16)
    (tmp_path / "more" / "held-out.png").write_bytes((photos / held_out).read_bytes())
    # the pixels of a test image, in another file
    Image.open(photos / "test" / "dog" / "5.png").save(tmp_path / "more" / "other.webp", lossless=True)
    data = with_unlabelled(name=f"folder:{photos}", unlabelled=f"folder:{tmp_path / 'more'}")
    assert data.unlabelled is not None
    assert data.unlabelled.images[:, :, 0, 0].tolist() == [[1, 2, 3]]
    assert "left out: 2 unlabelled images that are also validation or test images" in data.remarks


@pytest.mark.parametrize("source", ["folder:", "photos", "parquet:x.parquet", "Rest", ""])
def test_what_is_no_source_is_one_sentence(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.unlabelled=.* is not a source of images: write rest or folder:PATH"):
        with_unlabelled(name="digits", unlabelled=source)


def test_folders_without_images_are_one_sentence(write_images: WriteImages, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist: data\.unlabelled=folder:PATH needs images"):
        with_unlabelled(name="digits", unlabelled=f"folder:{tmp_path / 'nothing'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.unlabelled=folder:'.*empty' contains no images"):
        with_unlabelled(name="digits", unlabelled=f"folder:{tmp_path / 'empty'}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png"):
        with_unlabelled(name="digits", unlabelled=f"folder:{tmp_path / 'broken'}")


def test_fields_that_contradict_are_refused() -> None:
    for overrides, words in (
        (
            ["data.unlabelled=rest", "data.train_images=null"],
            "data.unlabelled=rest is what data.train_images leaves out",
        ),
        (["train.unlabelled_batch_size=8"], "train.unlabelled_batch_size has no effect without data.unlabelled"),
        (["data.streaming=unlabelled"], "data.streaming=unlabelled has no effect without data.unlabelled"),
    ):
        with pytest.raises(Exception, match=words):
            load_recipe("digits", overrides)


@pytest.mark.parametrize("image_px", [None, 16])
def test_test_images_of_a_named_set_are_left_out_at_any_size(tmp_path: Path, image_px: int | None) -> None:
    tests = load_dataset(DataRecipe(name="digits")).test.images
    tmp_path.joinpath("more").mkdir()
    for place in range(5):
        Image.fromarray(tests[place, 0].numpy()).save(tmp_path / "more" / f"{place}.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "more" / "new.png")
    data = with_unlabelled(name="digits", image_px=image_px, unlabelled=f"folder:{tmp_path / 'more'}")
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 1
    assert "left out: 5 unlabelled images that are also validation or test images" in data.remarks


@pytest.mark.parametrize("name", ["digits", "folder", "streamed"])
def test_no_rest_is_one_sentence(write_images: WriteImages, tmp_path: Path, name: str) -> None:
    own: dict[str, object] = {"name": "digits"}
    if name != "digits":
        own = {"name": f"folder:{write_images(tmp_path)}", "streaming": name == "streamed", "workers": 0}
    count = len(load_dataset(DataRecipe(**own)).train)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"data\.unlabelled=rest is empty, since data\.train_images={count} are all"):
        with_unlabelled(**own, train_images=count, unlabelled="rest")


def test_images_without_labels_alone_may_be_streamed_and_are_so_again(
    write_images: WriteImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = write_images(tmp_path / "few"), write_images(tmp_path / "many", count=90, parts=("more",))
    own = ["data.train_images=null", "data.test_images=null", "data.image_px=8", f"data.name=folder:{few}"]
    fields = [*TINY, *own, f"data.unlabelled=folder:{many}", "data.workers=0", "methods=[consistent]", "train.epochs=1"]
    recipe, need = load_recipe("digits", fields), 3 * 8 * 8 / survey._MOST_MEMORY
    for free in (450 * need, 10**12):  # room for the 48 with labels alone, then for all
        monkeypatch.setattr(survey.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))  # noqa: B023
        data = load_images(recipe, tmp_path / "run", Watcher())
        assert data.unlabelled is not None
        assert (type(data.train.images), type(data.unlabelled.images)) == (torch.Tensor, StreamedImages)
        monkeypatch.undo()
        compare(recipe, tmp_path / "run", watcher=Watcher(), dataset=data, resume=(tmp_path / "run").exists())
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["streamed"] == "unlabelled"
    assert as_read(recipe.data, data).streaming == "unlabelled", "in the other processes of a run too"


def test_a_set_of_pixels_cannot_be_streamed() -> None:
    with pytest.raises(DataError, match=r"^data\.streaming=unlabelled, but data\.name=digits fits in memory"):
        with_unlabelled(name="digits", train_images=100, unlabelled="rest", streaming="unlabelled")
