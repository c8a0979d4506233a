"""The stored projection of a binary head: planes, water-filling, the search, the choice, and the layer."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, coherence, feature_statistics, replacement
from fixify.heads.editing import add_classes, keep_classes, merge_classes
from fixify.heads.fitting import projection_moment
from fixify.heads.level_search import CenteredRows
from fixify.heads.levels import PLANES
from fixify.heads.projection import (
    Projection,
    bits_of,
    coordinates_of,
    levels_of_signs,
    signs_of_levels,
    weights_of,
)
from fixify.heads.projection_choice import choose_projection, may_be_projected, projected_spec
from fixify.heads.projection_search import Principal, round_projected, water_filling

N, C, S = 32, 300, 400


def _classifier(
    num_features: int = N, num_classes: int = C, rank: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make a classifier whose features vary in few directions, and samples near its classes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(rank, num_features, generator=generator) * torch.linspace(2, 0.5, rank)[:, None]
    weight = torch.randn(num_classes, rank, generator=generator) @ mix
    bias = 0.1 * torch.randn(num_classes, generator=generator)
    noise = 0.1 * torch.randn(S, num_features, generator=generator)
    features = weight[torch.randint(num_classes, (S,), generator=generator)] * 0.1 + noise + 0.5
    return weight, bias, features


@pytest.fixture(scope="module")
def made() -> FixedClassifier:
    """Return a head of 24 signs in 8 projected coordinates."""
    weight, bias, features = _classifier()
    spec = HeadSpec(
        "binary",
        N,
        C,
        bits_per_class=24,
        planes=(8, 6, 5, 5),
        gains=True,
        normalize=False,
        standardize="center",
    )
    return replacement(spec, weight, bias, features=features).head.eval()


def test_signs_and_levels_are_the_same_numbers() -> None:
    planes = (5, 3, 3, 1)
    rng = np.random.default_rng(0)
    top = 2 ** bits_of(planes) - 1
    levels = np.stack([rng.integers(0, top + 1) * 2 - top for _ in range(7)])
    packed = signs_of_levels(levels, planes)
    assert packed.shape == (7, 2)
    assert np.array_equal(levels_of_signs(packed, planes), levels)
    signs = 1 - 2 * np.unpackbits(packed, axis=1, count=12).astype(np.int64)
    summed = np.zeros_like(levels)
    np.add.at(summed, (slice(None), coordinates_of(planes)), signs * weights_of(planes).astype(np.int64))
    assert np.array_equal(summed, levels)


@pytest.mark.parametrize("levels", PLANES)
def test_the_noise_of_levels_is_that_of_max(levels) -> None:
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / (-x.square() / 2).exp().sum()
    rounded = ((x / levels.step).floor() * 2 + 1).clamp(-levels.largest, levels.largest) * levels.step / 2
    assert float(((x - rounded).square() * density).sum()) == pytest.approx(levels.noise, rel=0.03)


@pytest.mark.parametrize(("classes", "num_bytes"), [(2000, 2000 * 8), (50_000, 50_000 * 5), (300, 300 * 4)])
def test_water_filling_spends_what_there_is(classes, num_bytes) -> None:
    variances = 0.8 ** torch.arange(64, dtype=torch.float64)
    planes = water_filling(variances, classes, num_bytes)
    spent = classes * (sum(planes) // 8) + planes[0] * (64 + 4)
    assert sum(planes) % 8 == 0
    assert spent <= num_bytes
    # neither a byte per class more, nor 8 directions' worth of bytes per class, is left
    assert num_bytes - spent < classes + 64 + 4
    # reverse water-filling: no sign moved to another coordinate would lower the error
    noises = [1.0, *(levels.noise for levels in PLANES)]
    bits = [*bits_of(planes).tolist(), *[0] * (64 - planes[0])]
    lost = [float(v) * (noises[b - 1] - noises[b]) for v, b in zip(variances, bits, strict=True) if b]
    won = [float(v) * (noises[b] - noises[b + 1]) for v, b in zip(variances, bits[: planes[0]], strict=False) if b < 6]
    assert max(won) <= min(lost)


def test_water_filling_pays_for_no_projection_of_few_classes() -> None:
    assert water_filling(torch.ones(64), num_classes=20, num_bytes=20 * 2) == ()
    assert water_filling(torch.zeros(64), num_classes=2000, num_bytes=2000 * 8) == ()


def test_principal_directions_have_unit_moment_and_sorted_variances() -> None:
    weight, _, features = _classifier()
    moment = projection_moment(feature_statistics(features).covariance)
    rows = CenteredRows(weight, weight.mean(dim=0))
    found = Principal.of(rows, moment)
    assert torch.allclose(found.directions.T @ moment @ found.directions, torch.eye(N, dtype=torch.float64), atol=1e-6)
    assert bool((found.variances.diff() <= 1e-9).all())
    coordinates = rows[:].double() @ found.axes
    assert torch.allclose(coordinates @ found.directions.T, rows[:].double(), atol=1e-4)
    assert torch.allclose(coordinates.square().mean(dim=0), found.variances, rtol=1e-4, atol=1e-6)


def test_the_head_is_its_dense_product(made) -> None:
    x = _classifier()[2][:33]
    q = made.codebook().double()
    center, bias = made.mean.double(), made.bias.double()
    exact = made.scale.double() * ((x.double() - center) @ q.T) + bias
    # the rounding of a float32 product with the dense matrix, twice
    dense = made.scale * F.linear(x - made.mean, made.codebook()) + made.bias
    allowed = 2 * (dense.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    with torch.inference_mode():
        several, one = made(x), torch.cat([made(row[None]) for row in x])
    learning = copy.deepcopy(made).train()
    learning.keeps_statistics = True
    for logits in (several, one, made(x), learning(x)):
        assert (logits.detach().double() - exact).abs().max() <= allowed


def test_levels_are_read_from_signs(made) -> None:
    stored = made.product.projection
    levels = levels_of_signs(made.codes.numpy(), made.spec.planes)
    assert np.abs(levels).max(axis=0).tolist() <= (2 ** bits_of(made.spec.planes) - 1).tolist()
    dense = levels @ (stored.directions * stored.steps[:, None]) * 24**-0.5
    dense = torch.from_numpy(dense).float() * made.row_scales[:, None]
    assert torch.allclose(made.codebook(), dense, atol=1e-6)


def test_it_answers_as_the_old_classifier_and_better_than_rotated_signs(made) -> None:
    weight, bias, features = _classifier()
    wanted = F.linear(features, weight, bias).argmax(dim=1)
    spec = HeadSpec("binary", N, C, bits_per_class=24, gains=True, standardize="center")
    rotated = replacement(spec, weight, bias, features=features).head.eval()
    with torch.inference_mode():
        same = [float((head(features).argmax(dim=1) == wanted).double().mean()) for head in (made, rotated)]
    assert same[0] > same[1] + 0.1


def test_blocked_loss_top_k_and_gradient(made) -> None:
    x = _classifier()[2][:16].requires_grad_()
    target = torch.arange(16)
    logits = made(x)
    plain = F.cross_entropy(logits, target)
    (wanted,) = torch.autograd.grad(plain, x)
    loss = made.loss(x, target)
    (got,) = torch.autograd.grad(loss, x)
    assert torch.allclose(loss, plain, rtol=1e-4)
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert float(wanted.abs().max()) > 0
    assert torch.equal(made.top_k(x, 3).classes, logits.topk(3).indices)


def test_fine_tuning_leaves_codes_and_projection(made) -> None:
    head = copy.deepcopy(made).train()
    weight, bias, features = _classifier()
    wanted = F.linear(features, weight, bias).argmax(dim=1)
    assert [name for name, _ in head.named_parameters()] == ["scale", "bias"]
    optimiser = torch.optim.SGD(head.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    F.cross_entropy(head(features), wanted).backward()
    optimiser.step()
    after = head.state_dict()
    same = ("codes", "projection", "projection_steps", "gains")
    assert all(torch.equal(after[name], before[name]) for name in same)
    assert not torch.equal(after["bias"], before["bias"])


def test_signs_of_a_projection_are_not_learned(made) -> None:
    with pytest.raises(HeadSpecError, match="levels"):
        copy.deepcopy(made).train().learn_signs_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(made, dtype) -> None:
    head = copy.deepcopy(made).to(dtype)
    x = _classifier()[2][:20]
    with torch.inference_mode():
        wanted, got = made(x), head(x.to(dtype))
    assert got.dtype == dtype
    allowed = {torch.float16: 0.01, torch.bfloat16: 0.08, torch.float64: 1e-5}[dtype]
    assert (got.float() - wanted).abs().max() <= allowed * wanted.abs().max()


def test_state_dict_meta_and_copies(made) -> None:
    x = _classifier()[2][:5]
    wanted = made(x)
    assert {tensor.name for tensor in made.spec.stored_tensors} == {*made.state_dict()}
    for tensor in made.spec.stored_tensors:
        assert tuple(made.state_dict()[tensor.name].shape) == tensor.shape
    again = FixedClassifier(made.spec)
    with pytest.raises(HeadSpecError):
        again(x)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.eval()(x), wanted)
    with torch.device("meta"):
        blank = FixedClassifier(made.spec)
    blank.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(blank.eval()(x), wanted)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)
    moved = copy.deepcopy(made).to("meta").to_empty(device="cpu")
    moved.reset_parameters()
    assert torch.equal(moved.projection, made.projection)
    assert torch.equal(moved.projection_steps, made.projection_steps)


def test_the_digest_covers_the_projection(made) -> None:
    state = {name: value.clone() for name, value in made.state_dict().items()}
    state["projection"][0, 0] += 1
    with pytest.raises(CodebookMismatchError):
        FixedClassifier(made.spec).load_state_dict(state)
    changed = copy.deepcopy(made)
    changed.projection[0, 0] += 1
    with pytest.raises(CodebookMismatchError):
        changed.check_codes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("projection", torch.zeros(8, N, dtype=torch.uint8)),
        ("projection", torch.zeros(8, N)),
        ("projection", torch.zeros(9, N, dtype=torch.int8)),
        ("projection_steps", torch.ones(9)),
        ("projection_steps", torch.ones(8, dtype=torch.int8)),
        ("projection_steps", torch.zeros(8)),
        ("projection_steps", torch.full((8,), float("nan"))),
    ],
)
def test_tensors_that_do_not_fit_are_refused(made, name, value) -> None:
    with pytest.raises(RuntimeError, match=name):
        FixedClassifier(made.spec).load_state_dict({**made.state_dict(), name: value})


def test_missing_projection_is_a_missing_key(made) -> None:
    state = made.state_dict()
    del state["projection"]
    with pytest.raises(RuntimeError, match="projection"):
        FixedClassifier(made.spec).load_state_dict(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"planes": ()},
        {"planes": (25,)},
        {"planes": (8, 9, 7)},
        {"planes": (33, 1)},
        {"planes": (12, 12, 0)},
        {"planes": (12.0, 12)},
        {"planes": (True, 23)},
        {"planes": "8844"},
        {"planes": (4,) * 6 + (1,)},
        {"planes": [12, 12], "gains": False},
        {"planes": [12, 12], "bits_per_class": None, "bits_per_weight": 2},
        {"planes": [12, 12], "construction": "sylvester-32"},
        {"planes": [12, 12], "kind": "hadamard", "bits_per_class": None},
    ],
)
def test_hostile_specs(changes) -> None:
    fields = {"kind": "binary", "num_features": N, "num_classes": C, "bits_per_class": 24, "gains": True}
    assert HeadSpec.from_dict({**fields, "planes": [12, 12]}).planes == (12, 12)
    with pytest.raises(HeadSpecError):
        HeadSpec.from_dict({**fields, **changes})


def test_a_huge_projection_is_refused_before_anything_is_allocated() -> None:
    n = 1 << 14
    with pytest.raises(HeadSpecError, match="beyond the limit"):
        HeadSpec("binary", n, 100, bits_per_class=n, planes=(n,), gains=True)


def test_specs_survive_json_and_say_what_they_are(made) -> None:
    spec = made.spec
    assert HeadSpec.from_dict(spec.to_dict()) == spec
    assert spec.to_dict()["planes"] == [8, 6, 5, 5]
    assert spec.num_stored_signs == 24 * C
    # 24 signs, a row scale, and 8 directions of 32 bytes with steps of 4, for 300 classes
    assert spec.bytes_per_class == 3 + 1 + 1
    assert "8 projected coordinates" in spec.description
    assert "planes=(8, 6, 5, 5)" in repr(made)


def test_coherence_is_that_of_unit_codes(made) -> None:
    found = coherence(made.spec, made.codes.numpy(), made.product.projection)
    assert found.max_abs <= 1 + 1e-6


def test_it_needs_features() -> None:
    weight, bias, _ = _classifier()
    spec = HeadSpec("binary", N, C, bits_per_class=24, planes=(12, 12), gains=True)
    with pytest.raises(HeadSpecError, match="moment"):
        replacement(spec, weight, bias)


def test_the_choice_takes_no_more_bytes_and_the_nearer_head() -> None:
    weight, bias, features = _classifier()
    spec = HeadSpec("binary", N, C, bits_per_class=24, gains=True, standardize="center")
    found = choose_projection(spec, weight, bias, features)
    assert found.projected < found.rotated
    assert found.spec.planes is not None
    assert found.spec.bytes_per_class <= spec.bytes_per_class
    assert found.spec.standardize == "center"


def test_the_choice_keeps_rotated_signs_of_few_classes() -> None:
    weight, bias, features = _classifier(num_classes=40)
    spec = HeadSpec("binary", N, 40, bits_per_class=8, gains=True, standardize="center")
    assert projected_spec(spec, weight, features) is None
    assert choose_projection(spec, weight, bias, features).spec is spec


@pytest.mark.parametrize(("signs", "classes", "wanted"), [(16, 33, True), (32, 33, True), (16, 32, False)])
def test_signs_of_many_classes_may_be_projected(signs, classes, wanted) -> None:
    assert may_be_projected(HeadSpec("binary", N, classes, bits_per_class=signs)) == wanted
    assert not may_be_projected(HeadSpec("binary", N, classes, bits_per_weight=2, gains=True))


def test_the_choice_without_variance_keeps_rotated_signs() -> None:
    weight, _, features = _classifier()
    spec = HeadSpec("binary", N, C, bits_per_class=24, gains=True, standardize="center")
    assert projected_spec(spec, weight, torch.ones_like(features)) is None


def test_classes_are_kept_and_merged(made) -> None:
    x = _classifier()[2][:50]
    kept = keep_classes(made, [5, 3, 200])
    assert torch.allclose(kept(x), made(x)[:, [5, 3, 200]], rtol=1e-4, atol=1e-3)
    assert kept.spec.planes == made.spec.planes
    merged = merge_classes(made, [7, 9])
    assert merged.out_features == C - 1
    others = [number for number in range(C) if number not in (7, 9)]
    places = [number for number in range(C - 1) if number != 7]
    assert torch.allclose(merged(x)[:, places], made(x)[:, others], rtol=1e-4, atol=1e-3)
    centered = made.codebook() - made.codebook().mean(dim=0)
    mean = centered[[7, 9]].mean(dim=0)
    own = merged.codebook()[7] - made.codebook().mean(dim=0)
    assert float(F.cosine_similarity(own, mean, dim=0)) > 0.9


def test_a_class_is_added_by_its_mean_features() -> None:
    """Leave a class out, add it by its features, and find that it is told from the others."""
    weight, bias, _ = _classifier()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(C, (2000,), generator=generator)
    features = weight[labels] * 0.1 + 0.1 * torch.randn(2000, N, generator=generator) + 0.5
    spec = HeadSpec("binary", N, C - 1, bits_per_class=24, planes=(8, 6, 5, 5), gains=True, standardize="center")
    spec = replace(spec, normalize=False)
    head = replacement(spec, weight[1:], bias[1:], features=features[labels > 0]).head.eval()
    own = weight[0] * 0.1 + 0.1 * torch.randn(100, N, generator=generator) + 0.5
    more = add_classes(head, 1, (own.mean(dim=0) - head.mean)[None])
    unlike = add_classes(head, 1)
    x = torch.cat([own, features[labels > 0][:500]])
    is_own = torch.arange(len(x)) < len(own)

    def separation(made: FixedClassifier) -> float:
        """Compute how often the logit of the new class is larger for its own samples than for others."""
        logits = made(x)[:, -1]
        return float((logits[is_own][:, None] > logits[~is_own]).double().mean())

    old = x @ weight[0]
    wanted = float((old[is_own][:, None] > old[~is_own]).double().mean())
    assert separation(more) > wanted - 0.05
    assert separation(unlike) < wanted - 0.1
    with pytest.raises(HeadSpecError):
        add_classes(head, 1, weight[:1], lengths=True)


def test_rounding_without_a_metric_is_near(made) -> None:
    planes = made.spec.planes
    levels = torch.from_numpy(levels_of_signs(made.codes.numpy(), planes)).float()
    packed, gains = round_projected(levels * 200.0, planes, 255.0)
    again = torch.from_numpy(levels_of_signs(packed, planes)).float() * gains[:, None]
    assert float(F.cosine_similarity(again, levels, dim=1).min()) > 0.9


def test_a_projection_that_does_not_fit_is_refused(made) -> None:
    known = made.product.projection
    with pytest.raises(HeadSpecError):
        Projection((9, 6), known.directions, known.steps)
    with pytest.raises(HeadSpecError):
        Projection(known.planes, known.directions.astype(np.int16), known.steps)
    with pytest.raises(HeadSpecError):
        Projection(known.planes, known.directions, -known.steps)
    with pytest.raises(HeadSpecError):
        FixedClassifier(made.spec, codes=made.codes)
    wrong = Projection(known.planes, known.directions[:, 1:].copy(), known.steps)
    with pytest.raises(HeadSpecError):
        FixedClassifier(made.spec, codes=made.codes, projection=wrong)
