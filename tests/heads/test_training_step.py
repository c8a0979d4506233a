import numpy as np
import pytest
import torch

from fixify.heads import FixedClassifier, HeadSpec, training_step
from fixify.heads.normalisation import NORM_EPSILON
from fixify.heads.training_step import OneBlockLogits, logits_one_by_one

N = 48
BOTH = torch.arange(30) // 2 + 2 * N * 3 + N * (torch.arange(30) % 2)
"""Code indices of rows and their negatives, of the fourth block, whose features are multiplied with signs first."""
HEADS = {
    "in order": HeadSpec("hadamard", N, 30, standardize=True),
    "all rows": HeadSpec("hadamard", N, N, bias=False, standardize="center"),
    "matched": HeadSpec("hadamard", N, 30, matched=True, blocks=4, standardize=True),
    "matched, plain": HeadSpec("hadamard", N, 30, matched=True, blocks=4, bias=False),
}


def arguments(name, draw, dtype=torch.float64, monkeypatch=None):
    """Build the arguments of `OneBlockLogits` for 5 samples."""
    monkeypatch.setattr("fixify.heads.product.prefers_dense", lambda *_: False)
    spec = HEADS[name]
    head = FixedClassifier(spec, codes=BOTH if spec.matched else None).to(dtype)
    block = head.product.one_block()
    assert block is not None
    x = draw(5, N, dtype=dtype).requires_grad_()
    bias = draw(spec.num_classes, seed=1, dtype=dtype).requires_grad_() if spec.bias else None
    mean = draw(N, seed=2, dtype=dtype) if spec.standardize else None
    std = draw(N, seed=3, dtype=dtype).abs() + 0.5 if spec.standardize is True else None
    return x, torch.tensor(2.5, dtype=dtype, requires_grad=True), bias, mean, std, block


@pytest.mark.parametrize("name", HEADS)
def test_logits_and_gradients_are_those_of_single_operations(name, draw, monkeypatch):
    given = arguments(name, draw, monkeypatch=monkeypatch)
    wanted = [each for each in given[:3] if each is not None]
    found = []
    for function in (OneBlockLogits.apply, logits_one_by_one):
        logits = function(*given)
        upstream = draw(*logits.shape, seed=4, dtype=torch.float64)
        found.append([logits, *torch.autograd.grad(logits, wanted, upstream)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_and_their_gradients(name, draw, monkeypatch):
    x, scale, bias, *rest = arguments(name, draw, monkeypatch=monkeypatch)

    def logits(x, scale, *bias):
        return OneBlockLogits.apply(x, scale, *(bias or (None,)), *rest)

    inputs = (x, scale) if bias is None else (x, scale, bias)
    assert torch.autograd.gradcheck(logits, inputs)
    assert torch.autograd.gradgradcheck(logits, inputs)


@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed(needed, draw, monkeypatch):
    given = list(arguments("in order", draw, monkeypatch=monkeypatch))
    for i in range(3):
        given[i] = given[i].detach().requires_grad_(i == needed)
    OneBlockLogits.apply(*given).sum().backward()
    assert [each.grad is not None for each in given[:3]] == [i == needed for i in range(3)]


def test_features_shorter_than_the_smallest_norm(draw, monkeypatch):
    """They are divided by that norm, so their gradient has no part removed."""
    _, scale, bias, _, _, block = arguments("in order", draw, monkeypatch=monkeypatch)
    x = torch.zeros(2, N, dtype=torch.float64, requires_grad=True)
    given = x, scale, bias, None, None, block
    (ours,) = torch.autograd.grad(OneBlockLogits.apply(*given)[:, 3].sum(), x)
    (expected,) = torch.autograd.grad(logits_one_by_one(*given)[:, 3].sum(), x)
    torch.testing.assert_close(ours, expected)
    assert float(ours.detach().abs().max()) > 1 / NORM_EPSILON / N


def test_heads_use_it_where_they_can(draw, monkeypatch):
    calls = []
    apply = OneBlockLogits.apply
    monkeypatch.setattr(training_step.OneBlockLogits, "apply", lambda *given: calls.append(1) or apply(*given))
    head = FixedClassifier(HeadSpec("hadamard", 256, 256, standardize=True))
    x = draw(4, 256)
    first = head(x)
    assert len(calls) == 1 and head.num_batches_tracked == 1
    head.keeps_statistics = True
    torch.testing.assert_close(head(x), head.product(head.scaled_features(x)) + head.bias, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 and head.num_batches_tracked == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    FixedClassifier(HeadSpec("hadamard", 256, 600, standardize=True))(x)
    torch.func.vmap(head)(x)
    assert len(calls) == 2
    assert head(x[:0]).shape == (0, 256) and head(draw(2, 3, 256)).shape == (2, 3, 256)
    assert first.requires_grad and np.isfinite(first.detach().numpy()).all()
