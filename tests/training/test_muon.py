"""Muon: against the published algorithm written out naively in float64, and against torch's own."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deitkit.training.muon import Muon, orthogonalise

SHAPES = [(12, 4), (12, 4), (4, 4), (4, 12)]


def matrices(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[nn.Parameter]:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
    return parameters


def naive(steps: int, rate: float, weight_decay: float) -> list[torch.Tensor]:
    """Jordan et al. 2024 with the scale of Liu et al. 2025, a matrix at a time."""
    parameters = matrices()
    averages = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(steps):
        give_gradients(parameters, step)
        for number, parameter in enumerate(parameters):
            averages[number] = 0.95 * averages[number] + 0.05 * parameter.grad
            x = 0.05 * parameter.grad + 0.95 * averages[number]
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
                polynomial = -4.7750 * gram + 2.0315 * gram @ gram
                x = 3.4445 * x + (polynomial @ x if x.shape[0] <= x.shape[1] else x @ polynomial)
            parameter.data *= 1 - rate * weight_decay
            parameter.data -= rate * 0.2 * max(x.shape) ** 0.5 * x
    return [parameter.detach() for parameter in parameters]


def test_it_is_the_published_algorithm() -> None:
    parameters = matrices()
    train(parameters, Muon(parameters, lr=0.1, weight_decay=0.3, dtype=torch.float64), range(4))
    for ours, expected in zip(parameters, naive(4, 0.1, 0.3), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_it_agrees_with_torchs_within_the_rounding_of_bf16() -> None:
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    train(ours, Muon(ours, lr=0.1, weight_decay=0.3), range(3))
    train(theirs, torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), range(3))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() / other.norm() < 0.02


def test_a_rate_on_the_device_is_the_same_as_a_number() -> None:
    number, tensor = matrices(), matrices()
    train(number, Muon(number, lr=0.25), range(2))
    train(tensor, Muon(tensor, lr=torch.tensor(0.25, dtype=torch.float64)), range(2))
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(number, tensor, strict=True))


def test_it_goes_on_from_its_state() -> None:
    whole = matrices()
    train(whole, Muon(whole, lr=0.1), range(4))
    parts = matrices()
    first = Muon(parts, lr=0.1)
    train(parts, first, range(2))
    state: Any = copy.deepcopy(first.state_dict())
    second = Muon(parts, lr=0.1)
    second.load_state_dict(state)
    train(parts, second, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_matrix_without_a_gradient_stays() -> None:
    parameters = matrices()
    before = parameters[0].detach().clone()
    give_gradients(parameters, 0)
    parameters[0].grad = None
    Muon(parameters, lr=0.1).step()
    assert torch.equal(parameters[0], before)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), count=st.integers(1, 4), seed=st.integers(0, 1000))
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Singular values from 0.2 to 1: the iteration is meant for matrices that are not nearly singular.
    left = torch.linalg.qr(torch.randn(count, rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(count, columns, columns, generator=generator, dtype=torch.float64))[0]
    size = min(rows, columns)
    values = torch.linspace(0.2, 1.0, size, dtype=torch.float64)
    given_matrices = left[..., :size] * values @ right[..., :size, :].contiguous()
    result = orthogonalise(given_matrices)
    diagonal = left[..., :size].mT @ result @ right[..., :size, :].mT
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()
    assert (diagonal - torch.diag_embed(values)).abs().max() < 1e-6


def test_other_shapes_are_refused() -> None:
    with pytest.raises(AssertionError):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
