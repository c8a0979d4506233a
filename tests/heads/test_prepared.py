import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fixify.errors import HeadSpecError
from fixify.heads import REFERENCE_CONSTRUCTION, FixedClassifier, HeadSpec, top_k
from fixify.heads import layer as layer_module
from fixify.heads import prepared as prepared_module
from fixify.heads.levels import LEVELS
from fixify.heads.signs import pack_levels

N = 256
INDICES = torch.from_numpy(np.random.default_rng(0).choice(2 * N * 12, 1000, replace=False))
ROWS = torch.from_numpy(np.random.default_rng(0).choice(N, 200, replace=False)) + 2 * N * 3
SIGNS = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (300, 4), dtype=np.uint8))
SPECS = {
    "rows": HeadSpec("hadamard", N, 200, standardize=True),
    "square": HeadSpec("hadamard", N, N, bias=False),
    "pairs": HeadSpec("hadamard", N, 300, standardize="center"),
    "blocks": HeadSpec("hadamard", N, 5 * N + 3, standardize=True),
    "whole-blocks": HeadSpec("hadamard", N, 4 * N, bias=False),
    "gains": HeadSpec("hadamard", N, 3 * N, gains=True),
    "unnormalised": HeadSpec("hadamard", N, 5 * N, normalize=False, fixed_scale=True),
    "matched": HeadSpec("hadamard", N, 1000, matched=True, blocks=12, standardize=True),
    "matched-rows": HeadSpec("hadamard", N, 200, matched=True, blocks=4, gains=True),
    "small": HeadSpec("hadamard", 64, 10, standardize=True),
    "dense": HeadSpec("orthogonal", 30, 70, standardize=True),
    "binary": HeadSpec("binary", 64, 300, bits_per_class=32, gains=True, normalize=False),
    "binary-normalised": HeadSpec("binary", 30, 300, bits_per_class=30, standardize="center"),
    "ternary": HeadSpec("binary", 44, 300, bits_per_weight=1.58, gains=True),
    "levels": HeadSpec("binary", 30, 300, bits_per_weight=3, gains=True, normalize=False, standardize="center"),
    "identity": HeadSpec("identity", 64, 10, standardize=True),
    "reference": HeadSpec("hadamard", 48, 60, construction=REFERENCE_CONSTRUCTION),
}


def make(name, draw, **options):
    """Build a head with drawn values in all its tensors, in evaluation mode."""
    spec = SPECS[name]
    if name == "binary-normalised":
        options["codes"] = SIGNS & torch.tensor([255, 255, 255, 252], dtype=torch.uint8)
    elif spec.bits_per_weight is not None:
        levels = LEVELS[spec.bits_per_weight]
        drawn = np.random.default_rng(2).choice(levels.values, (spec.num_classes, spec.num_features))
        options["codes"] = torch.from_numpy(pack_levels(drawn, levels))
    elif spec.stores_codes:
        options["codes"] = {"matched": INDICES, "matched-rows": ROWS}.get(name, SIGNS)
    head = FixedClassifier(spec, **options).eval()
    with torch.no_grad():
        if head.bias is not None:
            head.bias.copy_(draw(spec.num_classes, seed=1))
        if head.center is not None:
            head.center.copy_(draw(spec.num_features, seed=2))
        if head.spread is not None:
            head.spread.copy_(draw(spec.num_features, seed=3).abs() + 0.5)
        if head.gains is not None:
            head.gains.copy_(torch.arange(spec.num_classes) % 100 + 150)
    return head


def rounding_error(head, x, logits):
    """Largest error against the formula in float64, in units of the largest logit."""
    exact = copy.deepcopy(head).double()(x.double()).detach()
    return float((logits.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("lead", [(5,), (1,), (), (2, 3), (0,)], ids=str)
def test_logits_are_those_of_the_formula(name, lead, draw):
    head = make(name, draw, dtype=torch.float64)
    x = draw(*lead, head.in_features, dtype=torch.float64)
    with torch.no_grad():
        logits = head(x)
    assert head._prepared is not None
    assert logits.is_contiguous() and not logits.requires_grad
    torch.testing.assert_close(logits, head(x).detach(), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["blocks", "whole-blocks", "unnormalised", "matched"])
def test_samples_are_divided_where_scores_are_many(name, dtype, draw, monkeypatch):
    monkeypatch.setattr(prepared_module, "is_compiled", lambda: False)
    x = draw(2, 5, N).to(dtype)
    head = make(name, draw, dtype=dtype)
    with torch.no_grad():
        expected = head(x)
        monkeypatch.setattr(prepared_module, "_CACHED_SCORES", 3 * 12 * N)
        head.eval()
        torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_error_is_at_most_twice_that_of_the_dense_product(name, dtype, is_compiled, draw, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(prepared_module, "is_compiled", lambda: False)
    head = make(name, draw).to(dtype)
    x = draw(16, head.in_features, dtype=dtype)
    head.requires_grad_(False)
    weight = (head.scale.float() * head.codebook()).to(dtype)
    exact = head.scale.double() * head.codebook().double()
    z = draw(16, head.in_features)
    z = torch.nn.functional.normalize(z, dim=1)
    naive = (z.to(dtype) @ weight.T).double() - z.double() @ exact.T
    scale = float((z.double() @ exact.T).abs().max())
    with torch.inference_mode():
        logits = head(x)
    assert logits.dtype == dtype
    assert rounding_error(head, x, logits) <= 2 * float(naive.abs().max()) / scale + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rows", "blocks", "matched", "small", "binary", "identity"])
def test_autocast_gives_what_the_formula_gives(name, dtype, draw):
    head = make(name, draw)
    x = draw(4, head.in_features)
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            logits = head(x)
        formula = head(x).detach()
    assert logits.dtype == formula.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps * float(formula.abs().max())
    torch.testing.assert_close(logits, formula, rtol=0, atol=tolerance)
    with torch.no_grad():
        assert head(x).dtype == torch.float32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["rows", "blocks", "matched", "identity"])
def test_feature_maps(name, memory_format, draw):
    head = make(name, draw, channel_dim=1)
    x = draw(2, head.in_features, 3, 4).contiguous(memory_format=memory_format)
    with torch.no_grad():
        logits, empty = head(x), head(x[:0])
    assert empty.shape == (0, head.out_features, 3, 4)
    torch.testing.assert_close(logits, head(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e4])
def test_features_of_any_size(magnitude, draw):
    for dtype in (torch.float32, torch.float16):
        head = make("square", draw).to(dtype)
        x = (draw(3, N).clamp(-3, 3) * magnitude).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(head(x), head(x).detach())
            assert head(x).isfinite().all()


# --- The largest logits


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("logits_at_once", [1, 1 << 22])
@pytest.mark.parametrize("k", [1, 9])
def test_top_k_is_that_of_all_logits(name, logits_at_once, k, draw, monkeypatch):
    monkeypatch.setattr(top_k, "LOGITS_AT_ONCE", logits_at_once)
    head = make(name, draw, dtype=torch.float64)
    x = draw(2, 3, head.in_features, dtype=torch.float64)
    logits = head(x).detach()
    found = head.top_k(x, k)
    torch.testing.assert_close(found.values, logits.topk(k).values)
    assert torch.equal(found.classes, logits.topk(k).indices)
    likely = head.top_k(x, k, probabilities=True)
    torch.testing.assert_close(likely.values, logits.softmax(-1).topk(k).values)
    assert torch.equal(likely.classes, found.classes)


def test_top_k_of_every_class_of_no_samples_and_of_maps(draw):
    head = make("blocks", draw, channel_dim=1)
    x = draw(2, N, 3, 4)
    found = head.top_k(x, 5)
    assert found.values.shape == found.classes.shape == (2, 5, 3, 4)
    torch.testing.assert_close(found.values, head(x).topk(5, dim=1).values.detach())
    assert head.top_k(x[:0], 5).values.shape == (0, 5, 3, 4)
    small = make("small", draw)
    assert sorted(small.top_k(draw(64), 10).classes.tolist()) == list(range(10))
    for k in (0, 11):
        with pytest.raises(HeadSpecError):
            small.top_k(draw(64), k)


def test_top_k_does_not_learn(draw):
    head = make("rows", draw).train()
    before = copy.deepcopy(head.state_dict())
    assert not head.top_k(draw(3, N).requires_grad_(), 2).values.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


# --- What was prepared is dropped as soon as it is out of date


def in_place(head):
    with torch.no_grad():
        head.scale.mul_(2)


def bias_in_place(head):
    with torch.no_grad():
        head.bias.add_(1)


def average(head):
    torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)([head.bias, head.scale], [head.bias + 1, head.scale + 1], None)


def optimise(head):
    head.bias.grad = torch.ones_like(head.bias)
    torch.optim.SGD([head.bias], lr=1.0).step()


def load(head):
    state = head.state_dict()
    head.load_state_dict({**state, "bias": state["bias"] + 1, "spread": state["spread"] * 3})


def assign(head):
    state = head.state_dict()
    head.load_state_dict({**state, "bias": state["bias"] + 1, "center": state["center"] + 1}, assign=True)


def replace_parameter(head):
    head.bias = nn.Parameter(head.bias.detach() + 1)


def replace_data(head):
    head.bias.data = head.bias.data + 1


def data_in_place_and_mode(head):
    head.bias.data.add_(1)
    head.spread.data.mul_(2)
    head.eval()


def statistics(head):
    head.train()(torch.ones(4, head.in_features))
    head.eval()


def calibrate(head):
    head.calibrate_([torch.randn(9, head.in_features, generator=torch.Generator().manual_seed(7))])


CHANGES = [
    in_place,
    bias_in_place,
    average,
    optimise,
    load,
    assign,
    replace_parameter,
    replace_data,
    data_in_place_and_mode,
    statistics,
    calibrate,
    FixedClassifier.reset_parameters,
]


@pytest.mark.parametrize("name", ["rows", "blocks", "matched", "small"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_counts(name, change, draw):
    head = make(name, draw)
    x = draw(3, head.in_features)
    with torch.no_grad():
        before = head(x)
    change(head)
    with torch.no_grad():
        after = head(x)
    torch.testing.assert_close(after, head(x).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["rows", "matched", "binary"])
def test_copies_and_types(name, draw):
    head = make(name, draw)
    x = draw(3, head.in_features)
    with torch.no_grad():
        expected = head(x)
        assert torch.equal(pickle.loads(pickle.dumps(head))(x), expected)
        copied = copy.deepcopy(head)
        assert copied._prepared is None
        copied.bias.zero_()
        assert torch.equal(head(x), expected) and not torch.equal(copied(x), expected)
        assert torch.equal(copied(x), copied(x.clone()))
        torch.testing.assert_close(head.double()(x.double()), expected.double(), rtol=1e-4, atol=1e-4)
        assert head.half()(x.half()).dtype == torch.float16
        torch.testing.assert_close(head.float()(x), expected, rtol=1e-2, atol=2e-2)
        with pytest.raises(RuntimeError):
            head(x.half())  # as nn.Linear
    assert set(head.state_dict()) == set(make(name, draw).state_dict())


def test_new_codes_count(draw):
    head = make("matched", draw)
    x = draw(3, N)
    with torch.no_grad():
        before = head(x)
        other = FixedClassifier(SPECS["matched"], codes=INDICES.flip(0))
        fresh = FixedClassifier(SPECS["matched"])
        fresh.load_state_dict({**head.state_dict(), "codes": other.state_dict()["codes"]})
        assert not torch.allclose(fresh.eval()(x), before)
        torch.testing.assert_close((fresh(x) - fresh.bias).flip(1), before - head.bias, rtol=1e-4, atol=1e-4)


def test_heads_made_in_inference_mode_are_not_prepared(draw):
    """Their tensors do not count changes."""
    with torch.inference_mode():
        head = make("rows", draw)
        x = draw(3, N)
        before = head(x)
        head.bias.add_(1)
        torch.testing.assert_close(head(x), before + 1)
        assert head._prepared is None


def test_copies_of_data_parallel_are_not_prepared(draw):
    """Their parameters are plain attributes."""
    head = make("rows", draw)
    x = draw(3, N)
    with torch.no_grad():
        expected = head(x)
        replica = head._replicate_for_data_parallel()
        for name, parameter in head._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach() * 2)
        replica._prepared = None
        torch.testing.assert_close(replica(x), 2 * expected, rtol=1e-4, atol=1e-4)
        assert replica._prepared is None


def test_a_head_is_prepared_once(draw, monkeypatch):
    calls = []
    prepare = layer_module.prepare
    monkeypatch.setattr(layer_module, "prepare", lambda *arguments: calls.append(1) or prepare(*arguments))
    head = make("rows", draw)
    for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with grad():
            for _ in range(3):
                head(draw(3, N))
    assert len(calls) == 1


# --- Where operations are recorded or transformed, the formula is used


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_transforms(draw):
    head = make("blocks", draw)
    x = draw(4, N)
    with torch.no_grad():
        expected = head(x)
        mapped = torch.func.vmap(head)(x)
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
        _, tangent = torch.func.jvp(head, (x,), (x * 0.1,))
        state = {key: value * 2 for key, value in dict(head.named_parameters()).items()}
        swapped = torch.func.functional_call(head, state, (x,))
        torch.testing.assert_close(swapped, 2 * expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head(x), expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x * 0.1)
            by_hand = torch.autograd.forward_ad.unpack_dual(head(dual)).tangent
    torch.testing.assert_close(by_hand, tangent)
    jacobian = torch.func.jacrev(head)(x[0])
    torch.testing.assert_close(jacobian @ (x[0] * 0.1), tangent[0], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch 2.8
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["rows", "blocks", "matched", "binary"])
def test_export_and_compile_without_gradients(name, draw):
    torch.compiler.reset()
    head = make(name, draw)
    x = draw(7, head.in_features)
    with torch.no_grad():
        expected = head(x)
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(head, (x[:3],), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        graph = torch.fx.experimental.proxy_tensor.make_fx(head)(x[:3])
        torch.testing.assert_close(graph(x[:3]), expected[:3], rtol=1e-4, atol=1e-4)
        traced = torch.jit.trace(head, (x[:3],))
        torch.testing.assert_close(traced(x[:3]), expected[:3], rtol=1e-4, atol=1e-4)
