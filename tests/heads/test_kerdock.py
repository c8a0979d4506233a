import itertools

import numpy as np
import pytest

from fixify.heads import hadamard
from fixify.heads.kerdock import has_kerdock_set, kerdock_bits


def signs(n, start, stop):
    return 1 - 2 * kerdock_bits(n, start, stop).astype(np.float32)


@pytest.mark.parametrize("n", [4, 16, 64])
def test_all_rows_of_every_pair_of_blocks_meet_at_exactly_one_over_sqrt_n(n):
    matrix = hadamard(n).astype(np.float32)
    for a, b in itertools.combinations(signs(n, 0, n // 2), 2):
        assert np.array_equal(np.abs((matrix * a) @ (matrix * b).T), np.full((n, n), n**0.5, dtype=np.float32))


# Rows r and s of Sylvester's matrix multiply to row r xor s, so the inner products of H D_a with H D_b are the Walsh
# transform of D_a D_b, each n times over.
@pytest.mark.parametrize(("n", "others"), [(256, range(128)), (1024, (0, 1, 100, 511)), (4096, (0, 2047))])
def test_every_vector_meets_others_at_exactly_one_over_sqrt_n(n, others):
    matrix, everyone = hadamard(n).astype(np.float32), signs(n, 0, min(n // 2, 512))
    for other in others:
        (vector,) = signs(n, other, other + 1)
        inner = np.abs((everyone * vector) @ matrix)
        same = np.arange(len(everyone)) == other
        assert np.array_equal(inner[~same], np.full((len(everyone) - same.sum(), n), n**0.5, dtype=np.float32))


def test_first_vector_is_all_plus():
    assert not kerdock_bits(256, 0, 1).any()


def test_a_range_is_part_of_the_whole():
    assert np.array_equal(kerdock_bits(64, 3, 9), kerdock_bits(64, 0, 32)[3:9])


def test_only_powers_of_four_have_a_set():
    assert [n for n in range(1, 5000) if has_kerdock_set(n)] == [4, 16, 64, 256, 1024, 4096]
