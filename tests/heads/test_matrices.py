import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import HeadSpecError
from fixify.heads import hadamard, is_constructible
from fixify.heads.constructions import (
    MAX_ORDER,
    Factor,
    elementary,
    factorise,
    format_construction,
    has_kerdock_set,
    order_of,
    parse_construction,
)
from fixify.heads.matrices import block_bits, block_signs, factor_matrix, kerdock_bits, rows

WIDTHS = json.loads((Path(__file__).parent / "timm_widths.json").read_text())["widths"]
CONSTRUCTIBLE = [width for width in WIDTHS if is_constructible(width)]


def assert_hadamard(matrix):
    """H H^T = n I in integers; the float32 product is exact, since all its partial sums are integers below 2^24."""
    n = len(matrix)
    assert matrix.dtype == np.int8
    assert matrix.shape == (n, n)
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.all(matrix[0] == 1)
    as_float = matrix.astype(np.float32)
    assert np.array_equal(as_float @ as_float.T, n * np.eye(n, dtype=np.float32))


# --- Constructions


def test_every_width_of_timm_but_six_is_constructible():
    assert [width for width in WIDTHS if not is_constructible(width)] == [386, 584, 2022, 2042, 2152, 10444]


def test_every_factor_of_every_width_of_timm_is_exact():
    """A Kronecker product of exact factors is exact; `rows` is compared with it below."""
    factors = {factor for n in CONSTRUCTIBLE for factor in factorise(n) if factor.order <= 2048}
    assert len(factors) > 30
    for factor in factors:
        assert_hadamard(factor_matrix(factor))


def test_sampled_rows_of_every_width_of_timm_are_orthogonal():
    generator = np.random.default_rng(0)
    for n in CONSTRUCTIBLE:
        part = rows(factorise(n), generator.choice(n, min(n, 16), replace=False)).astype(np.float32)
        assert np.array_equal(part @ part.T, n * np.eye(len(part), dtype=np.float32))


@pytest.mark.parametrize(
    "n", [1, 2, 4, 8, 12, 20, 28, 36, 44, 52, 76, 100, 108, 132, 144, 148, 244, 252, 344, 400, 676, 768, 1280, 2048]
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


@pytest.mark.parametrize(
    ("n", "construction"),
    [
        (1280, "sylvester-64*paley1-20"),
        (2048, "sylvester-2048"),
        (36, "paley2-36"),
        (240, "paley1-20*paley1-12"),
    ],
)
def test_known_constructions(n, construction):
    assert format_construction(factorise(n)) == construction


def test_smallest_order_that_is_not_built_is_92():
    assert next(n for n in range(4, 1000, 4) if not is_constructible(n)) == 92


@pytest.mark.parametrize("n", [0, -4, 3, 6, 386, 2022, 2 * MAX_ORDER])
def test_impossible_orders_are_refused(n):
    assert not is_constructible(n)
    with pytest.raises(HeadSpecError, match=str(n)):
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


# --- Kerdock's set


def kerdock_signs(n, start, stop):
    return 1 - 2 * kerdock_bits(n, start, stop).astype(np.float32)


@pytest.mark.parametrize("n", [4, 16, 64])
def test_all_rows_of_every_pair_of_blocks_meet_at_exactly_one_over_sqrt_n(n):
    matrix = hadamard(n).astype(np.float32)
    for a, b in itertools.combinations(kerdock_signs(n, 0, n // 2), 2):
        assert np.array_equal(np.abs((matrix * a) @ (matrix * b).T), np.full((n, n), n**0.5, dtype=np.float32))


# Rows r and s of Sylvester's matrix multiply to row r xor s, so the inner products of H D_a with H D_b are the Walsh
# transform of D_a D_b, each n times over.
@pytest.mark.parametrize(("n", "others"), [(256, range(128)), (1024, (0, 1, 100, 511)), (4096, (2047,))])
def test_every_vector_meets_others_at_exactly_one_over_sqrt_n(n, others):
    matrix, everyone = hadamard(n).astype(np.float32), kerdock_signs(n, 0, min(n // 2, 256))
    for other in others:
        (vector,) = kerdock_signs(n, other, other + 1)
        inner = np.abs((everyone * vector) @ matrix)
        same = np.arange(len(everyone)) == other
        assert np.array_equal(inner[~same], np.full((len(everyone) - same.sum(), n), n**0.5, dtype=np.float32))


def test_a_range_of_the_set_is_part_of_the_whole_and_starts_with_all_plus():
    whole = kerdock_bits(64, 0, 32)
    assert not whole[0].any()
    assert np.array_equal(kerdock_bits(64, 3, 9), whole[3:9])


def test_only_powers_of_four_have_a_set():
    assert [n for n in range(1, 5000) if has_kerdock_set(n)] == [4, 16, 64, 256, 1024, 4096]


# --- Blocks


@pytest.mark.parametrize(("n", "first_seeded"), [(16, 8), (20, 1)])
def test_blocks_depend_on_matrix_seed_and_number_alone(n, first_seeded):
    """Block 0 is all plus; Kerdock's vectors, blocks 0 .. 7 at N = 16, do not depend on the seed."""
    construction = factorise(n)
    many = block_bits(construction, 0, np.arange(15))
    assert np.array_equal(block_bits(construction, 0, np.array([0, 3, 12])), many[[0, 3, 12]])
    assert not many[0].any()
    other = block_bits(construction, 1, np.arange(15))
    changed = [not np.array_equal(a, b) for a, b in zip(many, other, strict=True)]
    assert changed == [i >= first_seeded for i in range(15)]
    assert np.array_equal(block_signs(construction, 0, np.arange(15)), 1 - 2 * many.astype(np.float32))


def test_only_sylvesters_matrix_has_kerdock_blocks():
    construction = parse_construction("paley1-4*sylvester-4", 16)
    assert not np.array_equal(*(block_bits(construction, seed, np.array([1])) for seed in (0, 1)))
