"""The peers in the tables are as strong as their papers say, and store what they claim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fixify.benchmarks import baselines
from fixify.benchmarks.baselines import Baseline
from fixify.heads import FeatureStatistics, feature_statistics

C, N = 40, 24


def _given() -> tuple[torch.Tensor, torch.Tensor, FeatureStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(N, N, generator=generator) * torch.logspace(0, -1.5, N)[:, None]
    x = torch.randn(400, N, generator=generator) @ mix + 1
    weight, bias = torch.randn(C, N, generator=generator), torch.randn(C, generator=generator)
    return weight, bias, feature_statistics(x[:300], standardize="center"), x[300:]


def _error(found: Baseline, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> float:
    difference = found.layer()(x) - torch.nn.functional.linear(x, weight, bias)
    return float((difference - difference.mean(dim=1, keepdim=True)).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensation_helps_and_levels_are_integers(bits: int) -> None:
    weight, bias, statistics, x = _given()
    plain, better = (make(weight, bias, statistics, bits) for make in (baselines.rounded, baselines.compensated))
    assert _error(better, weight, bias, x) < 0.7 * _error(plain, weight, bias, x)
    assert plain.bytes_per_class == better.bytes_per_class == N * bits / 8 + 2
    for found in (plain, better):
        assert all(len(row.unique()) <= 2**bits for row in found.weight)


@pytest.mark.parametrize(
    "make", [lambda *given: baselines.rounded(*given, 8), lambda *given: baselines.low_rank(*given, N)]
)
def test_with_many_bits_nothing_is_lost(make: Callable[..., Baseline]) -> None:
    weight, bias, statistics, x = _given()
    assert _error(make(weight, bias, statistics), weight, bias, x) < 1e-2


def test_low_rank_is_the_best_under_the_covariance() -> None:
    """Eckart and Young: no other matrix of that rank has a smaller error; the factors' rounding adds a little."""
    weight, bias, statistics, _ = _given()
    found = baselines.low_rank(weight, bias, statistics, 5)
    centered = weight - weight.mean(dim=0)
    lost = (centered - found.weight).double()
    values, vectors = torch.linalg.eigh(statistics.covariance)
    least = torch.linalg.svdvals((centered.double() @ vectors) * values.sqrt())[5:].square().sum()
    error = float(((lost @ statistics.covariance) * lost).sum())
    assert float(least) * 0.999 <= error < 1.1 * float(least)
    assert torch.linalg.matrix_rank(found.weight) == 5


def test_the_rank_fits_into_the_bytes() -> None:
    weight, bias, statistics, _ = _given()
    for size in (6, 12, 20):
        rank = baselines.rank_for(size, C, N)
        assert baselines.low_rank(weight, bias, statistics, rank).bytes_per_class <= size
        assert baselines.low_rank(weight, bias, statistics, rank + 1).bytes_per_class > size


def test_feedback_is_the_factor_of_the_moment() -> None:
    moment = _given()[2].covariance
    unit = baselines.error_feedback(moment).double() + torch.eye(N).double()
    pivots = torch.linalg.solve(unit.T, torch.linalg.solve(unit.T, moment).T)  # M^-1 S M^-T is diagonal
    torch.testing.assert_close(pivots, torch.diag(pivots.diagonal()), atol=1e-4, rtol=1e-4)
