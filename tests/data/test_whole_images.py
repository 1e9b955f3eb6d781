"""Random-resized crops are cut from the files' own pixels, or from images that are kept larger for them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from deitkit.data.augment.preview import draw_views
from deitkit.data.batches import Batches
from deitkit.data.dataset import Dataset, add_unlabelled, load_dataset
from deitkit.data.split import Split
from deitkit.data.stream import StreamedImages
from deitkit.errors import RecipeError
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import AugmentRecipe, DataRecipe, TrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.system.device import Precision
from deitkit.teachers.frozen import Teachers
from deitkit.teachers.logit_cache import open_logit_cache
from deitkit.training.cohort import Cohort

CPU = torch.device("cpu")
PX = 16
Run = Callable[..., tuple[int, str, str]]


def picture(width: int, height: int, hue: int) -> Image.Image:
    """Return a smooth picture whose colours tell the place, and which picture it is."""
    across = np.broadcast_to(np.linspace(0, 255, width)[None], (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, np.full_like(across, hue)], axis=-1).round().astype(np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 20 pictures of many shapes, PNG and JPEG, one of them damaged, some turned by their EXIF tag."""
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(20):
            image = picture(60 + 9 * index, 100, 12 * index + label)
            if index % 4 == 0:
                image.save(tmp_path / "photos" / name / f"{index:02}.png")
            else:
                exif = Image.Exif()
                exif[0x0112] = (1, 6, 3)[index % 3]
                image.save(tmp_path / "photos" / name / f"{index:02}.jpg", quality=95, exif=exif)
    (tmp_path / "photos" / "ant" / "05.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def load(photos: Path, **fields: Any) -> Dataset:
    recipe = {"image_px": PX, "workers": 0, "streaming": False, **fields}
    return load_dataset(DataRecipe(name=f"folder:{photos}", **recipe), random_crops=True)


def crops_of(split: Split, scale_min: float = 0.1, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    everyone = torch.arange(len(split))
    shares = split.draw_crops(everyone, scale_min, torch.Generator().manual_seed(seed))
    return split.crops(everyone, shares), shares


def original(photos: Path, data: Dataset, place: int) -> Image.Image:
    assert data.names is not None
    with Image.open(photos / data.names("train", place)) as image:
        turned = image.getexif().get(0x0112, 1)
        upright = {1: image.copy(), 6: image.rotate(-90, expand=True), 3: image.rotate(180)}[turned]
        return upright.convert("RGB")


def expected_crop(image: Image.Image, share: torch.Tensor) -> torch.Tensor:
    sides = torch.tensor([image.height, image.width] * 2, dtype=torch.float64)
    box = (share * sides).round().long().tolist()
    return TF.pil_to_tensor(TF.resized_crop(image, *box, [PX, PX], InterpolationMode.BICUBIC)).int()


@pytest.mark.parametrize(("streaming", "train_px", "error"), [(True, None, 4), (False, 128, 8), (False, None, 16)])
def test_crops_are_torchvisions_of_the_files(streaming: bool, train_px: int | None, error: int, photos: Path) -> None:
    data = load(photos, streaming=streaming, train_px=train_px)
    assert isinstance(data.train.images, StreamedImages) == streaming
    cut, shares = crops_of(data.train)
    for place, (ours, share) in enumerate(zip(cut.int(), shares.T, strict=True)):
        theirs = expected_crop(original(photos, data, place), share)
        assert (ours - theirs).abs().max() <= error, place
        assert (ours - theirs).double().abs().mean() <= error / 4, place


@pytest.mark.parametrize("streaming", [False, True])
def test_a_small_crop_shows_what_the_resized_image_has_lost(streaming: bool, tmp_path: Path) -> None:
    stripes = (np.indices((64, 64))[1] // 2 % 2 * 255).astype(np.uint8)  # of 2 px: grey at 16 px
    for name in ("one", "two"):
        (tmp_path / "stripes" / name).mkdir(parents=True)
        for index in range(10):
            stripes[0, 0] = index + 10 * (name == "one")  # no duplicates
            Image.fromarray(stripes).save(tmp_path / "stripes" / name / f"{index}.png")
    data = load(tmp_path / "stripes", streaming=streaming, train_px=64)
    assert data.channels == 1
    shares = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)[:, None].repeat(1, 4)
    sharp = data.train.crops(torch.arange(4), shares).double()
    resized = data.train.pixels(torch.arange(4)).double()
    assert sharp.shape == (4, 1, PX, PX)
    assert sharp.std() > 100
    assert resized[..., 2:-2, 2:-2].std() < 20


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_streamed_and_kept_images_give_the_same_crops(fit: str, photos: Path) -> None:
    kept, streamed = (
        load(photos, fit=fit, image_px=64, train_px=256),
        load(photos, fit=fit, image_px=64, streaming=True),
    )
    ours, shares = crops_of(kept.train)
    theirs, again = crops_of(streamed.train)
    assert torch.equal(shares, again)
    difference = (ours.int() - theirs.int()).abs().double()
    assert difference.mean() < 1.5
    inner = difference[..., 2:-2, 2:-2]  # beyond the edge of a box, only Pillow takes its neighbours into account
    assert inner.flatten().quantile(0.98) <= 12


def test_padding_is_in_the_crops_as_it_is_in_evaluation(photos: Path) -> None:
    for streaming in (False, True):
        data = load(photos, fit="pad", streaming=streaming, image_px=64)
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None].repeat(1, len(data.train))
        cut = data.train.crops(torch.arange(len(data.train)), whole)
        difference = (cut.int() - data.train.pixels(torch.arange(len(data.train))).int()).abs().double()
        assert difference.mean() < 3


def test_only_training_views_differ(photos: Path) -> None:
    recipe = DataRecipe(name=f"folder:{photos}", image_px=PX, workers=0)
    plain, larger = load_dataset(recipe), load_dataset(recipe, random_crops=True)
    assert plain.train.crop_source is None
    assert larger.train.crop_source is not None
    assert larger.validation.crop_source is larger.test.crop_source is None
    assert larger.fingerprint == plain.fingerprint
    assert (larger.mean, larger.std, larger.skipped) == (plain.mean, plain.std, plain.skipped)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(larger, part).images, getattr(plain, part).images)
        assert torch.equal(getattr(larger, part).hashes, getattr(plain, part).hashes)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_as_large_as_what_was_resized_are_cropped_as_before(streaming: bool, photos: Path) -> None:
    assert load(photos, streaming=streaming, train_px=PX).train.crop_source is None


def test_every_kept_image_belongs_to_its_label(photos: Path) -> None:
    data = load(photos, fit="squash")
    assert len(data.skipped) == 1
    again = load(photos, fit="squash")  # from the cache
    for found in (data, again):
        source = found.train.crop_source
        assert source is not None
        assert source.images is not None
        assert source.images.shape == (len(found.train), 3, 2 * PX, 2 * PX)
        hues = source.images[:, 2].double().mean(dim=(1, 2)), found.train.images[:, 2].double().mean(dim=(1, 2))
        assert (hues[0] - hues[1]).abs().max() < 1.5
    assert torch.equal(data.train.crop_source.sizes, again.train.crop_source.sizes)  # type: ignore[union-attr]


def test_boxes_are_distributed_as_torchvisions_of_each_shape(photos: Path) -> None:
    train = load(photos, streaming=True).train
    assert train.crop_source is not None
    torch.manual_seed(0)
    for place in (0, 7):
        height, width = train.crop_source.sizes[place].tolist()
        image = torch.zeros(3, height, width)
        drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
        theirs = torch.tensor(drawn).double().T / torch.tensor([height, width] * 2)[:, None]
        indices = torch.full((20_000,), place)
        ours = train.draw_crops(indices, 0.08, torch.Generator().manual_seed(0))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.mean() == pytest.approx(other.mean().item(), abs=0.012)
            assert mine.quantile(0.9) == pytest.approx(other.quantile(0.9).item(), abs=0.03)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_follows_from_its_epoch_and_step(workers: int, photos: Path) -> None:
    for data in (load(photos, streaming=True, workers=workers), load(photos)):
        batches = Batches(data.train, 4, 7, CPU, repeats=2, scale_min=0.2)
        first = [list(batches.epoch(epoch)) for epoch in (0, 1)]
        resumed = list(Batches(data.train, 4, 7, CPU, repeats=2, scale_min=0.2).epoch(1, 2))
        for (images, labels), (ours, mine) in zip(first[1][2:], resumed, strict=True):
            assert torch.equal(images, ours)
            assert torch.equal(labels, mine)
        assert not torch.equal(first[0][0][0][0], first[0][0][0][1])  # two crops of one image
        same = torch.arange(4)
        drawn = [batches._drawn_crops(epoch, step, same) for epoch, step in ((0, 0), (0, 1), (1, 0))]
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_a_cohort_crops_once(photos: Path) -> None:
    data = load(photos)

    def cohort(crop: str) -> Cohort:
        return Cohort(
            [],
            teacher=None,
            dataset=data,
            augment=AugmentRecipe(crop=crop, flip=0),  # type: ignore[arg-type]
            train=TrainRecipe(batch_size=8),
            speed=SpeedRecipe(),
            precision=Precision(CPU, torch.float32),
            seed=0,
        )

    cropped, padded = cohort("random-resized"), cohort("pad")
    images, labels = next(cropped.batches.epoch(0))
    view, _ = cropped.make_view(images, labels, 0)
    assert torch.equal(view, images / 255)
    assert any(torch.equal(next(padded.batches.epoch(0))[0][0], image) for image in data.train.images)
    assert not any(torch.equal(images[0], image) for image in data.train.images)


def test_images_without_labels_are_cropped_too(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for index in range(6):
        picture(80, 40 + index, 200).save(tmp_path / "more" / f"{index}.png")
    (tmp_path / "more" / "damaged.png").write_bytes(b"no image")
    held_out = load(photos)
    assert held_out.names is not None
    (tmp_path / "more" / "a-test-image.png").write_bytes((photos / held_out.names("test", 0)).read_bytes())
    for streaming in (False, True):
        recipe = DataRecipe(
            name=f"folder:{photos}", image_px=PX, workers=0, streaming=streaming, unlabelled=f"folder:{tmp_path}/more"
        )
        data = add_unlabelled(load_dataset(recipe, random_crops=True), recipe)
        assert data.unlabelled is not None
        assert data.unlabelled.crop_source is not None
        assert data.unlabelled.crop_source.sizes.tolist() == [[40 + index, 80] for index in range(6)]
        assert (crops_of(data.unlabelled)[0][:, 2].double().mean(dim=(1, 2)) - 200).abs().max() < 2


def test_images_that_are_in_memory_are_cut_from_what_they_were() -> None:
    data = load_dataset(DataRecipe(name="digits", image_px=24, channels=3), random_crops=True)
    source = data.train.crop_source
    assert source is not None
    assert source.images is not None
    assert source.images.shape[1:] == (3, 8, 8)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None].repeat(1, 5)
    difference = data.train.crops(torch.arange(5), whole).int() - data.train.images[:5].int()
    assert difference.abs().max() <= 60  # F.interpolate's bicubic kernel is not Pillow's
    assert load_dataset(DataRecipe(name="digits"), random_crops=True).train.crop_source is None


def test_cached_logits_belong_to_what_is_cut(photos: Path, tmp_path: Path) -> None:
    recipe = load_recipe("digits", [f"data.name=folder:{photos}", f"data.image_px={PX}"])
    folders = set()
    for fields in ({}, {"train_px": 48}, {"train_px": PX}, {"streaming": True}):
        cache = open_logit_cache(
            recipe, load(photos, **fields), Teachers([]), 0, Precision(CPU, torch.float32), tmp_path
        )
        folders.add(cache.folder)
    assert len(folders) == 4


def test_the_picture_of_views_shows_the_crops(photos: Path, tmp_path: Path) -> None:
    data, augment = load(photos), AugmentRecipe(crop="random-resized")
    resized = replace(data, train=replace(data.train, crop_source=None))  # crops of what was resized
    drawn = [tmp_path / name for name in ("whole.png", "again.png", "resized.png")]
    for path, each in zip(drawn, (data, data, resized), strict=True):
        draw_views(each, augment, 0.0, path)
    whole, again, other = (path.read_bytes() for path in drawn)
    assert whole == again != other


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_px=32"], "data.train_px=32 has no effect on images that are not resized: set data.image_px"),
        (["data.image_px=16", "data.train_px=8"], "data.train_px=8 is less than data.image_px=16: use at least 16"),
        (
            ["data.image_px=16", "data.train_px=32", "augment.crop=pad", "teacher.augment.crop=none"],
            "data.train_px=32 has no effect without augment.crop=random-resized",
        ),
    ],
)
def test_a_size_that_does_nothing_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        load_recipe("digits", overrides)


def test_a_comparison_says_what_crops_are_cut_from(run: Run, photos: Path, tmp_path: Path) -> None:
    fields = [
        f"data.name=folder:{photos}", f"data.image_px={PX}", "data.train_images=null", "data.test_images=null",
        "model.patch_px=8", "methods=[none]", "train.epochs=1",
        "train.warmup_epochs=0", "train.batch_size=8", "model.width=16", "model.depth=1",
    ]  # fmt: skip
    code, out, errors = run("compare", "digits", *fields, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    assert "random-resized crops are cut from copies of 32 x 32 px" in out
    assert "most training images are smaller" not in out
    code, out, errors = run("compare", "digits", *fields, "data.streaming=true", "--out", str(tmp_path / "streamed"))
    assert code == 0, errors
    assert "random-resized crops are cut from the files" in out


def test_a_comparison_says_that_most_files_are_smaller_than_its_images(
    run: Run, write_images: Callable[..., Path], tmp_path: Path
) -> None:
    fields = [
        f"data.name=folder:{write_images(tmp_path / 'photos', px=10)}", "data.image_px=16", "data.train_images=null",
        "data.test_images=null", "model.patch_px=8", "methods=[none]", "train.epochs=1", "train.warmup_epochs=0",
        "train.batch_size=8", "model.width=16", "model.depth=1",
    ]  # fmt: skip
    code, out, errors = run("compare", "digits", *fields, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    said = "most training images are smaller than data.image_px=16 (median of the shorter side 10 px)"
    assert said in " ".join(out.split())
