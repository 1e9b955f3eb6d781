"""What `deitkit analyze` computes, against naive loops and cases by hand; and what it leaves in a run folder."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deitkit.analyze.calibration import brier_score, negative_log_likelihood, reliability
from deitkit.analyze.decisions import (
    agreement,
    confusion_matrix,
    disagreement,
    divergence,
    most_confused,
    per_class_accuracy,
)
from deitkit.evaluate import readout_probabilities, readout_scores
from deitkit.models.vit import Output


def drawn(seed: int, n: int = 300, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Probabilities that lean towards their labels, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return (logits + 2 * torch.nn.functional.one_hot(labels, classes)).softmax(dim=-1), labels


def test_disagreement_is_a_mean_over_the_seeds_of_both() -> None:
    truth = torch.tensor([0, 1, 2, 1])
    judges = {
        "truth": {0: truth, 1: truth},
        "a": {0: torch.tensor([0, 1, 2, 2]), 1: torch.tensor([1, 1, 2, 2])},
        "b": {1: torch.tensor([1, 1, 0, 1])},
        "stopped": {},
    }
    matrix = disagreement(judges)
    assert matrix[0] == [0, (1 / 4 + 2 / 4) / 2, 2 / 4, None]
    assert matrix[1][2] == 2 / 4  # under seed 1 alone
    assert all(matrix[i][j] == matrix[j][i] for i in range(4) for j in range(4))


def test_confusion_counts_and_words() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    decisions = torch.tensor([1, 1, 0, 1, 2, 0])
    counts = confusion_matrix(decisions, labels, 4)
    naive = [[sum(a == i and b == j for a, b in zip(labels.tolist(), decisions.tolist())) for j in range(4)]
             for i in range(4)]  # fmt: skip
    assert counts.tolist() == naive
    assert per_class_accuracy(counts) == [pytest.approx(1 / 3), 1 / 2, 0, None]
    worst, *others = most_confused(counts)
    assert worst == {"true": 0, "decided": 1, "count": 2, "of": 3, "share": pytest.approx(2 / 3)}
    assert [(pair["true"], pair["decided"]) for pair in others] == [(1, 2), (2, 0)], "the diagonal is no mistake"
    assert most_confused(torch.eye(3, dtype=torch.int64)) == []


def test_agreement_tells_inherited_from_corrected_mistakes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    teacher = torch.tensor([0, 0, 1, 0, 2])
    student = torch.tensor([0, 1, 1, 0, 1])
    found = agreement(student, teacher, labels)
    assert found == {"overall": 3 / 5, "teacher_right": pytest.approx(2 / 3), "teacher_wrong": 0.5, "corrected": 0.5}
    assert agreement(student, labels, labels)["teacher_wrong"] is None


def test_divergence_to_the_teacher_is_scipys_relative_entropy() -> None:
    from scipy.stats import entropy

    (student, _), (teacher, _) = drawn(0), drawn(1)
    expected = entropy(teacher.double().numpy(), student.double().numpy(), axis=1).mean()
    assert divergence(student, teacher) == pytest.approx(expected, rel=1e-5)
    assert divergence(teacher, teacher) == 0


def test_probabilities_of_each_readout_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    scores = readout_scores(Output(*logits))
    found = {name: readout_probabilities(name, values) for name, values in scores.items()}
    for name, values in found.items():
        torch.testing.assert_close(values.sum(dim=-1), torch.ones(5), msg=name)
    torch.testing.assert_close(found["joint"], (found["class"] + found["distillation"]) / 2)


def naive_bins(probabilities: Tensor, labels: Tensor, bins: int) -> list[list[tuple[float, bool]]]:
    """Each image's confidence and whether it is right, by bin ((m - 1) / M, m / M], as Guo et al. write it."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probabilities.double().tolist(), labels.tolist(), strict=True):
        place = next(m for m in range(bins) if max(row) <= (m + 1) / bins)
        found[place].append((max(row), row.index(max(row)) == label))
    return found


@given(st.integers(0, 2**16), st.sampled_from([1, 10, 15]))
def test_calibration_errors_are_those_of_a_naive_loop(seed: int, bins: int) -> None:
    probabilities, labels = drawn(seed, n=60)
    found = reliability(probabilities, labels, bins)
    gaps = []
    for members in naive_bins(probabilities, labels, bins):
        confidence = sum(value for value, _ in members)
        hits = sum(right for _, right in members)
        gaps.append((abs(confidence - hits) / max(len(members), 1), len(members)))
    assert found.counts.tolist() == [count for _, count in gaps]
    assert found.expected_error == pytest.approx(sum(gap * count for gap, count in gaps) / 60)
    assert found.maximum_error == pytest.approx(max(gap for gap, _ in gaps))


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    found = reliability(probabilities, labels, bins=2)
    # 0.5 belongs to the lower bin: right, and sure by half. The upper: 2 of 3 right, sure by 2.6 of 3.
    assert found.counts.tolist() == [1, 3]
    assert found.expected_error == pytest.approx((0.5 + 0.6) / 4)
    assert found.maximum_error == pytest.approx(0.5)
    assert found.curve()[1] == {
        "low": 0.5, "high": 1, "count": 3, "confidence": pytest.approx(2.6 / 3), "accuracy": pytest.approx(2 / 3),
    }  # fmt: skip
    pooled = found + found
    assert pooled.counts.tolist() == [2, 6]
    assert pooled.expected_error == pytest.approx(found.expected_error)
    assert brier_score(probabilities, labels) == pytest.approx((0.08 + 1.28 + 0.5 + 0) / 4)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(-math.log(0.8 * 0.2 * 0.5) / 4)


def test_a_true_class_that_rounded_to_zero_costs_much_and_not_infinitely() -> None:
    assert 80 < negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) < 90


def test_likelihood_is_torchs_cross_entropy() -> None:
    probabilities, labels = drawn(4)
    expected = torch.nn.functional.nll_loss(probabilities.log(), labels).item()
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(expected, rel=1e-5)
