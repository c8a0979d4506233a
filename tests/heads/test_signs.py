import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.heads import signs as module
from fixify.heads.codes import unpacked_levels
from fixify.heads.levels import LEVELS, SIGNS
from fixify.heads.signs import (
    IntegerProduct,
    PackedLinear,
    chunked_product,
    has_fast_integers,
    pack_levels,
    pack_quads,
    packed_product,
    unpack_levels,
    unpack_signs,
)


def pack(c, d, seed=0):
    """Draw packed signs, uint8 [c, ceil(d / 8)], whose unused bits are 0."""
    bits = np.random.default_rng(seed).integers(0, 2, (c, d), dtype=np.uint8)
    return torch.from_numpy(np.packbits(bits, axis=1))


def test_value_and_gradient_are_those_of_the_unpacked_signs(draw, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3 * 13)  # chunks of three classes
    packed = pack(7, 13)
    z = draw(3, 13, dtype=torch.float64).requires_grad_()
    expected = z @ unpack_signs(packed, 13, torch.float64).T
    ours = PackedLinear.apply(z, packed, 13)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(logits.sin().sum(), z)[0] for logits in (ours, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)  # ours is summed in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_signs_are_unpacked_highest_bit_first(dtype):
    packed = pack(7, 13)
    expected = 1.0 - 2.0 * np.unpackbits(packed.numpy(), axis=1, count=13)
    unpacked = unpack_signs(packed, 13, dtype)
    assert unpacked.dtype == dtype
    assert np.array_equal(unpacked.float().numpy(), expected)
    traced = torch.compile(unpack_signs, backend="eager", fullgraph=True)(packed, 13, dtype)
    assert traced.dtype == dtype and torch.equal(traced, unpacked)


def test_quads_take_a_quarter_of_a_byte_per_sign():
    packed = pack(9, 21)
    quads, bits = pack_quads(packed, 21), unpack_signs(packed, 21, torch.int8) < 0
    assert quads.shape == (9, 6) and quads.dtype == torch.int8
    for i in range(4):
        wanted = bits[:, 6 * i : 6 * (i + 1)].char()
        assert torch.equal(quads[:, : wanted.shape[1]] >> i & 1, wanted)
    assert int(quads[:, 3:].max()) < 8


def integers(**sizes):
    """The product in integers, with other limits on what is held as bytes."""

    def product(z, packed, d):
        with pytest.MonkeyPatch.context() as patch:
            for name, size in sizes.items():
                patch.setattr(module, name, size)
            return IntegerProduct(packed, d, z.dtype)(z)

    return product


def products():
    """Every way of multiplying, as functions of z, packed signs and their number."""
    found = {"chunks": lambda z, packed, d: chunked_product(z, packed)}
    if has_fast_integers():
        found |= {
            "words with quads": integers(_BYTE_SIGNS=0, _WORDS_UP_TO=99),
            "words with bytes": integers(_WORDS_UP_TO=99),
            "digits with a table": integers(_BYTE_SIGNS=0, _WORDS_UP_TO=0, _FLOATS_BELOW=0),
            "digits with bytes": integers(_WORDS_UP_TO=0, _FLOATS_BELOW=0),
            "numbers": integers(_BYTE_SIGNS=0, _WORDS_UP_TO=0, _FLOATS_BELOW=9999, _SIGNS_PER_SAMPLE=9999),
        }
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", products())
@pytest.mark.parametrize(
    ("m", "c", "d"), [(1, 1, 64), (3, 40, 8), (1, 300, 64), (5, 70, 13), (33, 41, 200), (16, 900, 1280)]
)
def test_every_product_is_as_exact_as_the_dense_one(name, m, c, d, dtype, draw, monkeypatch):
    monkeypatch.setattr(module, "_CACHED_BYTES", 1 << 14)  # several chunks
    monkeypatch.setattr(module, "_CACHED_QUADS", 1 << 14)
    monkeypatch.setattr(module, "_CACHED_FLOATS", 1 << 12)
    packed = pack(c, d)
    z = draw(m, d)
    z[0] *= 1e-5
    exact = z.double() @ unpack_signs(packed, d, torch.float64).T
    weight = unpack_signs(packed, d, dtype)
    with torch.inference_mode():
        ours = products()[name](z.to(dtype), packed, d).to(dtype)
    error, naive = ((logits.double() - exact).abs() for logits in (ours, z.to(dtype) @ weight.T))
    for row in range(m):
        least = 2 * torch.finfo(dtype).eps * exact[row].abs().max()  # of rounding the result itself
        assert error[row].max() <= max(2 * naive[row].max(), least)


def test_zero_features_have_zero_scores():
    for product in products().values():
        assert torch.equal(product(torch.zeros(2, 24), pack(5, 24), 24), torch.zeros(2, 5))


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("byte_signs", [0, 1 << 22])
@pytest.mark.parametrize("m", [0, 1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_chosen_product_is_that_of_the_unpacked_signs(m, byte_signs, integers, dtype, draw, monkeypatch):
    monkeypatch.setattr(module, "_BYTE_SIGNS", byte_signs)
    if not integers:
        monkeypatch.setattr(module, "has_fast_integers", lambda: False)
    packed = pack(50, 30)
    z = draw(m, 30).to(dtype)
    product = packed_product(packed, 30, dtype)(z)
    assert product.dtype == dtype and product.shape == (m, 50)
    expected = z.double() @ unpack_signs(packed, 30, torch.float64).T
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=tolerance)


# --- Levels

RATES = [SIGNS, *LEVELS.values()]


def draw_levels(kind, c, d, seed=0):
    """Draw levels, int8 [c, d], every one of them."""
    drawn = np.random.default_rng(seed).choice(kind.values, (c, d)).astype(np.int8)
    drawn.flat[: len(kind.values)] = kind.values[: drawn.size]
    return drawn


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RATES), st.integers(1, 5), st.integers(1, 70), st.integers(0, 1000))
def test_packing_loses_nothing(kind, c, d, seed):
    levels = draw_levels(kind, c, d, seed)
    packed = pack_levels(levels, kind)
    assert packed.dtype == np.uint8 and packed.shape == (c, kind.num_bytes(d))
    assert np.array_equal(unpacked_levels(packed, d, kind), levels)
    tensor = torch.from_numpy(packed)
    for dtype in (torch.int8, torch.float32, torch.bfloat16):
        unpacked = unpack_levels(tensor, d, dtype, kind)
        assert unpacked.dtype == dtype and np.array_equal(unpacked.float().numpy(), levels)


@pytest.mark.parametrize("kind", RATES, ids=lambda kind: f"{kind.bits:g} bits")
def test_levels_are_unpacked_without_a_table_while_compiling(kind):
    packed = torch.from_numpy(pack_levels(draw_levels(kind, 6, 23), kind))
    traced = torch.compile(unpack_levels, backend="eager", fullgraph=True)(packed, 23, torch.float32, kind)
    assert torch.equal(traced, unpack_levels(packed, 23, torch.float32, kind))


@pytest.mark.parametrize(("bits", "size"), [(1.58, 26), (2, 32), (3, 48), (4, 64)])
def test_a_weight_takes_its_bits(bits, size):
    assert LEVELS[bits].num_bytes(128) == size


def test_signs_are_levels_of_one_bit():
    packed = pack(7, 13)
    assert np.array_equal(pack_levels(unpack_signs(packed, 13, torch.int8).numpy(), SIGNS), packed.numpy())


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("byte_levels", [0, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEVELS.values(), ids=lambda kind: f"{kind.bits:g} bits")
def test_products_with_levels_are_exact(kind, dtype, byte_levels, integers, draw, monkeypatch):
    monkeypatch.setattr(module, "_BYTE_LEVELS", byte_levels)
    monkeypatch.setattr(module, "_CACHED_BYTES", 1 << 9)  # several chunks
    if not integers:
        monkeypatch.setattr(module, "has_fast_integers", lambda: False)
    packed = torch.from_numpy(pack_levels(draw_levels(kind, 50, 33), kind))
    numbers = unpack_levels(packed, 33, torch.float64, kind)
    product = packed_product(packed, 33, dtype, kind)
    for m in (0, 1, 40):
        z = draw(m, 33).to(dtype)
        logits, expected = product(z), z.double() @ numbers.T
        assert logits.dtype == dtype and logits.shape == (m, 50)
        tolerance = {
            torch.float64: 1e-12,
            torch.float32: 1e-5 * kind.largest,
            torch.bfloat16: 0.01 * kind.largest * 33,
        }[dtype]
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", LEVELS.values(), ids=lambda kind: f"{kind.bits:g} bits")
def test_value_and_gradient_are_those_of_the_unpacked_levels(kind, draw, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3 * 13)  # chunks of three classes
    packed = torch.from_numpy(pack_levels(draw_levels(kind, 7, 13), kind))
    z = draw(3, 13, dtype=torch.float64).requires_grad_()
    expected = z @ unpack_levels(packed, 13, torch.float64, kind).T
    ours = PackedLinear.apply(z, packed, 13, kind)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(logits.sin().sum(), z)[0] for logits in (ours, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-4)  # ours is summed in float32


@pytest.mark.skipif(not has_fast_integers(), reason="this processor has no fast products of 8-bit integers")
@pytest.mark.parametrize("byte_signs", [0, 1 << 20])
@pytest.mark.parametrize("magnitude", [1e-20, 1e30])
@pytest.mark.parametrize("m", [1, 2, 9])
def test_features_of_any_size_are_multiplied(m, magnitude, byte_signs, draw, monkeypatch):
    monkeypatch.setattr(module, "_BYTE_SIGNS", byte_signs)
    packed = pack(50, 64)
    z = draw(m, 64) * magnitude
    exact = (z.double() @ unpack_signs(packed, 64, torch.float64).T) / magnitude
    product = IntegerProduct(packed, 64, torch.float32)
    assert (product(z).double() / magnitude - exact).abs().max() <= 1e-5
    scores, factor = product.of_one(z[0])
    assert (scores.double() * factor / magnitude - exact[0]).abs().max() <= 1e-5


@pytest.mark.skipif(not has_fast_integers(), reason="this processor has no fast products of 8-bit integers")
@pytest.mark.parametrize(("c", "bits"), [(50, 9), (51, 3)])
def test_few_signs_are_bytes_and_more_take_three_bits(c, bits, monkeypatch):
    monkeypatch.setattr(module, "_BYTE_SIGNS", 50 * 80)
    product = IntegerProduct(pack(c, 80), 80, torch.float32)
    held = sum(value.nbytes for value in vars(product).values() if isinstance(value, torch.Tensor))
    assert 8 * held == c * 80 * bits  # with the packed signs themselves


@pytest.mark.parametrize("integers", [True, False])
def test_few_signs_become_numbers_once_where_integers_are_slow(integers, draw, monkeypatch):
    monkeypatch.setattr(module, "has_fast_integers", lambda: integers)
    packed, z = pack(50, 30), draw(4, 30)
    product = packed_product(packed, 30, torch.float32)
    torch.testing.assert_close(product(z), z @ unpack_signs(packed, 30, torch.float32).T)
