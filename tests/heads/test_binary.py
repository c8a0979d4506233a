"""Heads of signs: chosen well, stored packed, multiplied right, told apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, codebook, encode, transform
from fixify.heads.binary import GAIN_STEPS, rotation
from fixify.heads.packed import PackedLinear, unpack


def spec_of(n: int, c: int, bits: int, **options) -> HeadSpec:
    return HeadSpec("binary", n, c, bits_per_class=bits, gains=True, normalize=False, **options)


def head_of(spec: HeadSpec, vectors: torch.Tensor, **options) -> FixedClassifier:
    found = encode(spec, vectors, **options)
    return FixedClassifier(
        spec, codes=torch.from_numpy(found.codes), gains=torch.from_numpy(found.gains), scale=found.scale
    )


def vectors_of(c: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(c, n, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([4, 12, 20, 22, 64]), st.integers(2, 40), st.data())
def test_logits_are_those_of_the_codebook(n, c, data):
    c = min(c, 2**n)
    bits = n if n == 22 else data.draw(st.integers((c - 1).bit_length(), n))
    head = head_of(spec_of(n, c, bits), vectors_of(c, n))
    x = vectors_of(5, n, 1)
    q = head.codebook()
    assert q.norm(dim=1).numpy() == pytest.approx(head.gains.numpy() / GAIN_STEPS, abs=1e-5)
    torch.testing.assert_close(head(x), head.scale * x @ q.T, rtol=1e-4, atol=1e-5)


def test_without_features_the_signs_are_those_of_the_vectors():
    vectors = vectors_of(30, 22)  # no Hadamard matrix: no rotation
    found = encode(spec_of(22, 30, 22), vectors)
    centered = vectors - vectors.mean(dim=0)
    signs = torch.from_numpy(1 - 2 * np.unpackbits(found.codes, axis=1, count=22).astype(np.int8))
    assert torch.equal(signs.float(), centered.sign())
    # the best length of a code is the mean absolute weight; scale and gains say the same
    lengths = torch.from_numpy(found.gains).float() / GAIN_STEPS * found.scale / 22**0.5
    torch.testing.assert_close(lengths, centered.abs().mean(dim=1), rtol=5e-3, atol=5e-3)


def test_features_that_vary_in_few_directions_are_heeded():
    """The error that features see is a fraction of that of plain signs."""
    n, c = 64, 50
    vectors = vectors_of(c, n) - vectors_of(c, n).mean(dim=0)
    mix = vectors_of(n, n, 5) @ torch.diag(torch.logspace(0, -2, n))
    moment = mix @ mix.T

    def lost(head: FixedClassifier) -> float:
        difference = vectors - head.scale.detach() * head.codebook()
        return float(((difference @ moment) * difference).sum())

    heeded = lost(head_of(spec_of(n, c, n), vectors, feature_moment=moment))
    assert heeded < 0.4 * lost(head_of(spec_of(n, c, n), vectors))
    total = float(((vectors @ moment) * vectors).sum())
    assert heeded < 0.2 * total


def test_more_bits_are_nearer():
    vectors, moment = vectors_of(200, 64), torch.diag(torch.logspace(0, -3, 64))
    x = vectors_of(500, 64, 2) @ moment.sqrt()
    old = x @ (vectors - vectors.mean(dim=0)).T
    errors = []
    for bits in (8, 16, 32, 64):
        head = head_of(spec_of(64, 200, bits), vectors, feature_moment=moment)
        errors.append(float((head(x).detach() - old).square().mean() / old.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2


def test_equal_classes_get_different_signs():
    vectors = torch.cat((torch.ones(20, 16), -torch.ones(3, 16)))
    found = encode(spec_of(16, 23, 5), vectors)
    assert len({code.tobytes() for code in found.codes}) == 23
    with pytest.raises(HeadSpecError, match="cannot be told apart"):
        encode(spec_of(16, 3, 5), torch.ones(3, 16))
    same = np.zeros((3, 1), np.uint8)
    with pytest.raises(HeadSpecError, match="Classes 0 and 1 have the same signs"):
        spec_of(16, 3, 5).resolve(same)


def test_rotation_is_orthonormal_and_seeded():
    first, second = rotation(spec_of(20, 9, 12)), rotation(spec_of(20, 9, 12, seed=1))
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first.T @ first, np.eye(12), atol=1e-6)
    assert not np.array_equal(first, second)
    assert rotation(spec_of(22, 9, 22)) is None


def test_state_dict_round_trip_and_digest():
    spec = spec_of(64, 30, 24)
    head = head_of(spec, vectors_of(30, 64))
    state = head.state_dict()
    assert state["codes"].dtype == state["gains"].dtype == torch.uint8
    assert state["codes"].shape == (30, 3)
    again = FixedClassifier(HeadSpec.from_dict(head.spec.to_dict()))
    with pytest.raises(HeadSpecError, match="not been loaded"):
        again(torch.zeros(1, 64))
    again.load_state_dict(state)
    x = vectors_of(4, 64, 3)
    assert torch.equal(again(x), head(x))
    state["codes"] = state["codes"].clone()
    state["codes"][0, 0] ^= 1
    with pytest.raises(CodebookMismatchError, match="stored signs are not"):
        again.load_state_dict(state)


def test_packed_product_is_the_product(monkeypatch):
    """Many classes are never unpacked at once; gradients are the same."""
    head = head_of(spec_of(64, 200, 40), vectors_of(200, 64))
    x = vectors_of(6, 64, 1).requires_grad_()
    logits = head(x)
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    monkeypatch.setattr(transform, "_MAX_UNPACKED", 0)
    monkeypatch.setattr("fixify.heads.packed._CHUNK", 40 * 33)
    packed = FixedClassifier(head.spec, codes=head.codes, gains=head.gains, scale=head.scale.item())
    assert packed.product.table is None
    torch.testing.assert_close(packed(x), logits)
    torch.testing.assert_close(torch.autograd.grad(packed(x).square().sum(), x)[0], grad, rtol=1e-4, atol=1e-3)
    assert packed.half().product.packed.dtype == torch.uint8
    assert packed(x.half()).dtype == torch.float16


def test_packed_gradient_is_right():
    packed = torch.randint(0, 256, (7, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = vectors_of(3, 13).double().requires_grad_()
    expected = z @ unpack(packed, 13, torch.float64).T
    assert torch.equal(PackedLinear.apply(z, packed), expected)
    grads = [torch.autograd.grad(f(z).sin().sum(), z)[0] for f in (
        lambda z: PackedLinear.apply(z, packed), lambda z: z @ unpack(packed, 13, torch.float64).T
    )]  # fmt: skip
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    spec = spec_of(64, 30, 24)
    with pytest.raises(HeadSpecError, match="needs its stored signs"):
        codebook(spec)
    with pytest.raises(HeadSpecError, match=r"Expected packed signs uint8 \[30, 3\]"):
        codebook(spec, np.zeros((30, 4), np.uint8))
    with pytest.raises(HeadSpecError, match="unused bits"):
        codebook(dataclasses.replace(spec, bits_per_class=20), np.full((30, 3), 255, np.uint8))
    with pytest.raises(HeadSpecError, match="must be finite"):
        encode(spec, torch.full((30, 64), torch.nan))
    with pytest.raises(HeadSpecError, match="feature moment"):
        encode(spec, vectors_of(30, 64), feature_moment=torch.eye(3))
    with pytest.raises(HeadSpecError, match="gains must be uint8"):
        FixedClassifier(HeadSpec("hadamard", 64, 5), gains=torch.zeros(5, dtype=torch.uint8))


def test_meta_and_to_empty():
    spec = spec_of(64, 30, 24)
    with torch.device("meta"):
        head = FixedClassifier(spec)
    assert head.codes.is_meta
    real = head_of(spec, vectors_of(30, 64))
    head = head.to_empty(device="cpu")
    head.load_state_dict(real.state_dict())
    x = vectors_of(2, 64)
    torch.testing.assert_close(head(x), real(x))


def test_two_hundred_thousand_classes_are_never_unpacked_at_once(monkeypatch):
    """Forward and backward hold a chunk of the signs as numbers, not the 200,000 x 96 of them (77 MB)."""
    c, n, bits = 200_000, 256, 96
    packed = torch.randint(0, 256, (c, bits // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head = FixedClassifier(
        HeadSpec("binary", n, c, bits_per_class=bits, gains=True, normalize=False, bias=False), codes=packed
    )
    assert sum(table.numel() * table.element_size() for table in head.buffers()) < 3 * c * bits // 8
    sizes = []

    def recording(part, num_signs, dtype):
        signs = unpack(part, num_signs, dtype)
        sizes.append(len(signs))
        return signs

    monkeypatch.setattr("fixify.heads.packed.unpack", recording)
    x = vectors_of(2, n).requires_grad_()
    logits = head(x)
    assert logits.shape == (2, c)
    assert sum(sizes) == c
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    assert sum(sizes) == 2 * c
    assert max(sizes) * bits <= 1 << 22 < c * bits
    # A few classes by hand, and the gradient of all of them through the codes.
    signs = unpack(packed, bits, torch.float32)
    z = x.detach() @ torch.from_numpy(rotation(head.spec)) * head.scale.detach() * bits**-0.5
    torch.testing.assert_close(logits.detach(), z @ signs.T, rtol=1e-4, atol=1e-3)
    back = (2 * logits.detach() @ signs) * head.scale.detach() * bits**-0.5
    expected = back @ torch.from_numpy(rotation(head.spec)).T
    assert (grad - expected).norm() < 1e-4 * expected.norm()
