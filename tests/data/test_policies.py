"""AutoAugment, 3-Augment and colour jitter draw and do what torchvision's, timm's and Pillow's do, image by image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms import AutoAugment as TorchvisionAutoAugment
from torchvision.transforms import AutoAugmentPolicy, ColorJitter
from torchvision.transforms import functional as F

from data.test_randaugment import apply_one, from_pil, generator, reference, sample_images, to_pil
from deitkit.data.augment.augment import Augment
from deitkit.data.augment.operations import OPERATIONS, AugmentPolicy
from deitkit.data.augment.policies import AutoAugment, ColourJitter, ThreeAugment
from deitkit.errors import RecipeError
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import AugmentRecipe

FACTORS = {"Brightness": F.adjust_brightness, "Contrast": F.adjust_contrast, "Color": F.adjust_saturation}
CHANCE = 1e-4  # of a test of a distribution to fail under another seed


def by_pil(image: torch.Tensor, name: str, argument: float) -> torch.Tensor:
    """Do to one image what Pillow, or torchvision on Pillow's images, does."""
    if name in FACTORS:
        return from_pil(FACTORS[name](to_pil(image), argument))
    if name == "GaussianBlur":
        return from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(argument)))
    return reference(image, name, argument)


def assert_equals_pil(layers: AugmentPolicy, images: torch.Tensor) -> None:
    expected = images
    for operations, arguments in zip(*layers.draw(*images.shape[::2], images.shape[3], generator(3))):
        names = [OPERATIONS[i] for i in operations]
        expected = torch.stack([by_pil(*draw) for draw in zip(expected, names, arguments.tolist())])
    assert torch.equal(layers(images, generator(3)), expected)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 33, 20), (1, 2, 5), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("radius", [0, 0.1, 0.5, 0.77, 1.2, 1.41, 1.73, 2.0, 3.3, 9])
def test_blur_equals_pillows(radius, shape):
    images = sample_images(*shape)
    expected = torch.stack([by_pil(image, "GaussianBlur", radius) for image in images])
    assert torch.equal(apply_one(images, "GaussianBlur", radius), expected)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 5), st.integers(0, 1000))
def test_blur_equals_pillows_for_any_radius(radius, seed):
    image = torch.randint(0, 256, (1, 1, 9, 12), generator=generator(seed), dtype=torch.uint8)
    assert torch.equal(apply_one(image, "GaussianBlur", radius)[0], by_pil(image[0], "GaussianBlur", radius))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "layers", [*map(AutoAugment, ("imagenet", "cifar10", "svhn")), ThreeAugment(), ColourJitter(0.3), ColourJitter(1.5)]
)
def test_a_batch_equals_pillows_images_under_the_same_draws(layers, channels):
    assert_equals_pil(layers, sample_images(channels, 24, 30).repeat(12, 1, 1, 1))


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_autoaugment_draws_each_pair_as_often_as_torchvision_says(policy):
    """Every pair of operations with arguments has the probability that torchvision's tables give it."""
    height, width, count = 28, 45, 100_000
    torchvision_policy = TorchvisionAutoAugment(AutoAugmentPolicy(policy))
    space = torchvision_policy._augmentation_space(10, (height, width))
    expected: dict[tuple, float] = {}
    for pair in torchvision_policy.policies:
        outcomes: dict[tuple, float] = {(): 1 / len(torchvision_policy.policies)}
        for name, probability, level in pair:
            magnitudes, signed = space[name]
            magnitude = float(magnitudes[level]) if level is not None else 0.0
            steps = {("Identity", None): 1 - probability}
            for sign in (-1, 1) if signed else (1,):
                value = 1 + sign * magnitude if name in (*FACTORS, "Sharpness") else sign * magnitude
                step = (name, round(float(int(value)) if name[:5] == "Trans" else value, 5) + 0.0)
                steps[step] = steps.get(step, 0) + probability / (2 if signed else 1)
            outcomes = {(*old, new): p * q for old, p in outcomes.items() for new, q in steps.items()}
        for outcome, p in outcomes.items():
            expected[outcome] = expected.get(outcome, 0) + p
    drawn: dict[tuple, int] = {}
    operations, arguments = AutoAugment(policy).draw(count, height, width, generator())
    for names, values in zip(operations.T.tolist(), arguments.T.tolist()):
        steps = ((OPERATIONS[i], round(value, 5) + 0.0 if i else None) for i, value in zip(names, values))
        outcome = tuple(steps)
        drawn[outcome] = drawn.get(outcome, 0) + 1
    possible = {outcome for outcome, p in expected.items() if p > 0}
    assert set(drawn) <= possible
    counts = [[drawn.get(outcome, 0), count * expected[outcome]] for outcome in possible]
    assert stats.chisquare(*zip(*counts)).pvalue > CHANCE


def test_three_augment_draws_each_of_its_three_equally_often():
    operations, arguments = (drawn[0] for drawn in ThreeAugment().draw(60_000, 8, 8, generator()))
    counts = operations.bincount(minlength=len(OPERATIONS))
    assert {OPERATIONS[i] for i in counts.nonzero()} == {"Color", "Solarize", "GaussianBlur"}
    assert stats.chisquare(counts[counts > 0]).pvalue > CHANCE
    radii = arguments[operations == OPERATIONS.index("GaussianBlur")]
    assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > CHANCE


def test_three_augment_is_grey_solarized_or_blurred():
    image = sample_images(3, 16, 16)[3]
    view = ThreeAugment()(image.repeat(30, 1, 1, 1), generator())
    known = [from_pil(ImageOps.grayscale(to_pil(image))).expand(3, -1, -1), from_pil(ImageOps.solarize(to_pil(image)))]
    matches = [[torch.equal(result, expected) for expected in known] for result in view]
    assert all(any(column) for column in zip(*matches))
    blurred = torch.stack([result for result, match in zip(view, matches) if not any(match)])
    assert (blurred.int() - image.int()).abs().float().mean() < 5


def test_jitter_draws_the_factors_and_the_order_of_torchvisions():
    operations, arguments = ColourJitter(0.4).draw(60_000, 8, 8, generator())
    names = ("Brightness", "Contrast", "Color")
    orders = [tuple(names.index(OPERATIONS[i]) for i in order) for order in operations.T.tolist()]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > CHANCE
    jitter = ColorJitter(0.4, 0.4, 0.4)
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(3000)]
    for position, name in enumerate(names, start=1):
        ours = arguments[operations == OPERATIONS.index(name)]
        assert stats.ks_2samp(ours, [draw[position] for draw in theirs]).pvalue > CHANCE


def test_jitter_never_turns_an_image_negative():
    assert ColourJitter(1.5).draw(1000, 8, 8, generator())[1].min() >= 0


@pytest.mark.parametrize(
    "fields", [{"autoaugment": "cifar10"}, {"three_augment": True}, {"colour_jitter": 0.3}], ids=str
)
def test_each_field_changes_the_view(fields):
    images = sample_images(3, 16, 16)
    plain, view = (
        Augment(AugmentRecipe(flip=0, crop="none", **changes), (0.5,) * 3, (0.2,) * 3)(images, generator())
        for changes in ({}, fields)
    )
    assert view.shape == plain.shape
    assert (view != plain).flatten(1).any(dim=1).float().mean() > 0.5


def test_jitter_comes_after_the_policy():
    """An image that 3-Augment made grey stays grey under the jitter of its saturation."""
    images = sample_images(3, 16, 16)[3:4].repeat(64, 1, 1, 1)
    augment = Augment(AugmentRecipe(flip=0, crop="none", three_augment=True, colour_jitter=0.3), (0.5,), (0.1,))
    view = augment(images, generator())
    grey = (view == view[:, :1]).flatten(1).all(dim=1)
    assert 10 < grey.sum() < 32
    assert len(view[grey].unique(dim=0)) > 10


def test_two_policies_are_refused():
    with pytest.raises(RecipeError, match=r"augment\.randaugment=2,9 and augment\.three_augment=True exclude each"):
        load_recipe("digits", ["augment.randaugment=2,9", "augment.three_augment=true"])
    with pytest.raises(RecipeError, match=r"teacher\.augment\.autoaugment"):
        load_recipe("digits", ["teacher.augment.autoaugment=svhn", "teacher.augment.three_augment=true"])


def test_a_view_that_is_mirrored_outside_equals_numpys_padding():
    for side in (1, 2, 5, 8):
        image = torch.randint(0, 256, (1, 3, side, 8), generator=generator(), dtype=torch.uint8)
        recipe = AugmentRecipe(flip=0, crop="simple", pad_px=4)
        views = Augment(recipe, (0.5,), (0.1,))(image.repeat(400, 1, 1, 1), generator())
        padded = torch.from_numpy(np.pad(image[0].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"))
        cuts = {
            tuple((padded[:, top : top + side, left : left + 8] / 255).flatten().tolist())
            for top in range(9)
            for left in range(9)
        }
        assert {tuple(view.flatten().tolist()) for view in views} <= cuts
        assert len(views.unique(dim=0)) > 0.9 * len(cuts)
