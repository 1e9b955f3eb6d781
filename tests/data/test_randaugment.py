import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandAugment as TorchvisionRandAugment
from torchvision.transforms.autoaugment import _apply_op

from deitkit.data.augment.operations import OPERATIONS, apply_operations
from deitkit.data.augment.randaugment import RandAugment
from deitkit.errors import RecipeError

BLACK = torch.zeros(3, dtype=torch.uint8)

# Operation: arguments over and beyond the ranges of both policies.
ARGUMENTS = {
    "Identity": [0],
    "ShearX": [-0.3, -0.09, 0, 0.01, 0.09, 0.3],
    "ShearY": [-0.3, -0.09, 0, 0.01, 0.09, 0.3],
    "TranslateX": [-40, -14, -1, 0, 4, 14],
    "TranslateY": [-40, -14, -1, 0, 4, 14],
    "Rotate": [-30, -9, -0.5, 0, 1, 9, 17.3, 30],
    "Brightness": [0.1, 0.73, 1, 1.27, 1.9],
    "Color": [0.1, 0.73, 1, 1.27, 1.9],
    "Contrast": [0.1, 0.73, 1, 1.27, 1.9],
    "Sharpness": [0.1, 0.73, 1, 1.27, 1.9],
    "Posterize": [1, 2, 4, 6, 7, 8],
    "Solarize": [0, 12.3, 128, 178.5, 255, 256],
    "AutoContrast": [0],
    "Equalize": [0],
    "Invert": [0],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_images(channels: int, height: int, width: int) -> torch.Tensor:
    """Noise, smooth images of full and of low contrast, and a constant one."""
    noise = torch.randint(0, 256, (3, channels, height, width), generator=generator(), dtype=torch.uint8)
    coarse = torch.rand(4, channels, 3, 3, generator=generator(1)) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    smooth[2:] = 60 + smooth[2:] / 5
    return torch.cat([noise, smooth.to(torch.uint8), torch.full_like(noise[:1], 77)])


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array[None]


def reference(image: torch.Tensor, name: str, argument: float) -> torch.Tensor:
    magnitude = argument - 1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else argument
    return from_pil(_apply_op(to_pil(image), name, magnitude, InterpolationMode.NEAREST, fill=None))


def apply_one(images: torch.Tensor, name: str, argument: float, **options: object) -> torch.Tensor:
    operations = torch.full((len(images),), OPERATIONS.index(name))
    arguments = torch.full((len(images),), float(argument), dtype=torch.float64)
    fill = options.pop("fill", BLACK[: images.shape[1]])
    return apply_operations(images, operations, arguments, fill, **options)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 8), (3, 33, 20), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("SolarizeAdd", "GaussianBlur")])
def test_every_operation_equals_torchvisions_on_pil_images(name, shape):
    images = sample_images(*shape)
    for argument in ARGUMENTS[name]:
        expected = torch.stack([reference(image, name, argument) for image in images])
        assert torch.equal(apply_one(images, name, argument), expected), argument


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("addend", [0, 11, 110, 128])
def test_solarize_add_equals_timms(addend, channels):
    images = sample_images(channels, 16, 16)
    expected = torch.stack([from_pil(timm_augment.solarize_add(to_pil(image), addend)) for image in images])
    assert torch.equal(apply_one(images, "SolarizeAdd", addend), expected)


def test_posterize_to_no_bits_is_black():
    assert apply_one(sample_images(3, 8, 8), "Posterize", 0).max() == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("ShearX", timm_augment.shear_x, [-0.27, 0.1]),
        ("ShearY", timm_augment.shear_y, [-0.27, 0.1]),
        (
            "TranslateX",
            lambda image, x, **keywords: timm_augment.translate_x_abs(image, -x, **keywords),
            [-11.73, 0, 3.37],
        ),
        (
            "TranslateY",
            lambda image, y, **keywords: timm_augment.translate_y_abs(image, -y, **keywords),
            [-11.73, 0, 3.37],
        ),
        ("Rotate", timm_augment.rotate, [-27, 0, 12.5]),
    ],
)
def test_bilinear_geometry_is_within_one_grey_level_of_pillows(name, function, arguments, channels):
    images = sample_images(channels, 24, 30)
    fill = (120, 110, 100)[:channels]
    for argument in arguments:
        keywords = {"resample": Image.Resampling.BILINEAR, "fillcolor": fill if channels == 3 else fill[0]}
        expected = torch.stack([from_pil(function(to_pil(image), argument, **keywords)) for image in images])
        warped = apply_one(images, name, argument, fill=torch.tensor(fill, dtype=torch.uint8), bilinear=True)
        difference = (warped.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


def test_a_mixed_batch_equals_its_images_one_by_one():
    images = sample_images(3, 20, 24).repeat(8, 1, 1, 1)
    operations = torch.randint(len(OPERATIONS), (len(images),), generator=generator())
    arguments = torch.tensor([float(random.Random(i).choice([0.2, 0.7, 1.6])) for i in range(len(images))]).double()
    together = apply_operations(images, operations, arguments, BLACK)
    for i in range(len(images)):
        alone = apply_operations(images[i : i + 1], operations[i : i + 1], arguments[i : i + 1], BLACK)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["2,9", "3,30", "1,0"])
def test_the_torchvision_policy_equals_torchvisions_operations_under_the_same_draws(policy, channels):
    images = sample_images(channels, 32, 32).repeat(4, 1, 1, 1)
    randaugment = RandAugment(policy, (0.5,) * channels)
    expected = images
    for operations, arguments in zip(*randaugment.draw(len(images), 32, 32, generator(3))):
        names = [OPERATIONS[i] for i in operations]
        expected = torch.stack([reference(*draw) for draw in zip(expected, names, arguments.tolist())])
    assert torch.equal(randaugment(images, generator(3)), expected)


@pytest.mark.parametrize("magnitude", range(31))
@pytest.mark.parametrize("size", [(32, 32), (331, 331), (28, 45)], ids=str)
def test_magnitudes_are_torchvisions(magnitude, size):
    space = TorchvisionRandAugment(2, magnitude)._augmentation_space(31, size)
    operations, arguments = RandAugment(f"1,{magnitude}", (0.5,)).draw(600, *size, generator())
    drawn = {name: set(arguments[operations == i].tolist()) for i, name in enumerate(OPERATIONS)}
    assert {name for name, values in drawn.items() if values} == set(space)
    for name, (magnitudes, signed) in space.items():
        value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
        values = {value, -value} if signed else {value}
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):
            values = {1 + value for value in values}
        if name.startswith("Translate"):
            values = {int(value) for value in values}
        assert drawn[name] == values


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("level", [0, 1, 4, 9, 10, 14])
def test_severities_are_timms(level, increasing):
    suffix = "Increasing" if increasing else ""
    text = f"rand-m{level}-mmax20-n1-p1-inc{int(increasing)}"
    operations, arguments = RandAugment(text, (0.5,)).draw(900, 20, 40, generator())
    reachable = timm_augment._RAND_INCREASING_TRANSFORMS if increasing else timm_augment._RAND_TRANSFORMS
    names = {name.removesuffix(suffix).removesuffix("Rel") for name in reachable}
    drawn = {name: set(arguments[operations == i].tolist()) for i, name in enumerate(OPERATIONS)}
    assert {name for name, values in drawn.items() if values} == names
    random.seed(0)
    for reference_name in reachable:
        name = reference_name.removesuffix(suffix).removesuffix("Rel")
        function = timm_augment.LEVEL_TO_ARG[reference_name]
        values = {function(level, timm_augment._HPARAMS_DEFAULT)[0] for _ in range(40)} if function else {0}
        if name == "TranslateX":
            values = {value * 40 for value in values}
        elif name == "TranslateY":
            values = {value * 20 for value in values}
        elif name == "Posterize":  # timm leaves images alone from 8 bits on; below 0 its mask is that of 0
            values = {min(8, max(0, value)) for value in values}
        assert sorted(drawn[name]) == pytest.approx(sorted(values)), name


def test_timm_noise_is_normal_around_the_level_and_clipped():
    operations, arguments = RandAugment("rand-m9-mstd0.5-n1-p1-inc1", (0.5,)).draw(60_000, 32, 32, generator())
    degrees = arguments[operations == OPERATIONS.index("Rotate")].abs() / 3
    assert degrees.max() == 10
    assert (degrees == 10).float().mean() == pytest.approx(0.0228, abs=0.01)
    assert degrees.median() == pytest.approx(9, abs=0.05)
    assert degrees.quantile(0.1587) == pytest.approx(8.5, abs=0.06)


def test_timm_noise_beyond_100_is_uniform():
    operations, arguments = RandAugment("rand-m8-mstd101-n1-p1", (0.5,)).draw(60_000, 32, 32, generator())
    degrees = arguments[operations == OPERATIONS.index("Rotate")].abs() / 3
    assert degrees.max() <= 8
    quantiles = degrees.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([2, 4, 6], abs=0.15)


@pytest.mark.parametrize(("text", "applied"), [("2,9", 1.0), ("rand-m9-mstd0.5-inc1", 0.5), ("rand-p0.2", 0.2)])
def test_operations_and_signs_are_drawn_evenly_for_every_image(text, applied):
    randaugment = RandAugment(text, (0.5,))
    operations, arguments = (drawn.flatten() for drawn in randaugment.draw(60_000, 32, 32, generator()))
    shares = operations.bincount(minlength=len(OPERATIONS)).double() / len(operations)
    space = len(randaugment.policy.space)
    for i, name in enumerate(OPERATIONS[1:], start=1):
        assert shares[i] == pytest.approx(applied / space if name in randaugment.policy.space else 0, abs=0.006)
    rotations = arguments[operations == OPERATIONS.index("Rotate")]
    assert (rotations > 0).double().mean() == pytest.approx(0.5, abs=0.05)


def test_timm_policy_fills_with_the_mean_colour_and_torchvisions_with_black():
    assert RandAugment("rand-m9", (0.5, 0.25, 1.0)).fill.tolist() == [128, 64, 255]
    assert RandAugment("2,9", (0.5, 0.25, 1.0)).fill is None
    assert apply_one(torch.full((1, 3, 4, 4), 9, dtype=torch.uint8), "TranslateX", 4, fill=None).max() == 0


def test_timm_defaults():
    policy = RandAugment("rand", (0.5,)).policy
    assert (policy.layers, policy.level, policy.level_std, policy.level_max, policy.probability) == (2, 10, 0, 10, 0.5)


@pytest.mark.parametrize("policy", ["2,9", "rand-m9-mstd0.5-inc1"])
def test_the_seed_decides_and_the_input_stays(policy):
    images = sample_images(3, 16, 16)
    before = images.clone()
    randaugment = RandAugment(policy, (0.5, 0.5, 0.5))
    first, again, other = (randaugment(images, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "text",
    [
        *("", "9", "0,9", "2,31", "2,-1", "2,9,1", " 2,9", "rand9", "rand-m", "rand-m9-x3", "rand-m9.5", "rand-n0"),
        *("rand-p1.5", "rand-m9-m8", "rand-m9-tweights", "rand-m9-mstd", "rand-inc2", "augmix-m3"),
    ],
)
def test_malformed_policies_are_refused_in_one_sentence(text):
    with pytest.raises(RecipeError, match=r"^randaugment='.*' is neither 'N,M' .* nor a timm string .*"):
        RandAugment(text, (0.5,))
