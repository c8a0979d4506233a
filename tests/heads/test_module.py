import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, initial_scale, transform

DENSE, FAST = HeadSpec("hadamard", 64, 10), HeadSpec("hadamard", 256, 1000)
CODES = torch.from_numpy(np.random.default_rng(0).choice(2 * 256 * 12, 1000, replace=False))
MATCHED = HeadSpec("hadamard", 256, 1000, matched=True, blocks=12, standardize=True)


def make(spec, **options):
    return FixedClassifier(spec, codes=CODES if spec.matched else None, **options)


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(head, x):
    """The formula, with the whole codebook, in float64."""
    x = x.double()
    if head.center is not None:
        x = x - head.center.double()
    if head.spread is not None:
        x = x / head.spread.double()
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
    ],
    ids=lambda spec: f"{spec.kind}-{spec.num_classes}",
)
def test_forward_is_the_formula(spec):
    head = make(spec).eval()
    with torch.no_grad():
        for tensor in (head.bias, head.center):
            if tensor is not None:
                tensor.copy_(features(*tensor.shape, seed=1))
        if head.spread is not None:
            head.spread.copy_(features(*head.spread.shape, seed=2).abs() + 0.5)
    for lead in ((5,), (1,), (), (2, 3), (0,)):
        x = features(*lead, spec.num_features)
        assert head(x).shape == (*lead, spec.num_classes)
        torch.testing.assert_close(head(x).double(), reference(head, x), rtol=1e-5, atol=1e-4)


def test_feature_maps_are_normalised_over_channels():
    head = make(FAST, channel_dim=1)
    x = features(2, 256, 3, 4)
    rows = make(FAST)(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(head(x), rows.permute(0, 3, 1, 2))
    assert head(x).shape == (2, 1000, 3, 4)
    with pytest.raises(HeadSpecError):
        make(FAST, channel_dim=2)


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
@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED])
def test_half_precision(spec, dtype):
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
@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED, HeadSpec("hadamard", 64, 100), HeadSpec("orthogonal", 30, 7)])
def test_autocast_gives_what_linear_gives(spec, dtype):
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


def test_batch_of_one_is_the_row_of_a_batch():
    head = make(MATCHED).eval()
    x = features(5, 256)
    for i in range(5):
        torch.testing.assert_close(head(x[i : i + 1])[0], head(x)[i])


@pytest.mark.parametrize("spec", [DENSE, HeadSpec("hadamard", 32, 100, standardize=True)])
def test_gradcheck(spec):
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
    state = make(MATCHED).state_dict()
    assert set(state) == {"scale", "bias", "center", "spread", "num_batches_tracked", "codes"}
    assert not hasattr(make(FAST), "weight")


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
@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED, HeadSpec("orthogonal", 30, 7)])
def test_round_trip_through_the_state_dict(spec, assign):
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


@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED, HeadSpec("orthogonal", 30, 7)])
def test_copies_and_conversions(spec):
    head = make(spec).eval()
    x = features(3, spec.num_features)
    expected = head(x)
    assert torch.equal(copy.deepcopy(head)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(head))(x), expected)
    torch.testing.assert_close(copy.deepcopy(head).double()(x.double()).float(), expected)
    assert head.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED])
def test_export_with_any_batch_size(spec):
    head = make(spec).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(head, (features(3, spec.num_features),), dynamic_shapes=({0: batch},))
    x = features(7, spec.num_features)
    torch.testing.assert_close(program.module()(x), head(x))


@pytest.mark.parametrize("spec", [DENSE, FAST, MATCHED])
def test_compiles_without_graph_breaks(spec):
    """Traced by dynamo and AOT autograd, forward and backward; without a C++ compiler, which not every machine has."""
    torch.compiler.reset()
    head = make(spec)
    plain = copy.deepcopy(head)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    x = features(4, spec.num_features)
    torch.testing.assert_close(compiled(x), plain(x))
    compiled(x).sum().backward()
    assert head.bias.grad is not None


def test_running_statistics_follow_training_and_rest_in_eval():
    head = make(HeadSpec("hadamard", 64, 10, standardize=True))
    x = features(500, 64) * torch.linspace(0.1, 3, 64) + torch.linspace(-5, 5, 64)
    head(x)
    torch.testing.assert_close(head.center, x.mean(0))
    torch.testing.assert_close(head.spread, x.std(0, correction=0), rtol=1e-4, atol=1e-5)
    state = copy.deepcopy(head.state_dict())
    head.eval()(x + 1)
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())
    head.train()(x[:0])
    assert head.num_batches_tracked == 1
    head.reset_statistics()
    assert head.num_batches_tracked == 0
    assert torch.equal(head.spread, torch.ones(64))


def test_calibration_is_exact_over_batches():
    head = make(HeadSpec("hadamard", 64, 10, standardize=True), channel_dim=1)
    x = features(50, 64, 3, 2) * 1e-3 + 1000
    head.calibrate_(x.split(7))
    rows = x.double().movedim(1, -1).reshape(-1, 64)
    torch.testing.assert_close(head.center.double(), rows.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(head.spread.double(), rows.std(0, correction=0), rtol=1e-5, atol=0)
    with pytest.raises(HeadSpecError, match="does not standardise"):
        make(DENSE).calibrate_([x])


def test_a_head_that_only_centers_has_no_deviations():
    head = make(HeadSpec("hadamard", 64, 10, standardize="center"))
    x = features(500, 64) * torch.linspace(0.1, 3, 64) + torch.linspace(-5, 5, 64)
    head(x)
    torch.testing.assert_close(head.center, x.mean(0))
    head(x - 1)
    torch.testing.assert_close(head.center, x.mean(0) - 0.5)
    assert head.spread is None and set(head.state_dict()) == {"scale", "bias", "center", "num_batches_tracked"}
    torch.testing.assert_close(head.calibrate_(x.split(7)).center, x.mean(0), rtol=1e-5, atol=1e-5)
    assert "standardize='center'" in repr(head)
    head.reset_statistics()
    assert not head.center.any() and head.num_batches_tracked == 0


def test_a_dead_feature_does_not_drown_the_others():
    head = make(HeadSpec("hadamard", 64, 10, standardize=True)).eval()
    x = features(1000, 64)
    x[:, 7] = 0
    head.calibrate_([x])
    assert head.spread[7] == 0
    y = features(4, 64, seed=1)
    y[:, 7] = 0
    quiet = head(y)
    y[:, 7] = 1
    assert torch.isfinite(head(y)).all()
    assert F.cosine_similarity(head(y), quiet).min() > 0.1


def test_reset_parameters():
    head = make(MATCHED)
    head(features(4, 256))
    with torch.no_grad():
        for tensor in (head.scale, head.bias, head.codes):
            tensor.zero_().add_(1)
    head.reset_parameters()
    assert head.scale.item() == pytest.approx(initial_scale(1000))
    assert not head.bias.any()
    assert torch.equal(head.codes, CODES)
    assert not head.center.any()


def test_distributed_data_parallel_accepts_every_buffer():
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
    text = repr(make(MATCHED))
    assert "hadamard, in_features=256, out_features=1000, bias=True, standardize, matched" in text


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


def test_both_paths_give_the_same_head(monkeypatch):
    x = features(3, 256)
    heads = []
    for dense in (True, False):
        monkeypatch.setattr(transform, "prefers_dense", lambda *_, dense=dense: dense)
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
