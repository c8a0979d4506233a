import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import HeadSpecError
from fixify.heads import hadamard, is_constructible
from fixify.heads.matrices import (
    MAX_ORDER,
    Factor,
    elementary,
    factor_matrix,
    factorise,
    format_construction,
    order_of,
    parse_construction,
    rows,
)

TIMM_WIDTHS = json.loads((Path(__file__).parent / "timm_widths.json").read_text())["widths"]
CONSTRUCTIBLE = [width for width in TIMM_WIDTHS if is_constructible(width)]


def assert_hadamard(matrix):
    """H H^T = n I in integers; the float32 product is exact, since all its partial sums are integers below 2^24."""
    n = len(matrix)
    assert matrix.dtype == np.int8
    assert matrix.shape == (n, n)
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.all(matrix[0] == 1)
    as_float = matrix.astype(np.float32)
    assert np.array_equal(as_float @ as_float.T, n * np.eye(n, dtype=np.float32))


def test_every_width_of_timm_but_six_is_constructible():
    assert [width for width in TIMM_WIDTHS if not is_constructible(width)] == [386, 584, 2022, 2042, 2152, 10444]


@pytest.mark.parametrize("n", [n for n in CONSTRUCTIBLE if n <= 2048])
def test_exact_at_every_width_of_timm(n):
    assert_hadamard(hadamard(n))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([n for n in CONSTRUCTIBLE if n > 2048]), st.integers(0, 2**32 - 1))
def test_sampled_rows_of_large_widths_are_orthogonal(n, seed):
    indices = np.random.default_rng(seed).choice(n, 64, replace=False)
    part = rows(factorise(n), indices).astype(np.float32)
    assert np.array_equal(part @ part.T, n * np.eye(64, dtype=np.float32))


@pytest.mark.parametrize(
    "n", [1, 2, 4, 8, 12, 20, 28, 36, 44, 52, 76, 100, 108, 132, 144, 148, 244, 252, 344, 400, 676]
)
def test_exact_at_orders_of_every_construction(n):
    assert_hadamard(hadamard(n))


# q = p^k with k > 1, where the arithmetic is that of a real extension field
@pytest.mark.parametrize(
    "factor",
    [Factor("paley1", q + 1) for q in (27, 243, 343)]
    + [Factor("paley2", 2 * (q + 1)) for q in (9, 25, 49, 81, 125, 625)],
    ids=str,
)
def test_paley_over_prime_powers(factor):
    assert_hadamard(factor_matrix(factor))


@given(st.integers(1, 3000))
@settings(deadline=None)
def test_factorise_agrees_with_is_constructible_and_round_trips(n):
    if not is_constructible(n):
        with pytest.raises(HeadSpecError, match=f"order {n} ") as error:
            factorise(n)
        assert "--head orthogonal" in (error.value.hint or "")
        return
    construction = factorise(n)
    assert order_of(construction) == order_of(elementary(construction)) == n
    assert parse_construction(format_construction(construction), n) == construction
    assert n in (1, 2) or n % 4 == 0  # no other orders exist


def test_known_constructions():
    assert format_construction(factorise(1280)) == "sylvester-64*paley1-20"
    assert format_construction(factorise(2048)) == "sylvester-2048"
    assert format_construction(factorise(36)) == "paley2-36"
    assert format_construction(factorise(240)) == "paley1-20*paley1-12"


def test_smallest_order_that_is_not_built_is_92():
    assert next(n for n in range(4, 1000, 4) if not is_constructible(n)) == 92


@pytest.mark.parametrize("n", [0, -4, 3, 6, 386, 2022, 2 * MAX_ORDER])
def test_impossible_orders_are_refused(n):
    assert not is_constructible(n)
    with pytest.raises(HeadSpecError):
        hadamard(n)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sylvester",
        "sylvester-64",
        "sylvester-64*paley1-20*sylvester-2",
        "sylvester-60*paley1-20",
        "paley1-640*sylvester-2",
        "paley2-1280",
        "sylvester-064*paley1-20",
        "sylvester-64 * paley1-20",
        "sylvester-64*paley3-20",
        "sylvester--64*paley1--20",
        "sylvester-1280.0",
        "sylvester-99999999999999999999",
        "sylvester-1*" * 100_000 + "sylvester-1280",
        "sylvester-٦٤*paley1-20",
    ],
)
def test_hostile_constructions_are_refused(text):
    with pytest.raises(HeadSpecError):
        parse_construction(text, 1280)


def test_rows_are_those_of_the_kronecker_product():
    construction = parse_construction("sylvester-8*paley1-12*paley2-36", 3456)
    whole = factor_matrix(construction[0])
    for factor in construction[1:]:
        whole = np.kron(whole, factor_matrix(factor))
    indices = np.array([0, 1, 3455, 17, 432])
    assert np.array_equal(rows(construction, indices), whole[indices])


def test_largest_order_costs_only_the_rows_asked_for():
    part = rows(factorise(MAX_ORDER), np.array([0, 1, MAX_ORDER - 1])).astype(np.int64)
    assert np.array_equal(part @ part.T, MAX_ORDER * np.eye(3, dtype=np.int64))
