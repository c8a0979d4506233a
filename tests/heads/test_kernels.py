"""The compiled forward pass, beside the formula."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.comparing.running import memory_bytes
from fixify.heads import FixedClassifier, HeadSpec, kernels, top_k
from fixify.heads import prepared as prepared_module
from fixify.heads.levels import LEVELS, SIGNS
from fixify.heads.signs import pack_levels

pytestmark = pytest.mark.skipif(not kernels.is_compiled(), reason="fixify was installed without a C compiler")
BATCHES = (0, 1, 2, 3, 16, 17, 33, 64, 65, 130)


@pytest.fixture(params=["avx512", "avx2", "base"])
def instructions(request, monkeypatch):
    """Use the library for each instruction set that the processor has."""
    order = ["base", "avx2", "avx512"]
    if order.index(request.param) > order.index(kernels.instruction_set()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(kernels, "instruction_set", lambda: request.param)
    kernels.library.cache_clear()
    yield request.param
    monkeypatch.undo()
    kernels.library.cache_clear()


def spec_of(kind, n, c, **fields):
    """Make the spec of a head with as many signs as features, if any."""
    return HeadSpec(kind, n, c, bits_per_class=n if kind == "binary" else None, **fields)


def drawn_codes(spec, seed=0):
    """Draw what a spec stores."""
    random = np.random.default_rng(seed)
    if spec.matched:
        rows = random.choice(2 * spec.num_features * (spec.blocks or 1), spec.num_classes, replace=False)
        return torch.from_numpy(rows)
    if spec.kind != "binary":
        return None
    kind = SIGNS if spec.bits_per_weight is None else LEVELS[spec.bits_per_weight]
    count = spec.bits_per_class or spec.num_features
    return torch.from_numpy(pack_levels(random.choice(kind.values, (spec.num_classes, count)), kind))


def make(spec, seed=0):
    """Build a head with drawn codes, bias, statistics and row scales, in eval mode."""
    head = FixedClassifier(spec, codes=drawn_codes(spec, seed)).eval()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (head.bias, head.center):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=drawn))
        if head.spread is not None:
            head.spread.copy_(torch.rand(head.spread.shape, generator=drawn) + 0.5)
        if head.gains is not None:
            head.gains.copy_(torch.randint(100, 256, head.gains.shape, generator=drawn))
    return head


def check(head, batch, seed=0):
    """Compare with the formula in float64."""
    x = torch.randn(batch, head.in_features, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = head(x)
    exact = copy.deepcopy(head).double()(x.double()).detach()
    assert logits.shape == exact.shape and logits.dtype == torch.float32
    if batch:
        assert (logits - exact).abs().max() <= 4e-6 * exact.abs().max()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("hadamard", 640, 600, standardize=True),
        HeadSpec("hadamard", 256, 256, bias=False),
        HeadSpec("hadamard", 192, 800, standardize="center", gains=True),
        HeadSpec("hadamard", 320, 1000, matched=True, blocks=3),
        HeadSpec("hadamard", 320, 300, matched=True, blocks=1, normalize=False),
        HeadSpec("binary", 320, 300, bits_per_class=320, standardize=True, normalize=False),
        HeadSpec("binary", 320, 1100, bits_per_class=100, gains=True),
        HeadSpec("binary", 320, 70, bits_per_class=13, bias=False),
        HeadSpec("binary", 100, 90, bits_per_weight=1.58, gains=True),
        HeadSpec("binary", 100, 90, bits_per_weight=4, gains=True, standardize="center"),
    ],
    ids=lambda spec: f"{spec.kind}-{spec.num_features}-{spec.num_classes}",
)
def test_logits_are_those_of_the_formula(spec, batch, instructions, monkeypatch):
    calls = []
    call = kernels.CompiledHead.__call__
    monkeypatch.setattr(kernels.CompiledHead, "__call__", lambda *given: calls.append(1) or call(*given))
    check(make(spec), batch)
    assert calls


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["hadamard", "binary"]),
    n=st.sampled_from([32, 36, 48, 60, 64, 80, 96, 100, 128, 160, 192, 256, 320]),
    c=st.integers(1, 400),
    batch=st.integers(0, 70),
    standardize=st.sampled_from([True, False, "center"]),
    normalize=st.booleans(),
    bias=st.booleans(),
    gains=st.booleans(),
    seed=st.integers(0, 99),
)
def test_heads_of_any_shape(kind, n, c, batch, standardize, normalize, bias, gains, seed):
    spec = spec_of(kind, n, c, standardize=standardize, normalize=normalize, bias=bias, gains=gains)
    head = make(spec, seed)
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = head(x)
    exact = copy.deepcopy(head).double()(x.double()).detach()
    largest = float(exact.abs().max()) if batch else 0.0
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5 * (1 + largest))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("batch", [1, 5, 40, 200])
@pytest.mark.parametrize("kind", ["hadamard", "binary"])
def test_threads_share_samples_or_classes(kind, batch, threads, monkeypatch):
    head = make(spec_of(kind, 320, 1003, standardize=True))
    x = torch.randn(batch, 320, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            alone = head(x)
            monkeypatch.setattr(kernels, "_LEAST_WORK", 0)
            torch.set_num_threads(threads)
            shared = head(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("kind", ["hadamard", "binary"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_no_number_spoils_its_sample_alone(bad, kind, batch):
    head = make(spec_of(kind, 320, 70))
    x = torch.randn(batch + 1, 320, generator=torch.Generator().manual_seed(1))
    x[0, 5] = bad
    with torch.no_grad():
        logits = head(x)
        torch.testing.assert_close(logits[1:], head(x[1:]), rtol=1e-5, atol=1e-5)
    assert not logits[0].isfinite().any() and logits[1:].isfinite().all()


@pytest.mark.parametrize("probabilities", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 40])
def test_the_largest_logits_are_found_for_some_samples_at_a_time(batch, probabilities, monkeypatch):
    monkeypatch.setattr(top_k, "LOGITS_AT_ONCE", 3000)
    head = make(HeadSpec("binary", 320, 900, bits_per_class=320))
    x = torch.randn(batch, 320, generator=torch.Generator().manual_seed(1))
    found = head.top_k(x, 5, probabilities=probabilities)
    with torch.no_grad():
        logits = head(x)
    expected = (logits.softmax(-1) if probabilities else logits).topk(5)
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.classes, expected.indices)
    assert head._prepared.is_compiled


def test_zeros_have_the_bias_as_logits():
    head = make(HeadSpec("hadamard", 320, 70))
    with torch.no_grad():
        assert torch.equal(head(torch.zeros(2, 320)), head.bias.expand(2, 70))


# --- A step of training


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("hadamard", 640, 600, standardize=True),
        HeadSpec("hadamard", 256, 256, bias=False, standardize="center"),
        HeadSpec("hadamard", 320, 300, matched=True, blocks=1),
    ],
    ids=lambda spec: f"{spec.num_features}-{spec.num_classes}",
)
def test_gradients_are_those_of_the_formula(spec, threads, instructions, monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_WORK", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    head = make(spec).train()
    head.keeps_statistics = True
    exact = copy.deepcopy(head).double()
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(7, spec.num_features, generator=drawn)
    x[3] = 0 if head.center is None else head.center  # a sample without a direction
    upstream = torch.randn(7, spec.num_classes, generator=drawn)
    found = []
    for each in (head, exact):
        features = x.to(each.scale.dtype).requires_grad_()
        logits = each(features)
        wanted = [features, *each.parameters()]
        found.append([logits, *torch.autograd.grad(logits, wanted, upstream.to(logits.dtype))])
    assert head.product.one_block().step is not None and exact.product.one_block().step is None
    for ours, expected in zip(*found, strict=True):
        assert (ours.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_use_the_statistics_of_their_own_step():
    head = make(HeadSpec("hadamard", 320, 300, standardize=True)).train()
    x = torch.randn(7, 320, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = torch.autograd.grad(head(x).square().sum(), x)[0]
    head.load_state_dict(make(HeadSpec("hadamard", 320, 300, standardize=True)).state_dict())
    logits = head(x)
    head(x.detach() + 5)  # moves the running mean
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), x)[0], expected)


def test_heads_are_copied_and_moved_after_a_step():
    head = make(HeadSpec("hadamard", 320, 300)).train()
    x = torch.randn(7, 320, generator=torch.Generator().manual_seed(1))
    logits = head(x)
    assert torch.equal(copy.deepcopy(head)(x), logits)
    torch.testing.assert_close(head.double()(x.double()).float(), logits, rtol=1e-5, atol=1e-5)


# --- Memory, and where there is no compiled code


def test_signs_take_three_bits_each():
    head = make(HeadSpec("binary", 1280, 1600, bits_per_class=1280, bias=False, normalize=False))
    assert memory_bytes(head, 1280) <= 1600 * 1280 * 3 / 8 + 65_000  # the rest: the rotation


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERFACE", -1)
    kernels.library.cache_clear()
    with pytest.warns(UserWarning, match="Install fixify again"):
        assert not kernels.is_compiled()
    kernels.library.cache_clear()


def test_heads_work_without_the_library(monkeypatch):
    head = make(HeadSpec("binary", 320, 300, bits_per_class=320))
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = head(x)
        monkeypatch.setattr(prepared_module, "is_compiled", lambda: False)
        torch.testing.assert_close(head.eval()(x), compiled, rtol=1e-5, atol=1e-5)
    assert not head._prepared.is_compiled
