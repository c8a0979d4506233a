"""Random streams are distinct and do not depend on versions."""

import numpy as np
import pytest

from fixify.data.sampler import BatchSampler, Shard
from fixify.data.seeding import Stream, derive_seed, derive_seeds, permutation


@pytest.mark.parametrize("seed", [0, 3])
def test_streams_are_distinct(seed: int) -> None:
    """They also differ when one has an additional part, which begins at zero."""
    drawn = {stream: {derive_seed(seed, 0, stream), derive_seed(seed, 0, stream, 0)} for stream in Stream}
    assert len(set.union(*drawn.values())) == len(drawn)
    orders = [permutation(seed, 0, stream, count=50).tolist() for stream in Stream]
    assert len({tuple(order) for order in orders}) == len(Stream)


def test_erasing_does_not_begin_with_the_seed_of_the_first_weights() -> None:
    keys = BatchSampler(20, 4, training=True, seed=3, even=False, shard=Shard())
    assert derive_seed(3, 0, Stream.INIT) not in keys.erasing_seeds(0)


def test_seeds_do_not_depend_on_numpys_version() -> None:
    assert derive_seed(1, 2, Stream.IMAGES) == 830043460
    np.testing.assert_array_equal(derive_seeds(1, 2, Stream.ORDER, count=2), [1596810411, 3615836353])
    np.testing.assert_array_equal(permutation(1, 2, Stream.INIT, count=6), [3, 5, 0, 1, 2, 4])


def test_a_copy_has_the_seeds_of_its_epoch_in_order_and_in_any_shard() -> None:
    def keys(copy: int | None, shard: Shard = Shard()) -> list[tuple[int, int]]:  # noqa: B008
        sampler = BatchSampler(5, 2, training=False, seed=3, even=False, shard=shard, copy=copy)
        return [key for batch in sampler for key in batch]

    seeds = derive_seeds(3, 1, Stream.IMAGES, count=5).tolist()
    assert keys(1) == list(enumerate(seeds)) and keys(None) == [(index, 0) for index in range(5)]
    assert sorted(keys(1, Shard(0, 2)) + keys(1, Shard(1, 2))) == keys(1) != keys(2)
