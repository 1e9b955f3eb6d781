"""The statistics of a comparison: intervals, paired tests, differences.

Nothing here selects a model by its test accuracy.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from scipy import stats
from torch import Tensor

from deitkit.run.difference import Difference

BALANCED_DRAWS = 9_999


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def finished(values: Iterable[float | None]) -> list[float]:
    """Return the values of the seeds that finished."""
    return [value for value in values if value is not None]


def mean_of_finished(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values there are, of seeds or folds that finished; None without any."""
    found = finished(values)
    return float(np.mean(found)) if found else None


def std_of_finished(values: Iterable[float | None]) -> float | None:
    """Return the standard deviation over the seeds or folds that finished (n - 1); None with fewer than two."""
    found = finished(values)
    return float(np.std(found, ddof=1)) if len(found) > 1 else None


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % Student t interval of a mean over at least two seeds."""
    assert len(values) >= 2
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def clipped(interval: tuple[float, float]) -> tuple[float, float]:
    """Return the part of an interval in which an accuracy can be, [0, 1]."""
    return max(interval[0], 0.0), min(interval[1], 1.0)


def mcnemar_p(hits: Bool[Tensor, " n"], other: Bool[Tensor, " n"]) -> float:
    """Return the exact two-sided p value of McNemar's test of equal accuracy of two classifiers on the same images.

    Source: McNemar 1947; the exact form is a binomial test on the images that only one of the two classifies correctly.
    """
    only_first = int((hits & ~other).sum())
    only_second = int((other & ~hits).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def balanced_mcnemar_p(hits: Bool[Tensor, " n"], other: Bool[Tensor, " n"], labels: Int64[Tensor, " n"]) -> float:
    """Return the two-sided p value of a test of equal balanced accuracy of two classifiers on the same images.

    As in McNemar's test, an image that only one of the two classifies correctly is either one's with even odds; here
    those of each class are drawn (9,999 times, always the same), and weighed by the size of their class.
    """
    counts = labels.bincount().clamp(min=1).numpy()
    first, second = (labels[only].bincount(minlength=len(counts)).numpy() for only in (hits & ~other, other & ~hits))
    generator, drawn = np.random.default_rng(0), np.zeros(BALANCED_DRAWS)
    for label in np.flatnonzero(first + second):  # one by one, since there may be thousands of classes
        only = first[label] + second[label]
        drawn += (2 * generator.binomial(only, 0.5, BALANCED_DRAWS) - only) / counts[label]
    as_far = np.abs(drawn) >= abs(((first - second) / counts).sum()) - 1e-9
    return float((1 + as_far.sum()) / (1 + BALANCED_DRAWS))


def sign_test_p(better: int, worse: int) -> float:
    """Return the exact one-sided p value that images which only one of two classifiers gets right favour the first.

    Args:
        better: Images that only the first classifies correctly.
        worse: Images that only the second classifies correctly.
    """
    return float(stats.binom.sf(better - 1, better + worse, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number, in the same order: all hold together.

    Source: Holm 1979. Of m values the smallest is multiplied by m, the next by m - 1, and so on; none falls below a
    smaller one, or exceeds 1.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, float)[order] * factors), 1.0)
    return [float(value) for value in corrected]


def paired_difference(
    hits: Sequence[Bool[Tensor, " n"]], other: Sequence[Bool[Tensor, " n"]], labels: Int64[Tensor, " n"] | None = None
) -> Difference:
    """Compare two rows with the same training seeds and the same test images.

    One seed: McNemar's exact test over the images, and the interval of the difference of two paired proportions (Bonett
    and Price 2012). Several seeds: the paired t test and interval over the seeds' differences, which test whether the
    difference holds for new seeds on these test images. For new test images too, the squares of its half-width and of
    the images' add up, as variances of independent draws do; what one image varies by from seed to seed is in both,
    which errs on the wide side. Where all seeds differ by the same number of images, as with few images they often do,
    they have no spread to test with: then the images are tested as for one seed, with the least certain p of the seeds.

    Args:
        hits: For each seed, which test images the row classifies correctly.
        other: The same for the row to compare with.
        labels: Of the images, to compare balanced accuracies: the tests of one seed are then ``balanced_mcnemar_p``.
    """
    weights = torch.ones(1, dtype=torch.float64)
    if labels is not None:
        counts = labels.bincount().double()
        weights = (len(labels) / ((counts > 0).sum() * counts))[labels]  # their mean makes each class count alike
    heaviest = weights.max().item()
    per_image = [weights * (a.double() - b.double()) for a, b in zip(hits, other, strict=True)]
    differences = [one.mean().item() for one in per_image]
    mean = float(np.mean(differences))
    if are_equal(differences):
        test = mcnemar_p if labels is None else partial(balanced_mcnemar_p, labels=labels)
        p = max(test(a, b) for a, b in zip(hits, other, strict=True))
        widest = max((_over_images(one, heaviest) for one in per_image), key=lambda interval: interval[1] - interval[0])
        name = "McNemar" if labels is None else "McNemar by class"
        return Difference(mean, widest, p, name)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    over_seeds = mean_interval(differences)
    low, high = _over_images(torch.stack(per_image).mean(dim=0), heaviest)
    half = math.hypot(over_seeds[1] - mean, (high - low) / 2)
    return Difference(mean, over_seeds, p, "paired t", ci95_new_images=(mean - half, mean + half))


def resampled_interval(values: Sequence[float], folds: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean over folds, whose training images overlap; see ``resampled_difference``."""
    half = stats.t.ppf(0.975, len(values) - 1) * _resampled_error(values, folds)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def resampled_difference(differences: Sequence[float], folds: int) -> Difference:
    """Test whether a difference holds, by its value in each fold of a cross-validation.

    Two folds share most of their training images, so their differences vary less than those of independent training
    sets, and the usual t test finds too much. The corrected resampled t test takes for the variance of the mean of n
    values not 1/n of theirs but 1/n + 1/(k - 1), the latter the test images of one of k folds per image outside it; n
    is k unless students stopped. Where all folds differ by the same number there is nothing to test with but the sign,
    and no interval.

    Source: Nadeau and Bengio 2003, Inference for the generalization error.

    Args:
        differences: Of two rows' accuracies, one for each of at least two folds that both finished.
        folds: How many the images are divided into.
    """
    mean = float(np.mean(differences))
    if are_equal(differences):
        return Difference(mean, None, 1.0 if abs(mean) < 1e-9 else 2.0 ** (1 - len(differences)), "sign test")
    statistic = abs(mean) / _resampled_error(differences, folds)
    p = float(2 * stats.t.sf(statistic, len(differences) - 1))
    return Difference(mean, resampled_interval(differences, folds), p, "corrected resampled t")


def _resampled_error(values: Sequence[float], folds: int) -> float:
    """Return the standard error of a mean over folds."""
    assert 2 <= len(values) <= folds
    return float(math.sqrt((1 / len(values) + 1 / (folds - 1)) * np.var(values, ddof=1)))


def are_equal(values: Sequence[float]) -> bool:
    """Return whether accuracies are equal but for rounding, so that they have no spread; True for a single one."""
    return max(values) - min(values) < 1e-9


def _over_images(differences: Float64[Tensor, " n"], heaviest: float) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference of two classifiers over other images.

    Of two paired proportions it is Bonett and Price's: Wald's interval with one more image that only the first gets
    right, and one that only the second does, of the ``heaviest`` weight. Few images on which both agree thus do not
    show that they always do.

    Source: Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data.
    """
    more = torch.cat([differences, torch.tensor([heaviest, -heaviest], dtype=torch.float64)])
    mean, half = more.mean().item(), 1.96 * more.std(correction=0).item() / math.sqrt(len(more))
    return mean - half, mean + half
