"""Two classifiers on the same images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixify.comparing.paired import paired


@given(gained=st.integers(0, 40), lost=st.integers(0, 40), rest=st.integers(0, 200))
def test_symmetry(gained: int, lost: int, rest: int) -> None:
    num_images = max(1, gained + lost + rest)
    found, swapped = paired(gained, lost, num_images), paired(lost, gained, num_images)
    assert found.low <= found.difference <= found.high
    assert (found.low, found.high) == pytest.approx((-swapped.high, -swapped.low))
    assert found.p_value == pytest.approx(swapped.p_value)
    assert 0 < found.p_value <= 1


def test_equal_classifiers_are_not_told_apart() -> None:
    assert paired(0, 0, 10).p_value == 1 and not paired(5, 5, 100).decided
    assert paired(0, 6, 100).decided and not paired(0, 5, 100).decided  # 2 / 64 and 2 / 32


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(60, [0.08, 0.15, 0.77], size=2000)
    inside = [found.low <= -7 <= found.high for found in (paired(int(a), int(b), 60) for a, b, _ in counts)]
    assert 0.93 < np.mean(inside) < 0.985
