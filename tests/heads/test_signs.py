import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.heads import signs as module
from fixify.heads.codes import unpacked_levels
from fixify.heads.levels import LEVELS, SIGNS
from fixify.heads.signs import (
    PackedLinear,
    pack_levels,
    packed_product,
    sign_planes,
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


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("m", [0, 1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_unpacked_signs(m, held, dtype, draw, monkeypatch):
    monkeypatch.setattr(module, "SMALL_TABLE", 50 * 30 if held else 0)
    monkeypatch.setattr(module, "_CACHED_FLOATS", 30 * 7)  # several chunks
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


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEVELS.values(), ids=lambda kind: f"{kind.bits:g} bits")
def test_products_with_levels_are_exact(kind, dtype, held, draw, monkeypatch):
    monkeypatch.setattr(module, "SMALL_TABLE", 50 * 33 if held else 0)
    monkeypatch.setattr(module, "_CACHED_FLOATS", 33 * 7)  # several chunks
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


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RATES), st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_levels_are_weighted_sums_of_signs(kind, c, d, seed):
    levels = draw_levels(kind, c, d, seed)
    planes = sign_planes(pack_levels(levels, kind), d, kind)
    assert planes.packed.shape == (c, len(planes.weights) * -(-d // 8))
    parts = torch.from_numpy(planes.packed).tensor_split(len(planes.weights), dim=1)
    total = sum(w * unpack_signs(part, d, torch.float32) for w, part in zip(planes.weights, parts, strict=True))
    assert np.array_equal(total.numpy(), levels)
