"""Metrics and statistics against libraries and cases computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
from deitkit.evaluation.statistics import (
    balanced_mcnemar_p,
    clipped,
    holm,
    mcnemar_p,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from deitkit.models.vit import Output
from deitkit.run.reported import default_readout


def test_joint_adds_softmax_and_joint_logits_averages_logits() -> None:
    # The class head is very sure of 0, the distillation head prefers 1: the two readouts disagree.
    output = Output(class_logits=torch.tensor([[9.0, 0.0, 0.0]]), distillation_logits=torch.tensor([[0.0, 3.0, 2.9]]))
    scores = readout_scores(output)
    sum_of_both = output.class_logits.softmax(-1) + output.distillation_logits.softmax(-1)
    assert torch.allclose(scores["joint"].softmax(-1), sum_of_both / 2)
    assert torch.allclose(scores["joint-logits"], torch.tensor([[4.5, 1.5, 1.45]]))
    assert default_readout(list(scores)) == "joint"


def test_top_k_counts_labels_among_the_highest() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.05, 0.05], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    assert top_k_accuracy(scores, labels) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 3)
    assert top_k_accuracy(scores, labels, 3) == 1.0


def test_wilson_interval_is_its_formula() -> None:
    hits, n, z = 81, 100, 1.959964
    centre = (hits / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n))
    assert wilson_interval(hits, n) == pytest.approx((centre - half, centre + half), abs=1e-5)


def test_mcnemar_looks_at_discordant_images_only() -> None:
    both = torch.ones(50, dtype=torch.bool)
    first = torch.tensor([True] * 9 + [False] * 2)
    p = mcnemar_p(torch.cat([both, first]), torch.cat([both, ~first]))
    assert p == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    assert mcnemar_p(both, both) == 1.0


def test_paired_difference_over_seeds_is_the_paired_t_test() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [torch.rand(200, generator=generator) < share for share in (0.7, 0.74, 0.72)]
    second = [torch.rand(200, generator=generator) < share for share in (0.6, 0.66, 0.61)]
    difference = paired_difference(first, second)
    means = [[hits.double().mean().item() for hits in hits_of] for hits_of in (first, second)]
    expected = stats.ttest_rel(*means)
    assert difference.test == "paired t"
    assert difference.p == pytest.approx(expected.pvalue)
    assert difference.ci95 == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert mean_interval(means[0]) == pytest.approx(stats.t.interval(0.95, 2, np.mean(means[0]), stats.sem(means[0])))


def test_the_interval_for_new_images_covers_both_draws_of_seeds_and_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds, images, truth = 4, 300, 0.05
    covered = {"ci95": 0, "ci95_new_images": 0}
    for _ in range(400):
        easy = torch.rand(images, generator=generator)  # what an image adds to every model's chance
        gain = 0.03 * torch.randn(seeds, 1, generator=generator)  # what a seed adds
        base = torch.rand(images, generator=generator) < 0.6
        gained = torch.where(easy < 0.3, 0.6, -0.13 / 0.7)  # 0.05 on average
        hits = [torch.rand(images, generator=generator) < (0.4 + gained + own).clamp(0, 1) for own in gain]
        found = paired_difference(hits, [base & False] * seeds)
        for name in covered:
            low, high = getattr(found, name)
            covered[name] += low <= 0.4 + truth <= high
    assert covered["ci95"] < 0.93 * 400 <= covered["ci95_new_images"], covered


def test_paired_difference_of_one_seed_is_mcnemar() -> None:
    first = torch.tensor([True] * 70 + [False] * 30)
    second = torch.tensor([True] * 50 + [False] * 40 + [True] * 10)
    difference = paired_difference([first], [second])
    assert difference.test == "McNemar"
    assert difference.mean == pytest.approx(0.1)
    assert difference.p == pytest.approx(mcnemar_p(first, second))
    # Bonett and Price: one more of b = 20 and of c = 10, and two more of n = 100.
    centre, half = 10 / 102, 1.96 * np.sqrt((32 / 102 - (10 / 102) ** 2) / 102)
    assert difference.ci95 == pytest.approx((centre - half, centre + half), abs=1e-6)


@pytest.mark.parametrize(("n", "better", "worse"), [(100, 0.03, 0), (1000, 0.004, 0.001), (200, 0.02, 0)])
def test_few_images_that_differ_leave_an_interval_that_covers(n: int, better: float, worse: float) -> None:
    """Wald's covers 80, 90 and 91 %."""
    generator, covered = np.random.default_rng(0), 0
    for only_first, only_second, _ in generator.multinomial(n, [better, worse, 1 - better - worse], 400):
        hits, other = torch.ones(2, n, dtype=torch.bool)
        other[:only_first], hits[only_first : only_first + only_second] = False, False
        low, high = paired_difference([hits], [other]).ci95
        covered += low <= better - worse <= high
    assert covered >= 0.93 * 400, covered


def test_the_interval_of_an_accuracy_stays_within_0_and_1() -> None:
    low, high = mean_interval([0.93, 0.97])
    assert high > 1
    assert clipped((low, high)) == (low, 1.0)
    assert clipped((-0.1, 0.5)) == (0.0, 0.5)


@pytest.mark.parametrize(("first", "second"), [(20, 10), (9, 1), (30, 30), (40, 20)])
def test_with_equal_classes_the_test_by_class_is_mcnemars(first: int, second: int) -> None:
    hits, other = torch.zeros(2, 200, dtype=torch.bool)
    hits[:first], other[first : first + second] = True, True
    labels = torch.arange(200) % 2
    assert balanced_mcnemar_p(hits, other, labels) == pytest.approx(mcnemar_p(hits, other), abs=0.02)
    found, plain = paired_difference([hits], [other], labels), paired_difference([hits], [other])
    assert found.test == "McNemar by class"
    assert found.mean == pytest.approx(plain.mean)
    assert found.ci95 == pytest.approx(plain.ci95)


def test_a_difference_of_balanced_accuracies_counts_each_class_alike() -> None:
    """A rare class is right far more often, a frequent one a little less: ahead by class, behind by image."""
    labels = torch.tensor([0] * 900 + [1] * 100)
    hits, other = right(900, 840), right(900, 870)
    hits, other = torch.cat([hits, right(100, 80)]), torch.cat([other, right(100, 60)])
    found, plain = paired_difference([hits], [other], labels), paired_difference([hits], [other])
    assert found.mean == pytest.approx(((840 - 870) / 900 + (80 - 60) / 100) / 2)
    assert found.mean > 0 > plain.mean
    assert found.p < 0.001
    low, high = found.ci95
    assert 0 < low < found.mean < high
    seeds = paired_difference([hits, other], [other, other], labels)
    assert seeds.test == "paired t"
    assert seeds.mean == pytest.approx(found.mean / 2)


def test_equal_balanced_accuracies_differ_significantly_in_one_of_twenty_draws() -> None:
    generator, labels = torch.Generator().manual_seed(0), torch.tensor([0] * 160 + [1] * 40)
    significant = 0
    for _ in range(400):
        draw = torch.rand(200, generator=generator)
        hits, other = draw < 0.3, (draw > 0.2) & (draw < 0.5)  # each alone in a fifth of the images
        significant += balanced_mcnemar_p(hits, other, labels) < 0.05
    assert 6 <= significant <= 34  # 20 are expected


def right(n: int, hits: int) -> torch.Tensor:
    return torch.arange(n) < hits


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_all_gain_one_image_of_ten_prove_nothing(seeds: int) -> None:
    difference = paired_difference([right(10, 6)] * seeds, [right(10, 5)] * seeds)
    assert difference.p == 1.0  # one discordant image
    assert difference.test == "McNemar"
    low, high = difference.ci95
    assert low < 0 < 0.1 < high


def test_seeds_that_differ_equally_in_other_images_have_the_least_certain_p() -> None:
    first = [right(100, 60), right(100, 60)]
    second = [right(100, 50), torch.cat([torch.zeros(30, dtype=torch.bool), torch.ones(50, dtype=torch.bool),
                                         torch.zeros(20, dtype=torch.bool)])]  # fmt: skip
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.1)
    assert difference.p == pytest.approx(max(mcnemar_p(*pair) for pair in zip(first, second, strict=True)))


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_equal_predictions_leave_a_doubt_that_shrinks_with_the_images(n: int, seeds: int) -> None:
    difference = paired_difference([right(n, n // 2)] * seeds, [right(n, n // 2)] * seeds)
    assert (difference.mean, difference.p) == (0, 1)
    low, high = difference.ci95
    assert -low == high >= 1.96 / (n + 2)
    assert n < 1000 or high < 0.003


def test_statistics_with_ties_stay_in_their_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, seeds = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((1, 30), (1, 4)))
        levels = torch.randint(0, 3, (2, seeds), generator=generator) / 2
        rows = [[torch.rand(n, generator=generator) < level for level in levels[row]] for row in (0, 1)]
        difference = paired_difference(*rows)
        low, high = difference.ci95
        assert 0 < difference.p <= 1
        assert low <= difference.mean <= high
        assert low < high
        if n < 6 and difference.test == "McNemar":
            assert difference.p > 0.05  # 2 / 2^5 is the smallest p of five images


def test_holm_of_a_case_computed_by_hand() -> None:
    # Holm 1979: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1, each at least the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_its_steps_reject(p_values: list[float]) -> None:
    """The step-down procedure as Holm wrote it: stop at the first p above alpha / (m - k)."""
    corrected = holm(p_values)
    alpha = 0.05
    rejected = set()
    for k, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] * (len(p_values) - k) >= alpha:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(corrected) if p < alpha} == rejected
    assert all(p <= value <= 1 for p, value in zip(p_values, corrected, strict=True))
