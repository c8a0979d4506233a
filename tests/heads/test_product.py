import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import HeadSpecError
from fixify.heads import HeadSpec, codebook
from fixify.heads import product as module
from fixify.heads.constructions import factorise, format_construction, order_of, parse_construction
from fixify.heads.kinds import default_codes
from fixify.heads.product import CodeProduct, balanced_split, prefers_dense

SIZES = [
    (n, c) for n in (1, 2, 4, 12, 20, 28, 36, 64, 96, 256, 320) for c in (1, n - 1, n, n + 1, 2 * n, 2 * n + 3, 5 * n)
]
SIZES += [(1280, 1000), (1280, 2570), (2048, 1000), (2048, 4200), (4920, 50)]
SIZES = sorted({(n, c) for n, c in SIZES if 0 < c <= 2 ** min(n, 30) and (n, c) != (4, 20)})


@pytest.fixture(params=[True, False], ids=["dense", "fast"])
def path(request, monkeypatch):
    """Each of the two ways of computing the same product, whatever the size."""
    monkeypatch.setattr(module, "prefers_dense", lambda *_: request.param)
    return request.param


def matched_codes(n, c, blocks, seed=0):
    generator = np.random.default_rng(seed)
    return generator.choice(2 * n * blocks, c, replace=False)


def product_and_book(n, c, blocks=None, dtype=torch.float64):
    """The product, and the codebook times what the product leaves to its caller."""
    codes = None if blocks is None else matched_codes(n, c, blocks)
    spec = HeadSpec("hadamard", n, c, matched=blocks is not None, blocks=blocks).resolve(codes)
    product = CodeProduct(spec, codes, dtype=dtype)
    # from the signs, which are exact, rather than from the float32 codebook
    book = torch.from_numpy(np.sign(codebook(spec, codes))).to(dtype) * n**-0.5 / product.prescale
    return product, book


@pytest.fixture(scope="module")
def features(draw):
    return functools.partial(draw, dtype=torch.float64)


MATCHED_SIZES = [(20, 15, 1), (20, 40, 5), (64, 700, 9), (256, 300, 4), (320, 700, 3), (256, 9, 4096)]


@pytest.mark.parametrize(("n", "c", "blocks"), [(n, c, None) for n, c in SIZES] + MATCHED_SIZES)
def test_value_and_gradient_are_those_of_the_codebook(path, features, n, c, blocks):
    product, book = product_and_book(n, c, blocks)
    x = features(3, n).requires_grad_()
    weights = features(3, c, seed=1)
    (gradient,) = torch.autograd.grad((product(x) * weights).sum(), x)
    torch.testing.assert_close(product(x), x @ book.T, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(gradient, weights @ book, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    ("n", "c", "blocks"), [(12, 5, None), (12, 12, None), (12, 17, None), (12, 50, None), (12, 20, 4)]
)
def test_gradcheck(path, features, n, c, blocks):
    product, _ = product_and_book(n, c, blocks)
    x = features(2, n).requires_grad_()
    assert torch.autograd.gradcheck(product, (x,))
    assert torch.autograd.gradgradcheck(product, (x,))


@pytest.mark.parametrize(("n", "c", "blocks"), [(n, c, None) for n, c in SIZES if n > 8] + MATCHED_SIZES)
@pytest.mark.parametrize("size", [1, 130, 1 << 20])
def test_blocks_hold_every_class_once(path, features, n, c, blocks, size):
    product, book = product_and_book(n, c, blocks)
    x = features(3, n)
    parts = product.blocks(size)
    logits = torch.full((3, c), torch.nan, dtype=torch.float64)
    for part in parts:
        scores = product.block_product(product.rotate(x), part)
        assert scores.shape == (3, part.num_classes)
        assert logits[:, part.classes].isnan().all()
        logits[:, part.classes] = scores
    torch.testing.assert_close(logits, x @ book.T, rtol=1e-12, atol=1e-11)
    assert len(parts) > 1 or size >= c or c <= 2 * n or blocks is not None


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([16, 48, 64, 80, 144]), st.integers(1, 600), st.lists(st.integers(0, 3), max_size=3))
def test_any_leading_dimensions(features, n, c, lead):
    product, book = product_and_book(n, c)
    x = features(*lead, n)
    assert product(x).shape == (*lead, c)
    torch.testing.assert_close(product(x), x @ book.T, rtol=1e-12, atol=1e-11)


def test_tables_are_exact_in_every_type():
    for n in (20, 256, 1280, 2048, 4096):
        spec = HeadSpec("hadamard", n, n)
        wide = CodeProduct(spec, dtype=torch.float64)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            narrow = CodeProduct(spec, dtype=dtype)
            for name in ("left", "right"):
                a, b = getattr(wide, name), getattr(narrow, name)
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b.double())


# An error no larger than a few times that of rounding the dense product's own inputs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [256, 1280, 2048])
def test_error_is_that_of_the_dense_product(n, dtype, path, features):
    product, book = product_and_book(n, n, dtype=dtype)
    x = torch.nn.functional.normalize(features(8, n), dim=-1)
    exact = x @ book.double().T
    ours = (product(x.to(dtype)).double() - exact).abs().max()
    naive = ((x.to(dtype) @ book.to(dtype).T).double() - exact).abs().max()
    assert ours <= 3 * naive


def test_splits_are_balanced():
    def orders(n):
        left, right = balanced_split(factorise(n))
        return order_of(left), order_of(right)

    assert orders(1) == (1, 1)
    assert orders(2048) == (32, 64)
    assert orders(1280) == (32, 40)
    assert orders(36) == (1, 36)
    construction = parse_construction("paley1-12*paley1-20", 240)
    left, right = balanced_split(construction)
    assert format_construction(left) == "paley1-12"
    assert format_construction(right) == "paley1-20"


def test_dense_is_chosen_where_the_factors_are_degenerate_or_the_head_small():
    assert not prefers_dense(1000, 1, 32, 64)
    assert prefers_dense(1000, 1, 1, 4920)
    assert prefers_dense(10, 1, 8, 8)
    assert prefers_dense(2350, 4096, 16, 16)


def test_only_blocks_that_are_used_are_multiplied(monkeypatch):
    monkeypatch.setattr(module, "prefers_dense", lambda *_: False)
    spec = HeadSpec("hadamard", 64, 50, matched=True, blocks=64)
    codes = 2 * 64 * 17 + np.arange(50)
    product = CodeProduct(spec.resolve(codes), codes)
    assert product.block_signs.shape == (1, 64)


def test_unknown_codes_are_refused_at_the_first_use():
    product = CodeProduct(HeadSpec("hadamard", 64, 50, matched=True, blocks=64))
    with pytest.raises(HeadSpecError, match="have not been loaded yet"):
        product(torch.zeros(1, 64))


def test_a_meta_product_gets_its_tables_when_it_gets_memory(path, features):
    meta = CodeProduct(HeadSpec("hadamard", 64, 100).resolve(), device="meta")
    assert all(table.is_meta for table in meta.buffers())
    real = CodeProduct(HeadSpec("hadamard", 64, 100).resolve())
    x = features(2, 64, dtype=torch.float32)
    assert torch.equal(meta.to_empty(device="cpu")(x), real(x))


def test_matched_codes_in_class_order_need_no_index(path, features):
    """The scores already are in class order, as those of a head that is not matched."""
    spec = HeadSpec("hadamard", 64, 50, matched=True, blocks=1)
    matched = CodeProduct(spec, default_codes(64, 50))
    assert matched.index is None
    x = features(3, 64, dtype=torch.float32)
    assert torch.equal(matched(x), CodeProduct(HeadSpec("hadamard", 64, 50))(x))


# --- Identity


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 100), st.lists(st.integers(0, 3), max_size=3), st.data())
def test_identity_is_a_slice_without_tables(features, n, lead, data):
    c = data.draw(st.integers(1, n))
    product = CodeProduct(HeadSpec("identity", n, c), dtype=torch.float64)
    assert not list(product.buffers()) and product.prescale == 1
    x = features(*lead, n)
    assert torch.equal(product(x), x[..., :c])
    torch.testing.assert_close(product(x), x @ torch.from_numpy(codebook(product.spec)).double().T)


@pytest.mark.parametrize(("n", "c"), [(64, 100), (64, 128), (64, 700), (96, 96 * 6), (20, 33)])
@pytest.mark.parametrize("size", [1, 300, 10**6])
def test_pairs_of_codes_give_the_scores_and_gradients_of_their_blocks(n, c, size, draw, monkeypatch):
    monkeypatch.setattr(module, "prefers_dense", lambda *_: False)
    product = CodeProduct(HeadSpec("hadamard", n, c).resolve(), dtype=torch.float64)
    assert product.has_pairs
    z = draw(3, n, dtype=torch.float64).requires_grad_()
    memory = torch.empty(2 * 3 * (c + 2 * n), dtype=torch.float64)
    for block in product.blocks(size):
        expected = product.block_product(z, block)
        scores, spare = product.pair_scores(z.detach(), block, memory)
        assert scores.shape == spare.shape and scores.data_ptr() != spare.data_ptr()
        of_pairs = torch.stack((scores, -scores), dim=2).view(3, -1)[:, : block.num_classes]
        torch.testing.assert_close(of_pairs, expected.detach())
        grad = draw(3, block.num_classes, dtype=torch.float64, seed=2)
        whole = torch.nn.functional.pad(grad, (0, 2 * scores[0].numel() - block.num_classes)).view(3, -1, 2, n)
        found = product.pair_gradient((whole[:, :, 0] - whole[:, :, 1]).contiguous(), torch.empty_like(spare), block)
        torch.testing.assert_close(found, torch.autograd.grad(expected, z, grad)[0])


@pytest.mark.parametrize(
    "spec", [HeadSpec("hadamard", 96, 96), HeadSpec("orthogonal", 30, 70), HeadSpec("identity", 9, 9)], ids=str
)
def test_other_codes_have_no_pairs(spec):
    assert not CodeProduct(spec.resolve()).has_pairs
