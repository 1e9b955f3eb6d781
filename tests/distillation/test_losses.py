"""The losses against hand-computed cases and naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr

from deitkit.distillation.losses import (
    decoupled_distillation_loss,
    hard_distillation_loss,
    label_loss,
    relation_distillation_loss,
    soft_distillation_loss,
    standardised_distillation_loss,
)

DKD = {"target_weight": 0.7, "others_weight": 3.0, "temperature": 2.0}
DIST = {"inter_weight": 0.7, "intra_weight": 3.0, "temperature": 2.0}


def naive_softmax(row: list[float], temperature: float) -> list[float]:
    highest = max(row)
    powers = [math.exp((value - highest) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def naive_soft_loss(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        p, q = naive_softmax(teacher_row, temperature), naive_softmax(student_row, temperature)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def naive_divergence(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def naive_decoupled_loss(
    student: list[list[float]], teacher: list[list[float]], labels: list[int],
    target_weight: float, others_weight: float, temperature: float,
) -> float:  # fmt: skip
    """Zhao et al. 2022, image by image and class by class."""
    total = 0.0
    for student_row, teacher_row, label in zip(student, teacher, labels, strict=True):
        p, q = naive_softmax(teacher_row, temperature)[label], naive_softmax(student_row, temperature)[label]
        total += target_weight * naive_divergence([p, 1 - p], [q, 1 - q])
        rest = [[value for c, value in enumerate(row) if c != label] for row in (teacher_row, student_row)]
        total += others_weight * naive_divergence(*(naive_softmax(row, temperature) for row in rest))
    return temperature**2 * total / len(student)


def naive_relation_loss(
    student: list[list[float]], teacher: list[list[float]], inter_weight: float, intra_weight: float, temperature: float
) -> float:
    """Huang et al. 2022, with SciPy's correlation."""
    p, q = ([naive_softmax(row, temperature) for row in logits] for logits in (teacher, student))
    inter = sum(1 - pearsonr(a, b).statistic for a, b in zip(p, q, strict=True)) / len(p)
    columns = list(zip(zip(*p, strict=True), zip(*q, strict=True), strict=True))
    intra = sum(1 - pearsonr(a, b).statistic for a, b in columns) / len(columns)
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def naive_z_scores(row: list[float]) -> list[float]:
    """Scores of mean 0 and deviation 1, with the loss's epsilon in the variance."""
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + 1e-7)
    return [(value - mean) / deviation for value in row]


@given(st.floats(0.5, 10), st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000))
def test_decoupled_loss_is_the_naive_loop(temperature: float, batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, targets = torch.randn(3, batch, classes, generator=generator)
    weights = {**DKD, "temperature": temperature}
    expected = naive_decoupled_loss(student.tolist(), teacher.tolist(), targets.argmax(dim=-1).tolist(), **weights)
    value = decoupled_distillation_loss(student, teacher, targets.softmax(dim=-1), **weights)
    assert value.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_decoupled_loss_is_the_soft_loss_where_the_others_have_the_teachers_weight() -> None:
    # Zhao et al. 2022, section 3.1: KD = TCKD + (1 - p_y) NCKD, for one image.
    student, teacher = torch.randn(2, 1, 7)
    targets = F.one_hot(torch.tensor([3]), 7).float()
    others_weight = 1 - (teacher / 2).softmax(dim=-1)[0, 3].item()
    decoupled = decoupled_distillation_loss(
        student, teacher, targets, target_weight=1.0, others_weight=others_weight, temperature=2.0
    )
    assert torch.isclose(decoupled, soft_distillation_loss(student, teacher, temperature=2.0), rtol=1e-4)


@given(st.floats(0.5, 10), st.integers(3, 6), st.integers(3, 6), st.integers(0, 10_000))
def test_relation_loss_is_the_naive_loop(temperature: float, batch: int, classes: int, seed: int) -> None:
    student, teacher = torch.randn(2, batch, classes, generator=torch.Generator().manual_seed(seed))
    weights = {**DIST, "temperature": temperature}
    expected = naive_relation_loss(student.tolist(), teacher.tolist(), **weights)
    value = relation_distillation_loss(student, teacher, **weights)
    assert value.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_relation_loss_of_the_parts_is_not_that_of_the_batch() -> None:
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    whole = relation_distillation_loss(student, teacher, **DIST)
    parts = [relation_distillation_loss(s, t, **DIST) for s, t in zip(student.split(4), teacher.split(4), strict=True)]
    assert (whole - sum(parts) / 2).abs() > 0.1


@given(st.floats(0.5, 10), st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000))
def test_standardised_loss_is_the_naive_loop(temperature: float, batch: int, classes: int, seed: int) -> None:
    student, teacher = torch.randn(2, batch, classes, generator=torch.Generator().manual_seed(seed))
    scores = ([naive_z_scores(row) for row in logits.tolist()] for logits in (student, teacher))
    expected = naive_soft_loss(*scores, temperature)
    value = standardised_distillation_loss(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_standardised_loss_does_not_see_the_size_of_logits_and_stands_logits_that_are_all_equal() -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    losses = [standardised_distillation_loss(a * student, b * teacher, temperature=2.0) for a, b in ((1, 1), (7, 3))]
    assert torch.isclose(*losses, rtol=1e-4)
    flat = torch.zeros(6, 5, requires_grad=True)
    standardised_distillation_loss(flat, teacher, temperature=2.0).backward()
    assert flat.grad.isfinite().all()
    assert flat.grad.abs().sum() > 0


def test_soft_loss_of_a_case_computed_by_hand() -> None:
    # Two classes, student undecided (1/2, 1/2), teacher (3/4, 1/4): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.130812.
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert soft_distillation_loss(student, teacher, temperature=1.0).item() == pytest.approx(0.130812, abs=1e-6)


@given(st.floats(0.5, 10), st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000))
def test_soft_loss_is_the_naive_loop(temperature: float, batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, classes, generator=generator)
    expected = naive_soft_loss(student.tolist(), teacher.tolist(), temperature)
    value = soft_distillation_loss(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=5e-5)


def test_legacy_scale_divides_by_the_classes_as_the_mean_over_all_elements_does() -> None:
    student, teacher = torch.randn(2, 5, 7)
    t = 2.0
    released = F.kl_div(
        F.log_softmax(student / t, 1), F.log_softmax(teacher / t, 1), reduction="sum", log_target=True
    ) * (t * t / student.numel())
    assert torch.isclose(soft_distillation_loss(student, teacher, temperature=t, scale="legacy"), released)
    whole = soft_distillation_loss(student, teacher, temperature=t)
    assert torch.isclose(whole, 7 * released)


def test_gradient_of_the_soft_loss_keeps_its_size_over_temperatures() -> None:
    # The factor t^2 keeps gradients of small logits comparable (Hinton et al. 2015, section 2.1).
    norms = []
    for temperature in (2.0, 8.0):
        student = (0.01 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0))).requires_grad_()
        teacher = 0.01 * torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
        soft_distillation_loss(student, teacher, temperature=temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_hard_loss_is_cross_entropy_with_the_teachers_decision_and_never_smoothed() -> None:
    student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    teacher = torch.tensor([[0.1, 0.2, 0.0], [5.0, 0.0, 4.9]])
    expected = sum(
        -math.log(naive_softmax(row, 1.0)[decision]) for row, decision in zip(student.tolist(), (1, 0), strict=True)
    )
    assert hard_distillation_loss(student, teacher).item() == pytest.approx(expected / 2, abs=1e-6)


def test_label_loss_equals_cross_entropy_with_smoothing() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    assert torch.isclose(label_loss(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_label_loss_of_mixed_targets_is_the_mixture_of_losses() -> None:
    logits, a, b = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 1])
    targets = 0.3 * F.one_hot(a, 3) + 0.7 * F.one_hot(b, 3)
    assert torch.isclose(
        label_loss(logits, targets), 0.3 * F.cross_entropy(logits, a) + 0.7 * F.cross_entropy(logits, b)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_at_huge_logits(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    targets = torch.full((2, 3), 1 / 3)
    losses = (
        label_loss(student, targets),
        hard_distillation_loss(student, teacher),
        soft_distillation_loss(student, teacher, temperature=1.0),
        decoupled_distillation_loss(student, teacher, targets, **DKD),
        relation_distillation_loss(student, teacher, **DIST),
        standardised_distillation_loss(student, teacher, temperature=1.0),
    )
    for loss in losses:
        assert torch.isfinite(loss)
    sum(losses).backward()
    assert torch.isfinite(student.grad).all()


@given(st.floats(-100, 100))
def test_losses_do_not_change_when_all_logits_shift(shift: float) -> None:
    student, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    targets = torch.full((3, 4), 0.25)
    for loss in (
        lambda s, t: label_loss(s, targets),
        hard_distillation_loss,
        lambda s, t: soft_distillation_loss(s, t, temperature=3.0),
        lambda s, t: decoupled_distillation_loss(s, t, targets, **DKD),
        lambda s, t: relation_distillation_loss(s, t, **DIST),
        lambda s, t: standardised_distillation_loss(s, t, temperature=3.0),
    ):
        assert torch.isclose(loss(student, teacher), loss(student + shift, teacher + 2 * shift), atol=2e-4)
