"""The blocked loss equals the plain one on the logits of the whole head."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tools.processes import run_together

from fixify.errors import HeadSpecError
from fixify.heads import ArcFace, CosFace, FixedClassifier, HeadSpec, SoftTarget
from fixify.heads import loss as loss_module
from fixify.heads import product as product_module
from fixify.heads.levels import LEVELS
from fixify.heads.signs import pack_levels

RANDOM = np.random.default_rng(0)
SIGNS = torch.from_numpy(RANDOM.integers(0, 256, (300, 6), dtype=np.uint8))
STORED = {
    "matched": {"codes": torch.from_numpy(RANDOM.choice(2 * 32 * 20, 500, replace=False))},
    "one block": {"codes": torch.from_numpy(RANDOM.choice(128, 60, replace=False))},
    "levels": {"codes": torch.from_numpy(pack_levels(RANDOM.choice([-3, -1, 1, 3], (300, 44)), LEVELS[2]))},
    "binary": {"codes": SIGNS, "gains": torch.arange(300, dtype=torch.int64).remainder(200).add(50).to(torch.uint8)},
}
HEADS = {
    "blocks": HeadSpec("hadamard", 16, 500, standardize=True),
    "fast": HeadSpec("hadamard", 256, 1200, standardize=True),
    "no bias": HeadSpec("hadamard", 64, 300, bias=False),
    "fast, few classes": HeadSpec("hadamard", 512, 400, standardize="center"),
    "matched": HeadSpec("hadamard", 32, 500, matched=True, blocks=20, standardize=True),
    "one block": HeadSpec("hadamard", 64, 60, matched=True, blocks=1),
    "binary": HeadSpec("binary", 64, 300, bits_per_class=48, gains=True, normalize=False, standardize=True),
    "levels": HeadSpec("binary", 44, 300, bits_per_weight=2, gains=True, normalize=False, standardize="center"),
    "orthogonal": HeadSpec("orthogonal", 30, 70, standardize=True),
    "simplex": HeadSpec("simplex", 30, 31, fixed_scale=True),
    "identity": HeadSpec("identity", 30, 20),
    "one class": HeadSpec("hadamard", 16, 1),
}


def make(name, dtype=torch.float64, fast=False):
    """Build a head with a scale, a bias and statistics that matter."""
    with pytest.MonkeyPatch.context() as patch:
        if fast:
            patch.setattr(product_module, "prefers_dense", lambda *sizes: False)
        head = FixedClassifier(HEADS[name], **STORED.get(name, {}), scale=9.0, dtype=dtype)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if head.bias is not None:
            head.bias.normal_(generator=drawn)
    if head.center is not None:
        head.calibrate_([torch.randn(50, head.in_features, generator=drawn, dtype=torch.float64) * 2 + 1])
    return head.eval()


def batch(head, size=6, dtype=torch.float64):
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(size, head.in_features, generator=drawn, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.randint(head.out_features, (size,), generator=drawn)


def gradients(head, x, value):
    """Return the gradients of features, scale, bias, mean and std."""
    return torch.autograd.grad(value, [x, *_leaves(head)], allow_unused=True)


def _leaves(head):
    found = [tensor for tensor in (head.scale, head.bias, head.center, head.spread) if tensor is not None]
    return [tensor.requires_grad_() for tensor in found]


def assert_same(head, x, ours, plain, **tolerance):
    torch.testing.assert_close(ours, plain, **tolerance)
    weights = torch.arange(1.0, ours.numel() + 1, dtype=ours.dtype)  # an upstream gradient that differs by sample
    pairs = zip(gradients(head, x, ours @ weights), gradients(head, x, plain @ weights.to(plain.dtype)), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.fixture(autouse=True, params=[1, 1 << 18], ids=["small blocks", "one block"])
def _block_size(request, monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_LOGITS", request.param)
    monkeypatch.setattr(loss_module, "PAIR_LOGITS", request.param)
    monkeypatch.setattr(loss_module, "_LEAST_CLASSES", 7 if request.param == 1 else 512)


EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("fast", [False, True], ids=["as chosen", "fast"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", HEADS)
def test_equals_the_plain_loss(name, fast, smoothing):
    head = make(name, fast=fast)
    x, y = batch(head)
    ours = head.loss(x, y, label_smoothing=smoothing, reduction="none")
    plain = F.cross_entropy(head(x), y, label_smoothing=smoothing, reduction="none")
    assert_same(head, x, ours, plain, **EXACT)


@pytest.mark.parametrize("name", ["blocks", "matched", "binary", "no bias"])
def test_reductions_and_statistics_in_training_mode(name):
    ours, plain = (make(name).train() for _ in range(2))
    x, y = batch(ours)
    for reduction in ("mean", "sum"):
        found = ours.loss(x, y, reduction=reduction)
        torch.testing.assert_close(found, F.cross_entropy(plain(x), y, reduction=reduction), **EXACT)
    for own, other in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["blocks", "matched", "binary", "orthogonal"])
def test_distributions_over_all_classes_and_over_few(name, smoothing):
    head = make(name, fast=True)
    x, y = batch(head)
    other = torch.cat([y[1:], y[:1]])
    classes = torch.stack([y, other, y], dim=1)  # a class twice
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).repeat(len(y), 1)
    whole = torch.zeros(len(y), head.out_features, dtype=torch.float64).scatter_add_(1, classes, weights)
    for target in (whole, SoftTarget(classes, weights)):
        plain = F.cross_entropy(head(x), whole, label_smoothing=smoothing, reduction="none")
        ours = head.loss(x, target, label_smoothing=smoothing, reduction="none")
        assert_same(head, x, ours, plain, **EXACT)


@pytest.mark.parametrize("margin", [CosFace(0.35), ArcFace(0.5), ArcFace(3.0)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["blocks", "fast", "matched", "no bias", "orthogonal", "simplex", "fast, few classes"])
def test_margins(name, margin, smoothing):
    head = make(name)
    x, y = batch(head)
    logits = head(x)
    offset = 0.0 if head.bias is None else head.bias[y]
    cosine = (logits.gather(1, y[:, None])[:, 0] - offset) / head.scale
    angle = torch.acos(cosine)
    if isinstance(margin, CosFace):
        moved = cosine - margin.margin
    else:
        past = cosine - margin.margin * np.sin(margin.margin)
        moved = torch.where(angle + margin.margin < np.pi, torch.cos(angle + margin.margin), past)
    plain = logits.scatter(1, y[:, None], (moved * head.scale + offset)[:, None])
    plain = F.cross_entropy(plain, y, label_smoothing=smoothing, reduction="none")
    ours = head.loss(x, y, margin=margin, label_smoothing=smoothing, reduction="none")
    assert_same(head, x, ours, plain, rtol=1e-8, atol=1e-10)


def test_a_margin_with_a_single_class_has_no_loss():
    head = make("one class")
    x, y = batch(head)
    value = head.loss(x, y, margin=CosFace())
    value.backward()
    assert value.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("name", ["blocks", "matched", "binary"])
def test_gradcheck(name):
    head = make(name, fast=True)
    x, y = batch(head, size=2)
    leaves = _leaves(head)

    def loss(x, *_leaves):
        return head.loss(x, y, label_smoothing=0.1, margin=None if name == "binary" else ArcFace(0.3))

    few = [x, *(leaf for leaf in leaves if leaf.numel() < 100)]
    assert torch.autograd.gradcheck(loss, few)


@pytest.mark.parametrize("name", ["blocks", "fast"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 62.0, 64.0, 5000.0])
def test_large_logits_neither_overflow_nor_vanish(scale, name):
    head = make(name, dtype=torch.float32)
    with torch.no_grad():
        head.scale.fill_(scale)
    x, y = batch(head, dtype=torch.float32)
    wanted = F.cross_entropy(head.double()(x.double()), y, reduction="none")
    found = head.float().loss(x, y, reduction="none")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["blocks", "matched", "binary"])
def test_autocast_gives_a_float32_loss_near_the_exact_one(name):
    head = make(name, dtype=torch.float32, fast=True)
    x, y = batch(head, dtype=torch.float32)
    wanted = head.loss(x, y)
    (exact,) = torch.autograd.grad(wanted, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.loss(x, y)
    (gradient,) = torch.autograd.grad(found, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert F.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99


def test_half_precision_features():
    head = make("blocks", dtype=torch.bfloat16)
    x, y = batch(head, dtype=torch.bfloat16)
    found = head.loss(x, y)
    (gradient,) = torch.autograd.grad(found, x)
    assert found.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.cross_entropy(head(x).float(), y), rtol=0.02, atol=0.02)


def test_feature_maps_and_other_leading_dimensions():
    head = make("blocks")
    x, y = batch(head, size=12)
    flat = head.loss(x, y, reduction="none")
    whole = head.loss(x.view(3, 4, -1), y.view(3, 4), reduction="none")
    assert whole.shape == (3, 4)
    torch.testing.assert_close(whole.flatten(), flat)
    maps = FixedClassifier(HEADS["blocks"], scale=9.0, channel_dim=1, dtype=torch.float64).eval()
    maps.load_state_dict(head.state_dict())
    pixels = x.view(3, 2, 2, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps.loss(pixels, y.view(3, 2, 2)), flat.mean())
    torch.testing.assert_close(maps.loss(pixels, y.view(3, 2, 2)), F.cross_entropy(maps(pixels), y.view(3, 2, 2)))


def test_an_empty_batch():
    head = make("blocks")
    assert head.loss(torch.zeros(0, 16, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), reduction="sum") == 0


@pytest.mark.parametrize("name", ["blocks", "fast"])
@pytest.mark.parametrize("margin", [None, CosFace(0.2)])
def test_which_samples_are_right(margin, name):
    head = make(name)
    x, y = batch(head, size=40)
    y[::2] = head(x[::2]).argmax(dim=1)
    _, right = head.losses_of_scaled(head.scaled_features(x), y, margin=margin)
    assert right.tolist() == (head(x).argmax(dim=1) == y).tolist()
    z, whole = head.scaled_features(x), F.one_hot(y, head.out_features).double()
    for target in (whole, SoftTarget(y[:, None].repeat(1, 2), torch.tensor([[0.7, 0.3]]).repeat(40, 1))):
        assert head.losses_of_scaled(z, target)[1].tolist() == right.tolist()


def refused(head, x, y):
    n = len(y)
    wide = y[:, None].repeat(1, 2)
    return {
        "label out of range": lambda: head.loss(x, y + head.out_features),
        "negative label": lambda: head.loss(x, y - head.out_features),
        "too few labels": lambda: head.loss(x, y[1:]),
        "distributions of other classes": lambda: head.loss(x, torch.zeros(n, 3)),
        "weights of another shape": lambda: head.loss(x, SoftTarget(wide, torch.ones(n, 3))),
        "smoothing": lambda: head.loss(x, y, label_smoothing=1.5),
        "margin of distributions": lambda: head.loss(x, SoftTarget(wide, wide.double()), margin=CosFace()),
    }


@pytest.mark.parametrize("case", refused(None, None, torch.zeros(1)))
def test_refusals(case):
    head = make("blocks")
    with pytest.raises(HeadSpecError):
        refused(head, *batch(head))[case]()


def test_a_margin_needs_cosines():
    head = make("binary")
    with pytest.raises(HeadSpecError, match="normalised"):
        head.loss(*batch(head), margin=CosFace())


def test_the_backward_pass_keeps_no_logits(monkeypatch):
    head = make("fast", dtype=torch.float32)
    x, y = batch(head, size=8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        head.loss(x, y)
    assert max(kept) <= max(x.numel(), head.out_features)


# Classes that are shared by processes.


def one_process(rank, size, folder, names):
    """Compute losses and gradients of this process's share of a batch, with its share of the classes."""
    torch.set_num_threads(1)
    loss_module.BLOCK_LOGITS, loss_module.PAIR_LOGITS, loss_module._LEAST_CLASSES = 1, 1, 7
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    answers = {}
    for name, margin in names:
        head = make(name)
        x, y = batch(head, size=8)
        mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
        own = x.detach()[mine].clone().requires_grad_()
        value = head.loss(own, y[mine], label_smoothing=0.1, margin=margin, group=dist.group.WORLD, reduction="none")
        weights = torch.arange(1.0, 9.0, dtype=torch.float64)[mine]
        found = [gradient for gradient in gradients(head, own, value @ weights) if gradient is not None]
        answers[name] = [value.detach(), *found]
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(answers))
    dist.destroy_process_group()


@pytest.mark.parametrize("_block_size", [1], indirect=True)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_share_the_classes_equal_one(tmp_path, size, _block_size):
    names = [("blocks", None), ("matched", None), ("binary", None), ("no bias", CosFace(0.3)), ("one block", None)]
    run_together(__file__, [(rank, size, tmp_path, names) for rank in range(size)])
    parts = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(size)]
    for name, margin in names:
        head = make(name)
        x, y = batch(head, size=8)
        value = head.loss(x, y, label_smoothing=0.1, margin=margin, reduction="none")
        wanted = gradients(head, x, value @ torch.arange(1.0, 9.0, dtype=torch.float64))
        wanted = [gradient for gradient in wanted if gradient is not None]
        losses, of_x, *others = zip(*(part[name] for part in parts), strict=True)
        torch.testing.assert_close(torch.cat(losses), value, **EXACT)
        torch.testing.assert_close(torch.cat(of_x), wanted[0], **EXACT)
        for found, expected in zip(others, wanted[1:], strict=True):
            torch.testing.assert_close(torch.stack(found).sum(dim=0), expected, **EXACT)


if __name__ == "__main__":  # a process of `test_processes_that_share_the_classes_equal_one`
    one_process(*globals()["GIVEN"])
