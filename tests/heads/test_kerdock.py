import numpy as np
import pytest

from fixify.heads import hadamard
from fixify.heads.kerdock import has_kerdock_set, kerdock_bits


def largest_deviation(n, blocks, num_rows=None):
    """Largest | |<row of H D_a, row of H D_b>| - sqrt(n) | over all pairs of the given blocks; exact.

    Over all rows, or a few rows of the one against all of the other.
    """
    matrix = hadamard(n).astype(np.float32)
    signs = 1 - 2 * np.concatenate([kerdock_bits(n, b, b + 1) for b in blocks]).astype(np.float32)
    return max(
        np.abs(np.abs((matrix[:num_rows] * (signs[i] * signs[j])) @ matrix.T) - n**0.5).max()
        for i in range(len(blocks))
        for j in range(i)
    )


@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_every_pair_of_blocks_meets_at_exactly_one_over_sqrt_n(n):
    assert largest_deviation(n, range(n // 2)) == 0


@pytest.mark.parametrize("n", [1024, 4096])
def test_sampled_pairs_of_large_sets(n):
    blocks = np.random.default_rng(0).choice(n // 2, 6, replace=False)
    assert largest_deviation(n, [0, *blocks.tolist()], num_rows=64) == 0


def test_first_vector_is_all_plus():
    assert not kerdock_bits(256, 0, 1).any()


def test_a_range_is_part_of_the_whole():
    assert np.array_equal(kerdock_bits(64, 3, 9), kerdock_bits(64, 0, 32)[3:9])


def test_only_powers_of_four_have_a_set():
    assert [n for n in range(1, 5000) if has_kerdock_set(n)] == [4, 16, 64, 256, 1024, 4096]
