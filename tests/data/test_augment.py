import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as F

from deitkit.data.augment.augment import Augment, shift_and_flip
from deitkit.data.augment.crop import draw_crops, resized_crop
from deitkit.errors import RecipeError
from deitkit.recipe.schema import AugmentRecipe

MEAN, STD = (0.5, 0.25, 0.75), (0.1, 0.2, 0.05)
NOTHING = {"flip": 0.0, "crop": "none"}
POLICIES = [
    *({"randaugment": text} for text in ("2,9", "4,30", "rand-m9-mstd0.5-inc1", "rand-m10-n3-p1")),
    {"autoaugment": "imagenet"},
    {"three_augment": True},
    {},
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, channels, height, width), generator=generator(9), dtype=torch.uint8)


def numbered_images(batch: int) -> torch.Tensor:
    """Images of 8x8 pixels whose values say where they come from."""
    return torch.arange(100, 164, dtype=torch.uint8).view(1, 1, 8, 8).repeat(batch, 1, 1, 1)


def test_without_anything_the_view_is_the_image_in_zero_to_one():
    images = noise_images(4, 3, 8, 8)
    view = Augment(AugmentRecipe(**NOTHING), MEAN, STD)(images, generator())
    expected = torch.stack([F.to_tensor(image.permute(1, 2, 0).numpy()) for image in images])
    assert torch.equal(view, expected)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flip_has_its_probability_for_each_image(probability):
    images = numbered_images(6000)
    view = Augment(AugmentRecipe(flip=probability, crop="none"), (0.5,), (0.1,))(images, generator())
    flipped = (view == images.flip(-1) / 255).flatten(1).all(dim=1)
    kept = (view == images / 255).flatten(1).all(dim=1)
    assert (flipped ^ kept).all()
    assert flipped.float().mean() == pytest.approx(probability, abs=0.03)


def test_crop_offsets_are_uniform():
    recipe = AugmentRecipe(flip=0.0, crop="pad", pad_px=2)
    view = Augment(recipe, (0.5,), (0.1,))(numbered_images(25_000), generator())
    counts = (view[:, 0, 4, 4] * 255).round().int().bincount()
    assert (counts > 0).sum() == 25
    assert counts[counts > 0].min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (4, 1, 6, 11), (1, 3, 9, 4)], ids=str)
def test_shift_and_flip_equals_a_loop(shape):
    images = noise_images(*shape)
    tops, lefts = torch.randint(7, (2, len(images)), generator=generator())
    flipped = torch.rand(len(images), generator=generator()) < 0.5
    result = shift_and_flip(images, tops, lefts, flipped, 3)
    for i, image in enumerate(images):
        cut = F.crop(F.pad(image, 3), int(tops[i]), int(lefts[i]), *shape[-2:])
        assert torch.equal(result[i], F.hflip(cut) if flipped[i] else cut)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 20, 41), (3, 8, 8)])
def test_resized_crop_is_within_one_grey_level_of_pillows(channels, height, width):
    images = noise_images(12, channels, height, width)
    boxes = draw_crops(12, torch.tensor([[height], [width]]), 0.08, generator())
    boxes[:, 0] = torch.tensor([0, 0, height, width])
    result = resized_crop(images, boxes, (height, width))
    for image, cropped, box in zip(images, result, boxes.T.tolist()):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy())
        expected = F.pil_to_tensor(F.resized_crop(pil, *box, [height, width], InterpolationMode.BICUBIC))
        assert (cropped.int() - expected.int()).abs().max() <= 1
    assert torch.equal(result[0], images[0])


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_crops_are_distributed_as_torchvisions(size):
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    expected = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]).T
    drawn = draw_crops(30_000, torch.tensor(size)[:, None], 0.08, generator())
    for ours, theirs in zip(drawn.double(), expected.double()):
        for share in (0.1, 0.5, 0.9):
            assert ours.quantile(share) == pytest.approx(theirs.quantile(share).item(), abs=1.01)
        assert ours.mean() == pytest.approx(theirs.mean().item(), abs=0.6)
    assert (drawn[0] + drawn[2]).max() == size[0]
    assert (drawn[1] + drawn[3]).max() == size[1]
    assert drawn[:2].min() == 0


@pytest.mark.parametrize("size", [(8, 64), (64, 8), (10, 10)], ids=str)
def test_a_crop_that_cannot_fit_is_central_as_torchvisions(size):
    image = torch.zeros(3, *size)
    expected = RandomResizedCrop.get_params(image, [50.0, 50.0], [3 / 4, 4 / 3])
    assert draw_crops(2, torch.tensor(size)[:, None], 50.0, generator()).T.tolist() == [list(expected)] * 2


def erased_view(batch: int = 4000, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.full((batch, 3, 20, 30), 3, dtype=torch.uint8)
    view = Augment(AugmentRecipe(**NOTHING, **changes), MEAN, STD)(images, generator())
    return view, (view != images / 255).any(dim=1)


def test_erasing_paints_one_rectangle_of_the_mean_colour():
    view, erased = erased_view(batch=300, erase=1.0)
    assert erased.flatten(1).any(dim=1).all()
    for mask, image in zip(erased, view):
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns)
        for edge in (rows, columns):
            assert edge.int().diff().abs().sum() <= 2
        assert torch.equal(image[:, mask], torch.tensor(MEAN)[:, None].expand(-1, int(mask.sum())))


def test_erasing_has_its_probability_for_each_image():
    _, erased = erased_view(erase=0.25)
    assert erased.flatten(1).any(dim=1).float().mean() == pytest.approx(0.25, abs=0.03)


def test_erased_rectangles_are_distributed_as_torchvisions():
    _, erased = erased_view(erase=1.0)
    torch.manual_seed(0)
    image = torch.zeros(1, 20, 30)
    expected = torch.tensor([RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)])
    rows, columns = erased.any(dim=2).int(), erased.any(dim=1).int()
    drawn = [rows.argmax(dim=1), columns.argmax(dim=1), rows.sum(dim=1), columns.sum(dim=1)]
    for ours, theirs in zip(drawn, expected.T):
        for share in (0.1, 0.5, 0.9):
            assert ours.double().quantile(share) == pytest.approx(theirs.double().quantile(share).item(), abs=1.01)
        assert ours.double().mean() == pytest.approx(theirs.double().mean().item(), abs=0.5)


def test_erasing_with_pixels_is_standard_normal_after_normalisation_within_the_range():
    view, erased = erased_view(batch=300, erase=1.0, erase_mode="pixel")
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):
        values = view[:, channel][erased]
        assert values.median() == pytest.approx(mean, abs=0.01)
        spread = values.quantile(0.6) - values.quantile(0.4)  # inside the range, where nothing is cut
        assert spread.item() == pytest.approx(0.5067 * std, rel=0.1)
    assert (view.min(), view.max()) == (0, 1)
    assert len(view[:, 0][erased].unique()) > 1000


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(4, 20), st.integers(4, 20)),
    crop=st.sampled_from(["none", "pad", "random-resized", "simple"]),
    policy=st.sampled_from(POLICIES),
    colour_jitter=st.sampled_from([0, 0.3, 2]),
    erase_mode=st.sampled_from(["constant", "pixel"]),
    seed=st.integers(0, 2**32),
)
def test_any_recipe_gives_a_view_that_its_seed_decides(shape, crop, policy, colour_jitter, erase_mode, seed):
    images = noise_images(*shape)
    before = images.clone()
    recipe = AugmentRecipe(crop=crop, colour_jitter=colour_jitter, erase=0.7, erase_mode=erase_mode, **policy)
    augment = Augment(recipe, MEAN[: shape[1]], STD[: shape[1]])
    view = augment(images, generator(seed))
    assert view.shape == shape
    assert view.dtype == torch.float32
    assert view.min() >= 0
    assert view.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(view, augment(images, generator(seed)))


def test_images_of_a_batch_draw_on_their_own():
    images = noise_images(1, 3, 16, 16).repeat(32, 1, 1, 1)
    for recipe in (AugmentRecipe(), AugmentRecipe(crop="random-resized"), AugmentRecipe(**NOTHING, randaugment="2,9")):
        view = Augment(recipe, MEAN, STD)(images, generator())
        assert len(view.unique(dim=0)) > 20


def test_a_malformed_randaugment_is_refused():
    with pytest.raises(RecipeError, match="randaugment='rand-q1'"):
        Augment(AugmentRecipe(randaugment="rand-q1"), MEAN, STD)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("crop", ["pad", "random-resized", "simple"])
def test_a_gpu_gives_the_same_view_without_waiting(crop, policy):
    images = noise_images(64, 3, 32, 32)
    augment = Augment(AugmentRecipe(crop=crop, colour_jitter=0.3, erase=0.25, **policy), MEAN, STD)
    expected = augment(images, generator())
    on_device = images.cuda()
    augment(on_device, generator())  # the first call may set libraries up
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        view = augment(on_device, generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (view.cpu() - expected).abs().mean() < 1e-3
    assert ((view.cpu() - expected).abs() > 2.5 / 255).float().mean() < 1e-2
