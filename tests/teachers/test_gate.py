"""The gate's tests: what images can decide, and other orders of classes, normalisations and channels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import CPU_FP32, striped_dataset
from deitkit.data.dataset import Dataset, Split
from deitkit.errors import TeacherError
from deitkit.models.built import reverse_channels
from deitkit.models.classifier import Classifier
from deitkit.models.zoo import create_classifier
from deitkit.recipe.load import parse_recipe
from deitkit.recipe.schema import TeacherRecipe
from deitkit.run.results import FIT_TO_TEACH, TeacherCard
from deitkit.teachers.alternatives import better_order
from deitkit.teachers.gate import Finding, compare_with_chance, doubt, gate, recheck, tells_classes_apart
from deitkit.teachers.resolution import measure_at_own_resolution


def card(fit: str = "none", **values: Any) -> TeacherCard:
    given = {"image_px": None, "mean": (0.0,) * 3, "std": (1.0,) * 3, "verdict": ""} | values
    return TeacherCard(
        name="test", source="test", fit=fit, top1=0.0, n=0, chance=0.0, weak=False, parameters=1, **given
    )  # fmt: skip


class Lookup(nn.Module):
    """Decides by the first pixel: value k / 255 means output ``outputs[k]``."""

    def __init__(self, outputs: list[int], classes: int) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs, dtype=torch.float32))
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = (images[:, 0, 0, 0] * 255).round().long().clamp(0, len(self.outputs) - 1)
        return nn.functional.one_hot(self.outputs[value].long(), self.classes).float()


def dataset_of(labels: list[int], validation: int, classes: int) -> Dataset:
    """Return a data set whose first pixel is the class; the first ``validation`` images are held out."""
    images = torch.tensor(labels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    both = Split(images, torch.tensor(labels))
    parts = [Split(both.images[place], both.labels[place]) for place in (slice(validation), slice(validation, None))]
    names = tuple(f"class {index}" for index in range(classes))
    return replace(striped_dataset(), validation=parts[0], train=parts[1], test=parts[1], class_names=names)


def judge(outputs: list[int], dataset: Dataset, fit: str = "none", **recipe: Any) -> TeacherCard:
    classifier = Classifier(Lookup(outputs, dataset.classes), mean=(0.0,) * 3, std=(1.0,) * 3)
    return gate(classifier, card(fit), dataset, parse_recipe({"teacher": recipe}).teacher, CPU_FP32)


@pytest.mark.parametrize(
    ("hits", "n", "chance", "finding"),
    [
        (8, 8, 0.5, Finding.ABOVE_CHANCE),  # every image right: 1 of 256 by chance
        (2, 2, 0.5, Finding.UNDECIDED),
        (16, 24, 0.5, Finding.UNDECIDED),  # ants and bees: 66.7 % of 24
        (12, 24, 0.5, Finding.UNDECIDED),
        (50, 500, 0.1, Finding.USELESS),
        (250, 500, 0.5, Finding.USELESS),
        (300, 500, 0.5, Finding.ABOVE_CHANCE),
        (0, 12, 0.5, Finding.USELESS),
        (24, 24, 1.0, Finding.UNDECIDED),  # one class alone decides nothing
    ],
)
def test_what_a_number_of_images_can_tell(hits: int, n: int, chance: float, finding: Finding) -> None:
    assert compare_with_chance(hits, n, chance) is finding


@pytest.mark.parametrize("n", [4, 8, 12, 24, 100])
def test_a_teacher_with_every_image_right_passes_at_any_number(n: int) -> None:
    labels = [0, 1] * n
    for fit in ("none", "head", "full"):
        told = judge([0, 1], dataset_of(labels, n, 2), fit)
        assert (told.top1, told.weak) == (1.0, False)


def test_a_teacher_that_was_trained_for_classes_of_unequal_size_passes() -> None:
    """950 to 50 images, nine tenths of each class right: less accurate than answering the frequent class always."""
    told = judge([0, 1, 1, 0], _unequal(), "full")
    assert told.top1 == pytest.approx(0.9)
    assert told.chance == pytest.approx(0.95)
    assert not told.weak
    assert told.verdict == FIT_TO_TEACH


@pytest.mark.parametrize("outputs", [[0, 0, 1, 1], [1, 0, 0, 1]])
def test_one_that_does_not_tell_them_apart_is_refused(outputs: list[int]) -> None:
    with pytest.raises(TeacherError, match=r"not significantly above chance \(95\.0 %\)"):
        judge(outputs, _unequal(), "full")


def _unequal() -> Dataset:
    """Return 855 + 95 images of one class and 45 + 5 of another, each kind with a first pixel of its own."""
    kinds, counts = torch.arange(4, dtype=torch.uint8), torch.tensor([855, 45, 95, 5])
    images = kinds.repeat_interleave(counts)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    labels = torch.tensor([0, 1, 0, 1]).repeat_interleave(counts)
    split = Split(images, labels)
    return replace(striped_dataset(), validation=split, train=split, test=split, class_names=("frequent", "rare"))


@pytest.mark.parametrize(("classes", "n"), [(2, 8), (2, 30), (3, 20), (5, 15)])
def test_answers_at_random_tell_nothing_apart(classes: int, n: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    passed = 0
    for _ in range(300):
        answers, labels = torch.randint(classes, (2, n), generator=generator)
        passed += tells_classes_apart(answers, labels, classes)
    assert passed <= 9  # 1 of 100 is expected at most; ten of 300 would come by chance in 1 of 1,000 runs


def test_a_teacher_trained_here_on_few_images_teaches_and_the_doubt_is_written_down() -> None:
    dataset = dataset_of([0, 1] * 4 + [0] * 4 + [1] * 60, 12, 2)  # chance is 8 of 12
    told = judge([0, 0], dataset, "full")
    assert not told.weak
    assert told.verdict == "12 images cannot tell it from chance (66.7 %)"
    said = doubt(dataset)
    assert said is not None
    assert "12 validation images cannot tell a teacher from chance (66.7 %)" in said


def test_the_doubt_names_a_fraction_that_removes_it() -> None:
    labels = [0, 1] * 400
    said = doubt(dataset_of(labels, 24, 2))
    assert said is not None
    fraction = float(said.partition("data.validation_fraction=")[2].partition(" ")[0])
    assert doubt(dataset_of(labels, round(fraction * len(labels)), 2)) is None


def test_a_fraction_is_no_advice_where_the_validation_split_is_the_data_sets_own() -> None:
    said = doubt(replace(dataset_of([0, 1] * 400, 24, 2), has_own_validation=True))
    assert said is not None
    assert said.endswith(": add images to the validation split, if that matters")
    assert "validation_fraction" not in said


def test_a_large_set_of_almost_one_class_leaves_a_doubt() -> None:
    labels = [0] * 24_900 + [1] * 100
    said = doubt(dataset_of(labels, 25_000, 2))
    assert said is not None
    assert said.startswith("25,000 validation images cannot tell a teacher from chance (99.6 %): ")


def test_two_swapped_classes_of_ten_are_found_and_named() -> None:
    labels = list(range(10)) * 20
    swapped = [0, 1, 5, 3, 4, 2, 6, 7, 8, 9]
    with pytest.raises(TeacherError, match=r"its 'class 2' means 'class 5', its 'class 5' means 'class 2'.*100\.0 %"):
        judge(swapped, dataset_of(labels, 20, 10))
    assert judge(list(range(10)), dataset_of(labels, 20, 10)).verdict == FIT_TO_TEACH


@pytest.mark.parametrize("permuted", [(1, 2, 3, 4, 0), (4, 3, 2, 1, 0), (1, 0, 3, 2, 4)])
def test_half_of_the_classes_in_another_order_are_found(permuted: tuple[int, ...]) -> None:
    labels = list(range(10)) * 20
    outputs = [*permuted, 5, 6, 7, 8, 9]
    with pytest.raises(TeacherError, match="classes are in another order"):
        judge(outputs, dataset_of(labels, 40, 10))


def test_two_classes_that_a_right_teacher_confuses_are_not_swapped() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        labels = torch.randint(0, 4, (300,), generator=generator)
        coin = torch.rand(300, generator=generator) < 0.5
        decisions = torch.where((labels < 2) & coin, 1 - labels, labels)
        assert better_order(decisions, labels, 4) is None


def test_few_images_do_not_pretend_to_know_the_order() -> None:
    dataset = dataset_of([0, 1, 2] * 4, 6, 3)
    told = judge([0, 1, 2], dataset)
    assert told.verdict == (
        "12 images cannot tell whether its classes are in this order: compare it with the teacher's"
    )


def test_reversed_channels_are_those_of_the_flipped_image() -> None:
    torch.manual_seed(0)
    model = create_classifier("cifar/resnet20", classes=2, channels=3).model.eval()
    view = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(view.flip(1))
        assert reverse_channels(model)
        torch.testing.assert_close(model(view), expected)


class Redness(nn.Module):
    """Tells much red from little, by the first (or another) input channel of a convolution."""

    def __init__(self, channel: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        weights = torch.zeros(2, 3, 1, 1)
        weights[1, channel] = 1.0
        self.conv.weight, self.conv.bias = nn.Parameter(weights), nn.Parameter(torch.tensor([0.4, 0.0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean(dim=(2, 3))


def test_a_teacher_of_blue_green_red_is_refused_and_told_what_to_set() -> None:
    labels = torch.arange(200) % 2
    images = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    images[labels == 1, 0] = 200
    images[torch.arange(200) % 4 < 2, 2] = 200  # blue says nothing of the class
    both = Split(images, labels)
    dataset = replace(striped_dataset(), validation=both, train=both, test=both, class_names=("little", "much"))

    def used(channel: int) -> Classifier:
        return Classifier(Redness(channel), mean=(0.0,) * 3, std=(1.0,) * 3)

    recipe = parse_recipe({}).teacher
    assert gate(used(0), card(), dataset, recipe, CPU_FP32).verdict == FIT_TO_TEACH
    with pytest.raises(
        TeacherError,
        match=r"green, red it would score 100\.0 % of \d+ training.* instead of \d+\.\d; change teacher\.c",
    ):
        gate(used(2), card(), dataset, recipe, CPU_FP32)


class Sharp(Lookup):
    """Answers only to images of 224 px."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * (images.shape[-1] == 224)


def test_a_teacher_of_larger_images_is_told_their_resolution() -> None:
    dataset = dataset_of([0, 1, 2] * 40, 60, 3)
    recipe = parse_recipe({}).teacher
    sharp = Classifier(Sharp([0, 1, 2], 3), mean=(0.0,) * 3, std=(1.0,) * 3)
    named = card().model_copy(update={"name": "torchvision/resnet18"})
    with pytest.raises(TeacherError, match=r"its resolution is wrong: .* 100\.0 % of .*; set teacher\.image_px=224"):
        gate(sharp, named, dataset, recipe, CPU_FP32)
    sharp.image_px = 224
    enlarged = named.model_copy(update={"image_px": 224})
    assert gate(sharp, enlarged, dataset, recipe, CPU_FP32).verdict == FIT_TO_TEACH


def write_halves(folder: Path, count: int) -> None:
    """Write images of 64 px whose class is a pattern that is lost at 16 px."""
    for label, name in enumerate(("fine", "flat")):
        for index in range(count):
            image = torch.full((64, 64, 3), 128, dtype=torch.uint8)
            if label == 0:
                image[::2], image[1::2] = 100, 156
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / name / f"{index}.png")


class Texture(nn.Module):
    """Calls rows of different brightness fine."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        contrast = (images[:, :, 1:] - images[:, :, :-1]).abs().mean(dim=(1, 2, 3))
        return torch.stack([contrast, torch.full_like(contrast, 0.05)], dim=1)


def test_the_cost_of_small_views_is_measured_and_said(tmp_path: Path) -> None:
    write_halves(tmp_path, 100)
    data = parse_recipe({"data": {"name": f"folder:{tmp_path}", "image_px": 16, "validation_fraction": 0.3}}).data
    texture = Classifier(Texture(), mean=(0.0,) * 3, std=(1.0,) * 3, image_px=64)
    told, said = measure_at_own_resolution(texture, card(image_px=64), data, CPU_FP32)
    assert (told.own_px_top1, told.view_px_top1) == (1.0, 0.5)
    assert said is not None
    assert "100.0 %" in said
    assert "its own 64 px, but 50.0 % on views of 16 px" in said
    same, silent = measure_at_own_resolution(texture, card(image_px=16), data, CPU_FP32)
    assert (same.own_px_top1, silent) == (None, None)


def test_another_bound_is_judged_by_itself_and_other_reasons_stay() -> None:
    def bounds(**fields: Any) -> TeacherRecipe:
        return parse_recipe({"teacher": fields}).teacher

    weak = "weak, allowed by the recipe: "
    below = card("full", verdict=f"{weak}is below teacher.min_top1=0.99; it was trained too briefly")
    below = below.model_copy(
        update={"top1": 0.85, "n": 1000, "chance": 0.1, "weak": True, "verdict_without_bound": FIT_TO_TEACH}
    )
    assert recheck(below, bounds(min_top1=0.5)).verdict == FIT_TO_TEACH
    assert recheck(below, bounds()).weak is False
    with pytest.raises(
        TeacherError, match=r"is weak: is below teacher\.min_top1=0\.9: lower teacher\.min_top1, or set"
    ):
        recheck(below, bounds(min_top1=0.9))
    assert recheck(below, bounds(min_top1=0.9, allow_weak=True)).verdict == f"{weak}is below teacher.min_top1=0.9"
    guesses = card("full", verdict=f"{weak}is not significantly above chance (10.0 %)").model_copy(
        update={"weak": True}
    )
    with pytest.raises(TeacherError, match=r"above chance \(10\.0 %\): set teacher\.allow_weak=true"):
        recheck(guesses, bounds())
    unsuitable = below.model_copy(
        update={"fit": "none", "verdict_without_bound": None}
    )  # its classes' order is another
    with pytest.raises(
        TeacherError, match=r"delete its folder, so that it is checked again, or set teacher\.allow_weak"
    ):
        recheck(unsuitable, bounds(min_top1=0.5))
    doubtful = "2 images cannot tell it from chance (50.0 %)"
    few = below.model_copy(update={"top1": 0.5, "n": 2, "chance": 0.5, "verdict_without_bound": doubtful})
    assert recheck(few, bounds(min_top1=0.4)).verdict == doubtful
    assert recheck(recheck(few, bounds(min_top1=0.6, allow_weak=True)), bounds()).verdict == doubtful
