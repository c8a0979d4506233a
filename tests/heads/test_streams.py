import numpy as np
import torch

from fixify.heads.streams import Purpose, gaussian, raw, sign_bits


def test_raw_is_philox_4x64_10():
    # A direct evaluation of the published rounds. NumPy counts before it draws, so the first block is of counter 1.
    key, counter = [7, int(Purpose.GAUSSIAN)], [1, 0, 5, 0]
    mask = (1 << 64) - 1
    for _ in range(10):
        low0, low1 = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [(low1 >> 64) ^ counter[1] ^ key[0], low1 & mask, (low0 >> 64) ^ counter[3] ^ key[1], low0 & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    assert raw(7, Purpose.GAUSSIAN, 5, 4).tolist() == counter


def test_streams_differ_in_seed_purpose_and_index():
    streams = [raw(s, p, i, 4).tolist() for s in (0, 1, 2**64 - 1) for p in Purpose for i in (0, 1, 65_535)]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_a_longer_read_begins_with_the_shorter():
    assert np.array_equal(raw(3, Purpose.SKETCH, 0, 100)[:7], raw(3, Purpose.SKETCH, 0, 7))
    assert np.array_equal(sign_bits(3, Purpose.SKETCH, 0, 1000)[:70], sign_bits(3, Purpose.SKETCH, 0, 70))


def test_sign_bits_are_fair():
    bits = sign_bits(1, Purpose.BLOCK_SIGNS, 1, 100_000)
    assert set(np.unique(bits)) == {0, 1}
    assert abs(bits.mean() - 0.5) < 0.01


def test_gaussian_moments_and_shape():
    values = gaussian(0, Purpose.GAUSSIAN, 0, (501, 201))
    assert values.shape == (501, 201)
    assert values.dtype == np.float64
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.1


def test_global_random_states_are_untouched():
    before_numpy, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    gaussian(0, Purpose.GAUSSIAN, 0, (10,))
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before_torch, torch.get_rng_state())
