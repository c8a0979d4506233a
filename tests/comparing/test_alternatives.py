"""Classifiers in few bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixify.comparing.alternatives import (
    BITS,
    Alternative,
    Moments,
    alternatives,
    prune,
    round_weights,
    rounded_bytes,
    svd_bytes,
    svd_rank,
    truncate,
)

DRAWN = torch.Generator().manual_seed(0)
FEATURES = (torch.randn(300, 12, generator=DRAWN) @ torch.randn(12, 48, generator=DRAWN) + 1).relu()
MOMENTS = Moments.of(FEATURES)
WEIGHT, BIAS = torch.randn(70, 48, generator=DRAWN), torch.randn(70, generator=DRAWN)


def error(found: Alternative) -> float:
    """Return the mean squared error of the logits on the features, in variances of the logits."""
    exact = F.linear(FEATURES, WEIGHT, BIAS)
    return float((F.linear(FEATURES, found.weight, found.bias) - exact).square().mean() / exact.var())


def test_images_lower_the_error_of_each() -> None:
    found = list(alternatives(WEIGHT, BIAS, 280 + 70 * 48 // 8, MOMENTS))
    plain, calibrated = ([each for each in found if each.calibrated is which] for which in (False, True))
    assert [each.name for each in plain] == [each.name for each in calibrated]
    assert [each.name for each in plain][: len(BITS)] == ["int8", "int4", "int3", "int2"]
    for before, after in zip(plain, calibrated, strict=True):
        assert error(after) < error(before), before.name
        assert after.num_bytes == before.num_bytes
    assert [error(each) for each in plain[: len(BITS)]] == sorted(error(each) for each in plain[: len(BITS)])


def test_sizes() -> None:
    budget = 280 + 70 * 48 // 8
    for found in alternatives(WEIGHT, BIAS, budget, MOMENTS):
        if found.name.startswith("int"):
            assert found.num_bytes == 280 + 4 * 70 + 70 * 48 * int(found.name[3:]) // 8
        else:
            assert budget - svd_bytes(WEIGHT, 1) < found.num_bytes <= budget
    assert [found.num_bytes for found in alternatives(WEIGHT, None, 100)] == [
        *(rounded_bytes(WEIGHT, bits) for bits in BITS),
        100,
    ]  # no rank fits
    assert [found.name for found in alternatives(WEIGHT, BIAS, 200)] == ["int8", "int4", "int3", "int2"]


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_class_has_as_many_levels_as_the_bits_allow(
    bits: int, rows: int, columns: int, seed: int, calibrated: bool
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    weight, features = torch.randn(rows, columns, generator=drawn), torch.randn(7, columns, generator=drawn)
    rounded = round_weights(weight, bits, Moments.of(features) if calibrated else None)
    assert rounded.shape == weight.shape and rounded.isfinite().all()
    assert all(len(row.unique()) <= 2**bits for row in rounded)


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 2.0)])
def test_constant_weights_stay_what_they_are(weight: Tensor) -> None:
    torch.testing.assert_close(round_weights(weight, 2), weight)


def test_correlated_features_gain_most_from_compensation() -> None:
    alone = MOMENTS.covariance.diagonal().diag()
    found = {}
    for name, covariance in (("full", MOMENTS.covariance), ("diagonal", alone)):
        rounded = round_weights(WEIGHT, 3, Moments(MOMENTS.mean, covariance))
        change = (WEIGHT - rounded).double()
        found[name] = float(((change @ MOMENTS.covariance) * change).sum())
    assert found["full"] < 0.7 * found["diagonal"]


def test_truncation() -> None:
    low = torch.randn(70, 3, generator=DRAWN) @ torch.randn(3, 48, generator=DRAWN)
    for moments in (None, MOMENTS):
        close = truncate(low, 3, moments)
        assert (close - low).norm() < 0.03 * low.norm()
        assert torch.linalg.matrix_rank(truncate(WEIGHT, 5, moments), rtol=1e-4) == 5
    assert (svd_rank(WEIGHT, -4), svd_rank(WEIGHT, 121), svd_rank(WEIGHT, 122), svd_rank(WEIGHT, 10**6)) == (
        0,
        0,
        1,
        48,
    )


def test_pruning_keeps_the_largest() -> None:
    kept = prune(WEIGHT, 100)
    threshold = WEIGHT.abs().flatten().topk(100).values[-1]
    torch.testing.assert_close(kept, torch.where(WEIGHT.abs() >= threshold, WEIGHT, 0.0), rtol=1e-3, atol=0)
    assert (prune(WEIGHT, 209, MOMENTS) != 0).sum(dim=1).tolist() == [2] * 70


def test_features_that_never_vary() -> None:
    moments = Moments.of(torch.ones(10, 48))
    for found in alternatives(WEIGHT, BIAS, 1000, moments):
        assert found.weight.isfinite().all()
