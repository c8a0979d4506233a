import copy
import math
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import REFERENCE_CONSTRUCTION, FixedClassifier, HeadSpec, initial_scale
from fixify.heads import product as product_module
from fixify.heads import signs as signs_module
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.levels import LEVELS
from fixify.heads.signs import pack_levels

DENSE, FAST = HeadSpec("hadamard", 64, 10), HeadSpec("hadamard", 256, 1000)
CODES = torch.from_numpy(np.random.default_rng(0).choice(2 * 256 * 12, 1000, replace=False))
MATCHED = HeadSpec("hadamard", 256, 1000, matched=True, blocks=12, standardize=True)
BINARY = HeadSpec("binary", 64, 30, bits_per_class=24, gains=True, normalize=False)
SIGNS = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (30, 3), dtype=np.uint8))
GAINS = torch.arange(200, 230, dtype=torch.uint8)
IDENTITY = HeadSpec("identity", 64, 10, standardize=True)
TERNARY, FINE = (HeadSpec("binary", 44, c, bits_per_weight=b, gains=True) for c, b in ((31, 1.58), (32, 3)))
ONE_OF_EACH = [DENSE, FAST, MATCHED, HeadSpec("orthogonal", 30, 7), BINARY, IDENTITY, TERNARY, FINE]


def named(spec):
    return f"{spec.kind}-{spec.num_classes}"


def make(spec, **options):
    if spec.bits_per_weight is not None:
        levels = LEVELS[spec.bits_per_weight]
        drawn = np.random.default_rng(2).choice(levels.values, (spec.num_classes, spec.num_features))
        return FixedClassifier(spec, codes=torch.from_numpy(pack_levels(drawn, levels)), **options)
    stored = {"hadamard": {"codes": CODES}, "binary": {"codes": SIGNS, "gains": GAINS}}
    return FixedClassifier(spec, **(stored[spec.kind] if spec.stores_codes else {}), **options)


@pytest.fixture(scope="module")
def features(draw):
    return draw


def reference(head, x):
    """The formula, with the whole codebook, in float64."""
    x = x.double()
    if head.mean is not None:
        x = x - head.mean.double()
    if head.std is not None:
        x = x / head.std.double()
    if head.spec.normalize:
        x = x / x.norm(dim=-1, keepdim=True)
    logits = head.scale.double() * x @ head.codebook().double().T
    return logits if head.bias is None else logits + head.bias.double()


@pytest.mark.parametrize(
    "spec",
    [
        DENSE,
        FAST,
        MATCHED,
        HeadSpec("hadamard", 256, 100, normalize=False, bias=False),
        HeadSpec("hadamard", 256, 100, standardize=True, fixed_scale=True),
        HeadSpec("hadamard", 256, 100, standardize="center"),
        HeadSpec("orthogonal", 386, 100),
        HeadSpec("orthogonal", 64, 300, standardize=True),
        HeadSpec("simplex", 64, 65),
        BINARY,
        IDENTITY,
        TERNARY,
        FINE,
        HeadSpec("binary", 30, 33, bits_per_weight=4, gains=True, standardize="center", normalize=False),
        HeadSpec("identity", 64, 64, bias=False, normalize=False, fixed_scale=True),
        HeadSpec("hadamard", 48, 60, construction=REFERENCE_CONSTRUCTION),
    ],
    ids=named,
)
def test_forward_is_the_formula(spec, features):
    head = make(spec).eval()
    with torch.no_grad():
        for tensor in (head.bias, head.mean):
            if tensor is not None:
                tensor.copy_(features(*tensor.shape, seed=1))
        if head.std is not None:
            head.std.copy_(features(*head.std.shape, seed=2).abs() + 0.5)
    for lead in ((5,), (1,), (), (2, 3), (0,)):
        x = features(*lead, spec.num_features)
        assert head(x).shape == (*lead, spec.num_classes)
        torch.testing.assert_close(head(x).double(), reference(head, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", [FAST, IDENTITY], ids=named)
def test_feature_maps_are_normalised_over_channels(spec, features):
    head = make(spec, channel_dim=1)
    x = features(2, spec.num_features, 3, 4)
    rows = make(spec)(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(head(x), rows.permute(0, 3, 1, 2))
    assert head(x).shape == (2, spec.num_classes, 3, 4)
    with pytest.raises(HeadSpecError, match=r"channel_dim .* 2"):
        make(spec, channel_dim=2)


@pytest.mark.parametrize("n_classes", [2, 10, 1000, 21_841])
def test_initial_scale_lets_softmax_reach_095(n_classes):
    logits = torch.zeros(n_classes, dtype=torch.float64)
    logits[0] = initial_scale(n_classes)
    assert math.isclose(logits.softmax(0)[0], 0.95, rel_tol=1e-9)
    assert make(HeadSpec("hadamard", 64, 10)).scale.item() == pytest.approx(initial_scale(10))
    assert make(DENSE, scale=3.5).scale.item() == 3.5


def test_initial_scale_of_1000_classes():
    assert round(initial_scale(1000), 1) == 9.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED, IDENTITY], ids=named)
def test_half_precision(spec, dtype, features):
    """Features whose squares overflow fp16, and features whose squares vanish in it."""
    head = make(spec).eval()
    half = copy.deepcopy(head).to(dtype)
    for magnitude in (1e-4, 1.0, 2e4):
        x = (features(4, spec.num_features).clamp(-3, 3) * magnitude).to(dtype)
        logits = half(x)
        assert logits.dtype == dtype
        exact = head(x.float())
        assert (logits.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [*ONE_OF_EACH, HeadSpec("hadamard", 64, 100)], ids=named)
def test_autocast_gives_what_linear_gives(spec, dtype, features):
    head, linear = make(spec), nn.Linear(spec.num_features, spec.num_classes)
    x = features(4, spec.num_features)
    with torch.autocast("cpu", dtype=dtype):
        assert head(x).dtype == linear(x).dtype == dtype
        head(x).float().square().sum().backward()
    assert head.scale.grad.dtype == torch.float32
    assert torch.isfinite(head.scale.grad)
    assert head.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_features_give_the_bias_and_finite_gradients(dtype):
    head = make(FAST).to(dtype)
    x = torch.zeros(2, 256, dtype=dtype, requires_grad=True)
    logits = head(x)
    assert torch.equal(logits, torch.zeros_like(logits))
    logits[:, 0].sum().backward()
    assert torch.isfinite(head.scale.grad)
    if dtype == torch.float32:
        assert torch.isfinite(x.grad).all()


def test_batch_of_one_is_the_row_of_a_batch(features):
    head = make(MATCHED).eval()
    x = features(5, 256)
    for i in range(5):
        torch.testing.assert_close(head(x[i : i + 1])[0], head(x)[i])


@pytest.mark.parametrize("spec", [DENSE, HeadSpec("hadamard", 32, 100, standardize=True), IDENTITY], ids=named)
def test_gradcheck(spec, features):
    head = make(spec, dtype=torch.float64).eval()
    x = features(3, spec.num_features, dtype=torch.float64).requires_grad_()

    def logits(x, scale, bias):
        return torch.func.functional_call(head, {"scale": scale, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(logits, (x, head.scale, head.bias))


def test_parameters_and_state_dict():
    assert {name for name, _ in make(FAST).named_parameters()} == {"scale", "bias"}
    assert {
        name for name, _ in make(HeadSpec("hadamard", 64, 10, bias=False, fixed_scale=True)).named_parameters()
    } == set()
    assert list(make(HeadSpec("hadamard", 64, 10, fixed_scale=True)).state_dict()) == ["bias", "scale"]
    head = make(MATCHED)
    state = head.state_dict()
    assert set(state) == {"scale", "bias", "center", "spread", "num_batches_tracked", "codes"}
    assert torch.equal(head.mean, state["center"]) and torch.equal(head.std, state["spread"])
    assert head.row_scales is None
    assert not hasattr(make(FAST), "weight")
    assert (make(FAST).mean, make(FAST).std) == (None, None)


@pytest.mark.parametrize(
    ("n", "blocks", "dtype"),
    [(16, 8, torch.uint8), (16, 9, torch.uint16), (256, 128, torch.uint16), (256, 129, torch.uint32)],
)
def test_codes_are_saved_in_the_smallest_unsigned_type(n, blocks, dtype):
    codes = torch.arange(10) + 2 * n * (blocks - 1)
    head = FixedClassifier(HeadSpec("hadamard", n, 10, matched=True, blocks=blocks), codes=codes)
    state = head.state_dict()
    assert state["codes"].dtype == dtype
    assert torch.equal(state["codes"].long(), codes)
    assert head.codes.dtype == torch.int64  # what distributed training can broadcast


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=named)
def test_round_trip_through_the_state_dict(spec, assign, features):
    head = make(spec)
    head(features(8, spec.num_features))
    with torch.no_grad():
        head.bias.copy_(features(spec.num_classes))
        head.scale.fill_(12.5)
    x = features(3, spec.num_features, seed=3)
    expected = head.eval()(x)
    fresh = FixedClassifier(head.spec)
    fresh.load_state_dict(head.state_dict(), assign=assign)
    assert torch.equal(fresh.eval()(x), expected)
    if assign:
        with torch.device("meta"):
            meta = nn.Sequential(FixedClassifier(head.spec))
        meta.load_state_dict({f"0.{key}": value for key, value in head.state_dict().items()}, assign=True)
        assert torch.equal(meta.eval()(x), expected)
        assert not any(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    meta = FixedClassifier(head.spec, device="meta")
    meta.to_empty(device="cpu").load_state_dict(head.state_dict())
    assert torch.equal(meta.eval()(x), expected)


def test_a_changed_code_is_refused_at_load():
    head = make(MATCHED)
    state = head.state_dict()
    codes = state["codes"].long()
    codes[[3, 4]] = codes[[4, 3]]
    with pytest.raises(CodebookMismatchError, match="stored code indices"):
        FixedClassifier(head.spec).load_state_dict(state | {"codes": codes.to(torch.uint16)})
    codes[3] = codes[4]
    with pytest.raises(HeadSpecError, match="the same code"):
        FixedClassifier(MATCHED).load_state_dict(state | {"codes": codes.to(torch.uint16)})
    codes[3] = 60_000
    with pytest.raises(HeadSpecError, match="must lie in"):
        FixedClassifier(MATCHED).load_state_dict(state | {"codes": codes.to(torch.uint16)})


def test_loading_codes_into_an_unverified_spec_fills_in_the_digest():
    head = make(MATCHED)
    fresh = FixedClassifier(MATCHED)
    assert fresh.spec.digest is None
    fresh.load_state_dict(head.state_dict())
    assert fresh.spec == head.spec


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=named)
def test_copies_and_conversions(spec, features):
    head = make(spec).eval()
    x = features(3, spec.num_features)
    expected = head(x)
    assert torch.equal(copy.deepcopy(head)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(head))(x), expected)
    torch.testing.assert_close(copy.deepcopy(head).double()(x.double()).float(), expected)
    assert head.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize("spec", [FAST, MATCHED, IDENTITY], ids=named)
def test_export_with_any_batch_size(spec, features):
    head = make(spec).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(head, (features(3, spec.num_features),), dynamic_shapes=({0: batch},))
    x = features(7, spec.num_features)
    torch.testing.assert_close(program.module()(x), head(x))


@pytest.mark.parametrize("spec", [FAST, MATCHED, IDENTITY], ids=named)
def test_compiles_without_graph_breaks(spec, features):
    """Traced by dynamo and AOT autograd, forward and backward; without a C++ compiler, which not every machine has."""
    torch.compiler.reset()
    head = make(spec)
    plain = copy.deepcopy(head)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    x = features(4, spec.num_features)
    torch.testing.assert_close(compiled(x), plain(x))
    compiled(x).sum().backward()
    assert head.bias.grad is not None


def test_running_statistics_follow_training_and_rest_in_eval(features):
    head = make(HeadSpec("hadamard", 64, 10, standardize=True))
    x = features(500, 64) * torch.linspace(0.1, 3, 64) + torch.linspace(-5, 5, 64)
    head(x)
    torch.testing.assert_close(head.mean, x.mean(0))
    torch.testing.assert_close(head.std, x.std(0, correction=0), rtol=1e-4, atol=1e-5)
    state = copy.deepcopy(head.state_dict())
    head.eval()(x + 1)
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())
    head.train()(x[:0])
    assert head.num_batches_tracked == 1
    head.reset_statistics()
    assert head.num_batches_tracked == 0
    assert torch.equal(head.std, torch.ones(64))


def test_calibration_is_exact_over_batches(features):
    head = make(HeadSpec("hadamard", 64, 10, standardize=True), channel_dim=1)
    x = features(50, 64, 3, 2) * 1e-3 + 1000
    head.calibrate_(x.split(7))
    rows = x.double().movedim(1, -1).reshape(-1, 64)
    torch.testing.assert_close(head.mean.double(), rows.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(head.std.double(), rows.std(0, correction=0), rtol=1e-5, atol=0)
    with pytest.raises(HeadSpecError, match="does not standardise"):
        make(DENSE).calibrate_([x])


def test_a_head_that_only_centers_has_no_std(features):
    head = make(HeadSpec("hadamard", 64, 10, standardize="center"))
    x = features(500, 64) * torch.linspace(0.1, 3, 64) + torch.linspace(-5, 5, 64)
    head(x)
    torch.testing.assert_close(head.mean, x.mean(0))
    head(x - 1)
    torch.testing.assert_close(head.mean, x.mean(0) - 0.5)
    assert head.std is None and set(head.state_dict()) == {"scale", "bias", "center", "num_batches_tracked"}
    torch.testing.assert_close(head.calibrate_(x.split(7)).mean, x.mean(0), rtol=1e-5, atol=1e-5)
    assert "standardize='center'" in repr(head)
    head.reset_statistics()
    assert not head.mean.any() and head.num_batches_tracked == 0


def test_a_dead_feature_does_not_drown_the_others(features):
    head = make(HeadSpec("hadamard", 64, 10, standardize=True)).eval()
    x = features(1000, 64)
    x[:, 7] = 0
    head.calibrate_([x])
    assert head.std[7] == 0
    y = features(4, 64, seed=1)
    y[:, 7] = 0
    quiet = head(y)
    y[:, 7] = 1
    assert torch.isfinite(head(y)).all()
    assert F.cosine_similarity(head(y), quiet).min() > 0.1


def test_reset_parameters(features):
    head = make(MATCHED)
    head(features(4, 256))
    with torch.no_grad():
        for tensor in (head.scale, head.bias, head.codes):
            tensor.zero_().add_(1)
    head.reset_parameters()
    assert head.scale.item() == pytest.approx(initial_scale(1000))
    assert not head.bias.any()
    assert torch.equal(head.codes, CODES)
    assert not head.mean.any()


def test_distributed_data_parallel_accepts_every_buffer(features):
    """Even one process broadcasts all buffers from the first, which fails for unsigned types wider than a byte."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        head = nn.parallel.DistributedDataParallel(make(MATCHED))
        for _ in range(2):
            head(features(4, 256)).sum().backward()
        assert head.module.scale.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_repr_says_what_it_is():
    assert "hadamard, in_features=256, out_features=1000, bias=True, standardize, matched" in repr(make(MATCHED))
    assert "bias=True, gains, bits_per_class=24, normalize=False" in repr(make(BINARY))


def test_training_learns_with_a_fixed_head():
    """Two thousand points of ten clusters, one linear layer in front: the head itself passes useful gradients."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 20, generator=generator)
    target = torch.arange(2000) % 10
    x = centers[target] + 0.5 * torch.randn(2000, 20, generator=generator)
    backbone = nn.Linear(20, 64)
    with torch.no_grad():
        backbone.weight.normal_(std=0.2, generator=generator)
    head = make(HeadSpec("hadamard", 64, 10, standardize=True))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(head(backbone(x)), target).backward()
        optimizer.step()
    accuracy = (head.eval()(backbone(x)).argmax(1) == target).float().mean()
    assert accuracy > 0.97


def test_both_paths_give_the_same_head(monkeypatch, features):
    x = features(3, 256)
    heads = []
    for dense in (True, False):
        monkeypatch.setattr(product_module, "prefers_dense", lambda *_, dense=dense: dense)
        heads.append(make(MATCHED).eval())
    assert (heads[0].product.table is None) != (heads[1].product.table is None)
    torch.testing.assert_close(heads[0](x), heads[1](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [64, 100, 512])
def test_binarised_features_need_no_norm(n: int) -> None:
    """Section 4.3: features of +-1 have norm sqrt(N), which the scale takes in."""
    x = torch.randn(5, n).sign()
    learned = FixedClassifier(HeadSpec("hadamard", n, 40))
    absorbed = FixedClassifier(HeadSpec("hadamard", n, 40, normalize=False))
    torch.testing.assert_close(absorbed.scale * n**0.5, learned.scale)
    torch.testing.assert_close(absorbed(x), learned(x))


# --- Row scales and signs


def test_row_scales_are_the_lengths_of_the_codes():
    head = make(BINARY)
    torch.testing.assert_close(head.row_scales, GAINS / GAIN_STEPS)
    torch.testing.assert_close(head.codebook().norm(dim=1), head.row_scales, atol=1e-5, rtol=0)
    assert torch.equal(FixedClassifier(BINARY, codes=SIGNS).row_scales, torch.ones(30))


@pytest.mark.parametrize(
    ("spec", "gains"),
    [
        (DENSE, torch.ones(10, dtype=torch.uint8)),
        (BINARY, torch.ones(29, dtype=torch.uint8)),
        (BINARY, torch.ones(30)),
    ],
)
def test_gains_that_do_not_fit_are_refused(spec, gains):
    with pytest.raises(HeadSpecError, match=rf"gains must be uint8 \[{spec.num_classes}\]"):
        FixedClassifier(spec, gains=gains)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": SIGNS.float()}, r"codes must be uint8 of shape \[30, 3\], not float32"),
        ({"codes": SIGNS.int()}, "codes must be uint8"),
        ({"codes": SIGNS[:29]}, r"not uint8 \[29, 3\]"),
        ({"gains": GAINS.float()}, "gains must be uint8"),
        ({"gains": GAINS * 0}, "gains must lie in 1 .. 255"),
    ],
)
def test_stored_tensors_that_torch_would_cast_are_refused(change, message):
    head = make(BINARY)
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(head.state_dict() | change)


def test_signs_are_verified_when_they_are_loaded():
    head = make(BINARY)
    fresh = FixedClassifier(head.spec)
    with pytest.raises(HeadSpecError, match="not been loaded"):
        fresh(torch.zeros(1, 64))
    state = head.state_dict()
    assert state["codes"].dtype == state["gains"].dtype == torch.uint8
    state["codes"] = state["codes"] ^ 1
    with pytest.raises(CodebookMismatchError, match="stored signs"):
        fresh.load_state_dict(state)


def test_many_signs_are_never_unpacked_at_once(monkeypatch, features):
    """Forward and backward hold a chunk of the signs as numbers, not the 66,000 x 256 of them (68 MB)."""
    c, n = 66_000, 256
    packed = torch.randint(0, 256, (c, n // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head = FixedClassifier(HeadSpec("binary", n, c, bits_per_class=n, gains=True, bias=False), codes=packed)
    assert head.product.table is None
    assert sum(table.nbytes for table in head.buffers()) < 3 * c * n // 8
    sizes, unpack = [], signs_module.unpack_signs

    def recording(part, num_signs, dtype):
        sizes.append(len(part))
        return unpack(part, num_signs, dtype)

    monkeypatch.setattr(signs_module, "unpack_signs", recording)
    x = features(2, n).requires_grad_()
    logits = head(x)
    (grad,) = torch.autograd.grad(logits[:, :100].square().sum(), x)
    assert sum(sizes) == 2 * c
    assert max(sizes) * n <= 1 << 22 < c * n
    small = FixedClassifier(HeadSpec("binary", n, 100, bits_per_class=n, gains=True, bias=False), codes=packed[:100])
    assert small.product.table is not None and head.product.table is None
    expected = small(x) * (head.scale / small.scale)
    torch.testing.assert_close(logits[:, :100], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-3, atol=1e-3)
    assert head.half().product.packed.dtype == torch.uint8
    assert head(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_signs_are_numbers_in_training_only(dtype, features, monkeypatch):
    """Training rounds as it always has, and evaluation holds no numbers."""
    table = make(BINARY).to(dtype)
    monkeypatch.setattr(product_module, "SMALL_TABLE", 0)
    packed = make(BINARY).to(dtype)
    assert packed.product.packed is not None
    packed.train()
    packed.load_state_dict(table.state_dict())
    assert torch.equal(packed.product.table, table.product.table)
    results = []
    for head in (table, packed):
        x = features(5, 64, dtype=dtype).requires_grad_()
        logits = head(x)
        logits.float().square().sum().backward()
        results.append((logits, x.grad, head.scale.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert packed.eval().product.table is None
    torch.testing.assert_close(packed(features(5, 64, dtype=dtype)), results[0][0], rtol=1e-2, atol=1e-2)
    assert torch.equal(packed.train()(features(5, 64, dtype=dtype)), results[0][0])
    monkeypatch.setattr(product_module, "_TRAINING_TABLE", 0)
    assert packed.eval().train().product.table is None


# --- The paper's published code


def published(x, num_classes, scale, bias):
    """What that code computes, from its description: the whole matrix of SciPy, cut; the sign is its own."""
    order = 2 ** math.ceil(math.log2(max(x.shape[-1], num_classes)))
    matrix = torch.from_numpy(scipy.linalg.hadamard(order)[:num_classes, : x.shape[-1]]).to(x.dtype)
    return -scale * (x / (x.norm(dim=-1, keepdim=True) + 1e-8)) @ matrix.T + bias


def reference_spec(n, c, **options):
    return HeadSpec("hadamard", n, c, construction=REFERENCE_CONSTRUCTION, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.data())
def test_logits_are_those_of_the_published_code(features, n, data):
    """Its checkpoints hold `scale` [1] and `bias`; the matrix is not stored."""
    c = data.draw(st.integers(1, 1 << (n - 1).bit_length()))
    scale, bias, x = features(1).abs() + 0.1, features(c, seed=1), features(3, n, seed=2)
    head = FixedClassifier(reference_spec(n, c))
    head.load_state_dict(OrderedDict(scale=scale, bias=bias))
    torch.testing.assert_close(head(x), published(x, c, scale, bias), atol=1e-5, rtol=1e-5)
    assert head.scale.shape == () and head.scale > 0
    again = FixedClassifier(reference_spec(n, c))
    again.load_state_dict(head.state_dict())  # its own state is not multiplied once more
    assert torch.equal(again.scale, head.scale)


def test_fixed_scale_of_the_published_code_is_not_in_its_checkpoint(features):
    head = FixedClassifier(reference_spec(64, 10, fixed_scale=True), scale=0.5 * math.sqrt(64))
    bias, x = features(10), features(4, 64, seed=1)
    head.load_state_dict({"bias": bias})
    torch.testing.assert_close(head(x), published(x, 10, torch.tensor([0.5]), bias), atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="scale"):
        FixedClassifier(reference_spec(64, 10)).load_state_dict({"bias": bias})
