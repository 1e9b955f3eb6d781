"""The order of the images: a function of seed and epoch, with or without repeated augmentation."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CPU_FP32
from deitkit.comparison.compare import compare
from deitkit.data.batches import Batches
from deitkit.data.dataset import load_dataset
from deitkit.data.split import Split, _has_room
from deitkit.errors import RecipeError
from deitkit.recipe.load import load_recipe
from deitkit.run.metrics import read_metrics
from deitkit.run.observer import Watcher
from deitkit.system.seeding import derived_generator
from deitkit.training.build import build_students
from deitkit.training.cohort import Cohort

# Number of images, batch size, repeats.
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5)).filter(lambda size: size[0] >= size[1])


def numbered(count: int, batch_size: int, repeats: int, seed: int = 0, epoch_repeats: int = 1) -> Batches:
    """Batches of images whose labels tell which one each is."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1)
    split, device = Split(images, numbers), torch.device("cpu")
    return Batches(split, batch_size, seed, device, repeats=repeats, epoch_repeats=epoch_repeats)


def epoch_of(batches: Batches, epoch: int, first_step: int = 0) -> list[int]:
    """Which images an epoch shows from a step on, in their order."""
    shown = [torch.empty(0, dtype=torch.int64)]
    for images, labels in batches.epoch(epoch, first_step):
        assert torch.equal(images.flatten().long(), labels)
        assert len(labels) == batches.batch_size
        shown.append(labels)
    return torch.cat(shown).tolist()


@settings(deadline=None)
@given(SIZES, st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_is_a_loop_over_shuffled_images_that_repeats_each(
    size: tuple[int, int, int], seed: int, epoch: int
) -> None:
    count, batch_size, repeats = size
    expected: list[int] = []
    for image in torch.randperm(count, generator=derived_generator(seed, "order", epoch)).tolist():
        expected += [image] * repeats
    assert epoch_of(numbered(*size, seed), epoch) == expected[: count // batch_size * batch_size]


@settings(deadline=None)
@given(SIZES, st.integers(0, 9))
def test_every_image_that_is_shown_is_shown_so_often_but_for_the_last(size: tuple[int, int, int], seed: int) -> None:
    shown = epoch_of(numbered(*size, seed), 0)
    counts = Counter(shown)
    last = counts.pop(shown[-1])
    assert set(counts.values()) <= {size[2]}
    assert 1 <= last <= size[2]


@settings(deadline=None)
@given(SIZES, st.integers(0, 9), st.data())
def test_an_epoch_goes_on_from_any_step(size: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    batches = numbered(*size, seed)
    first_step = data.draw(st.integers(0, batches.steps_per_epoch))
    assert epoch_of(batches, 1, first_step) == epoch_of(numbered(*size, seed), 1)[first_step * size[1] :]


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(0, 9))
def test_several_passes_make_an_epoch_each_in_another_order(size: tuple[int, int, int], passes: int, seed: int) -> None:
    count, batch_size, _ = size
    batches = numbered(count, batch_size, 1, seed, epoch_repeats=passes)
    order = batches._shuffled(1)
    assert batches.steps_per_epoch == count * passes // batch_size
    assert all(sorted(part) == list(range(count)) for part in order.view(passes, count).tolist())
    assert torch.equal(order[:count], numbered(count, batch_size, 1, seed)._shuffled(1))
    assert epoch_of(batches, 1) == order[: batches.steps_per_epoch * batch_size].tolist()
    if count > 20 and passes > 1:
        assert not torch.equal(order[:count], order[count : 2 * count])


def test_a_training_has_the_steps_of_its_longer_epochs(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none, hard]", "train.epoch_repeats=3", "teacher.cache=true")
    compare(recipe, tmp_path / "run", watcher=Watcher())
    steps = [epoch.step for epoch in read_metrics(tmp_path / "run") if epoch.student == "hard"]
    assert steps == [64 * 3 // 16, 2 * 64 * 3 // 16]


@pytest.mark.parametrize("devices", [2, 3])
def test_copies_can_be_dealt_to_devices_as_the_papers_sampler_deals_them(devices: int) -> None:
    """RASampler gives every device each k-th place of the epoch; there no image stands twice."""
    order = epoch_of(numbered(60, 12, repeats=devices), 0)
    for rank in range(devices):
        assert len(set(order[rank::devices])) == len(order) // devices


def test_epochs_show_other_images_and_in_the_long_run_all() -> None:
    batches = numbered(60, 12, repeats=3)
    epochs = [set(epoch_of(batches, epoch)) for epoch in range(20)]
    assert {len(images) for images in epochs} == {20}
    assert len(set.union(*epochs)) == 60


def test_copies_become_different_views_that_the_seed_decides() -> None:
    recipe = load_recipe("digits", ["train.repeats=4", "train.batch_size=16", "methods=[none]", "augment.cutmix=0"])
    data = load_dataset(recipe.data)
    views = []
    for _ in range(2):
        cohort = Cohort(
            build_students(recipe, data, 0, CPU_FP32), teacher=None, dataset=data, augment=recipe.augment,
            train=recipe.train,speed=recipe.speed, precision=CPU_FP32, seed=0,
        )  # fmt: skip
        images, labels = cohort.batches.batch(0, 0)
        assert torch.equal(images, images[::4].repeat_interleave(4, dim=0))
        views.append(cohort.make_view(images, labels, 0)[0])
    assert len(views[0].unique(dim=0)) == 16
    assert torch.equal(*views)


def test_more_copies_than_a_batch_holds_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.repeats=40 exceeds train\.batch_size=32"):
        load_recipe("digits", ["train.repeats=40"])


def test_memory_that_torch_keeps_for_itself_is_room_for_images(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * gib, 16 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * gib)
    assert [_has_room(torch.device("cuda"), size * gib) for size in (1, 4, 6)] == [True, True, False]


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 2, 3, 7]), min_size=1, max_size=60), st.integers(0, 9), st.integers(0, 3))
def test_a_balanced_epoch_is_a_loop_over_the_classes(labels: list[int], seed: int, epoch: int) -> None:
    split = Split(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), torch.tensor(labels))
    found = Batches(split, 1, seed, torch.device("cpu"), balanced=True)._shuffled(epoch).tolist()
    generator = derived_generator(seed, "order", epoch)
    order = torch.randperm(len(labels), generator=generator).tolist()
    drawn: list[int] = []
    classes = sorted(set(labels))
    for place, label in enumerate(classes):
        own = [image for image in order if labels[image] == label]
        quota = len(order) // len(classes) + (place < len(order) % len(classes))
        drawn += [own[number % len(own)] for number in range(quota)]
    assert found == [drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()]
