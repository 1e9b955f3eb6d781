import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data import mixup as timm_mixup
from timm.loss import LabelSmoothingCrossEntropy

from deitkit.data.augment.mix import Mix, cutmix, smoothed_one_hot
from deitkit.recipe.schema import AugmentRecipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(batch: int = 6, height: int = 8, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    view = torch.rand(batch, 3, height, width, generator=generator(1))
    return view, torch.randint(7, (batch,), generator=generator(2))


def share_of_own_label(targets: torch.Tensor, labels: torch.Tensor) -> float:
    """The share that an unsmoothed target gives its own label, from an image whose partner has another one."""
    different = labels != labels.flip(0)
    return float(targets.gather(1, labels[:, None])[different][0])


def test_without_mixing_the_view_stays_and_labels_are_smoothed():
    view, labels = sample()
    mixed, targets = Mix(AugmentRecipe(), 7, 0.1)(view, labels, generator())
    assert torch.equal(mixed, view)
    assert torch.allclose(targets, timm_mixup.one_hot(labels, 7, 0.9 + 0.1 / 7, 0.1 / 7))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_pytorchs(smoothing):
    logits, labels = torch.randn(9, 7, generator=generator()), torch.randint(7, (9,), generator=generator())
    dense = torch.nn.functional.cross_entropy(logits, smoothed_one_hot(labels, 7, smoothing))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.allclose(dense, expected)
    assert torch.allclose(dense, LabelSmoothingCrossEntropy(smoothing)(logits, labels))


@pytest.mark.parametrize("batch", [1, 6, 7])
def test_mixup_equals_a_loop_and_timms_targets(batch):
    view, labels = sample(batch)
    labels = torch.arange(batch)
    before = view.clone()
    mixed, targets = Mix(AugmentRecipe(mixup=0.8), 7, 0.0)(view, labels, generator(4))
    _, smoothed = Mix(AugmentRecipe(mixup=0.8), 7, 0.1)(view, labels, generator(4))
    share = share_of_own_label(targets, labels) if batch > 1 else 1.0
    for i in range(batch):
        assert torch.allclose(mixed[i], share * view[i] + (1 - share) * view[batch - 1 - i], atol=1e-6)
    assert torch.allclose(smoothed, timm_mixup.mixup_target(labels, 7, share, 0.1), atol=1e-6)
    assert torch.equal(view, before)
    assert batch == 1 or 0 < share < 1


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_replaces_one_box_and_its_share_is_the_boxs_area(seed):
    view, labels = sample()
    labels = torch.arange(6)
    before = view.clone()
    mixed, targets = Mix(AugmentRecipe(cutmix=1.0), 7, 0.0)(view, labels, generator(seed))
    replaced = (mixed != view).any(dim=(0, 1))
    rows, columns = replaced.any(dim=1), replaced.any(dim=0)
    assert torch.equal(replaced, rows[:, None] & columns)
    assert torch.equal(mixed, torch.where(replaced, view.flip(0), view))
    assert share_of_own_label(targets, labels) == pytest.approx(1 - replaced.float().mean().item())
    assert torch.allclose(targets, timm_mixup.mixup_target(labels, 7, 1 - replaced.float().mean().item()), atol=1e-6)
    assert torch.equal(view, before)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    centre=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_the_cutmix_box_is_timms(share, size, centre):
    height, width = size
    middle = [int(centre[0] * height), int(centre[1] * width)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda low, high, size: middle.pop(0))
        (top, bottom, left, right), expected = timm_mixup.cutmix_bbox_and_lam((2, 1, height, width), share)
    view = torch.stack([torch.zeros(1, height, width), torch.ones(1, height, width)])
    mixed, corrected = cutmix(view, share, *centre)
    assert corrected == pytest.approx(expected)
    box = torch.zeros(height, width)
    box[top:bottom, left:right] = 1
    assert torch.equal(mixed[0, 0], box)


def collect(recipe: AugmentRecipe, batches: int) -> tuple[list[float], int, int]:
    """Run a recipe; return Mixup's shares, and how many batches were mixed up and cut."""
    view = torch.rand(2, 1, 16, 16, generator=generator(1))
    mix, state, shares, cut = Mix(recipe, 2, 0.0), generator(), [], 0
    for _ in range(batches):
        mixed, targets = mix(view, torch.tensor([0, 1]), state)
        if torch.equal(mixed, view):
            continue
        if ((mixed == view) | (mixed == view.flip(0))).all():
            cut += 1
        else:
            shares.append(float(targets[0, 0]))
    return shares, len(shares), cut


@pytest.mark.parametrize("concentration", [0.8, 2.0])
def test_mixups_share_follows_its_beta_distribution(concentration):
    shares, mixed, cut = collect(AugmentRecipe(mixup=concentration), 1500)
    assert (mixed, cut) == (1500, 0)
    assert stats.kstest(shares, stats.beta(concentration, concentration).cdf).pvalue > 0.001


def test_batches_are_mixed_and_switched_with_their_probabilities():
    recipe = AugmentRecipe(mixup=0.8, cutmix=1.0, mix_probability=0.6, mix_switch=0.25)
    _, mixed, cut = collect(recipe, 2000)
    assert (mixed + cut) / 2000 == pytest.approx(0.6, abs=0.04)
    assert cut / (mixed + cut) == pytest.approx(0.25, abs=0.04)
    assert collect(AugmentRecipe(mixup=0.8, mix_probability=0.0), 20)[1:] == (0, 0)


@settings(max_examples=30, deadline=None)
@given(
    mixup=st.sampled_from([0.0, 0.1, 0.8]),
    cutmix_=st.sampled_from([0.0, 0.1, 1.0]),
    smoothing=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_targets_sum_to_one_and_the_seed_decides(mixup, cutmix_, smoothing, seed):
    view, labels = sample(5)
    mix = Mix(AugmentRecipe(mixup=mixup, cutmix=cutmix_), 7, smoothing)
    mixed, targets = mix(view, labels, generator(seed))
    again, same_targets = mix(view, labels, generator(seed))
    assert torch.allclose(targets.sum(dim=1), torch.ones(5), atol=1e-5)
    assert targets.min() >= 0
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    assert torch.equal(mixed, again)
    assert torch.equal(targets, same_targets)
