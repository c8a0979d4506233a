from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fixify.errors import HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, encode, feature_statistics, fit_, initial_scale, match, replacement
from fixify.heads import fitting as module
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.fitting import level_moment, prior_moment
from fixify.heads.kinds import BINARY
from fixify.heads.statistics import floor_std

C, N, S = 40, 64, 240


def _features(samples: int = S, seed: int = 0) -> torch.Tensor:
    """Rectified and correlated, as those of a network: uneven std, mean far from 0."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(N, N, generator=generator) * torch.linspace(0.2, 2, N)
    generator.manual_seed(seed)
    return F.relu(torch.randn(samples, N, generator=generator) @ mixing * 0.2 + 1.0)


def _teacher() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(C, N, generator=generator) * 0.5, torch.randn(C, generator=generator)


def _head(weight: torch.Tensor, features: torch.Tensor, **options: bool) -> FixedClassifier:
    """Codes matched to the weight, mean and std of the features, as `convert --calibrate` makes it."""
    found_at = feature_statistics(features, standardize=options.get("standardize", True))
    found = match(weight * found_at.std, feature_covariance=found_at.covariance)
    spec = HeadSpec("hadamard", N, C, **{"standardize": True, **options}, matched=True, blocks=found.blocks)  # type: ignore[arg-type]
    head = FixedClassifier(spec, codes=torch.from_numpy(found.codes))
    return head.calibrate_(features.split(32)) if spec.standardize else head


@torch.no_grad()
def _divergence(head: FixedClassifier, weight: torch.Tensor, bias: torch.Tensor, features: torch.Tensor) -> float:
    ours, theirs = head.eval()(features), F.linear(features, weight, bias)
    return float(F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"))


def test_statistics_are_those_of_the_standardised_features() -> None:
    features = _features()
    features[:, 5] = 3.0  # dead: its std is floored
    found = feature_statistics(features)
    x = features.double().numpy()
    deviation = np.maximum(x.std(axis=0), 0.05 * x.std(axis=0).mean())
    np.testing.assert_allclose(found.mean.numpy(), x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std.numpy(), deviation, rtol=1e-6)
    covariance = np.cov((x / deviation).T, bias=True)
    expected = 0.6 * covariance + 0.4 * np.trace(covariance) / N * np.eye(N)
    np.testing.assert_allclose(found.covariance.numpy(), expected, atol=1e-6)


def test_without_standardising_the_covariance_is_that_of_the_features() -> None:
    features = _features()
    found = feature_statistics(features, standardize=False)
    assert not found.mean.any() and (found.std == 1).all()
    centered = feature_statistics(features, standardize="center")
    torch.testing.assert_close(centered.mean, features.mean(dim=0))
    assert torch.equal(centered.std, found.std) and torch.equal(centered.covariance, found.covariance)
    off_diagonal = ~torch.eye(N, dtype=torch.bool)
    expected = 0.6 * torch.cov(features.double().T, correction=0)
    torch.testing.assert_close(found.covariance[off_diagonal], expected[off_diagonal])


def test_fewer_samples_than_features_give_a_covariance_of_full_rank() -> None:
    values = torch.linalg.eigvalsh(feature_statistics(_features(8)).covariance)
    assert values.min() > 0.01 * values.mean()


def test_the_metric_of_levels_is_of_samples_and_classes() -> None:
    """With one sample per two features it is positive definite, and its trace is the covariance's."""
    x = _features(N // 2)
    covariance = feature_statistics(x, standardize="center").covariance
    weight = _teacher()[0]
    moment = level_moment(covariance, weight)
    assert float(torch.linalg.eigvalsh(moment)[0]) > 0
    assert float(moment.trace()) == pytest.approx(float(covariance.trace()), rel=0.05)
    centered, mean = (weight - weight.mean(dim=0)).double(), x.double().mean(dim=0)
    sampled = (x.double() - mean).T @ (x.double() - mean) / len(x)
    off = ~torch.eye(N, dtype=torch.bool)
    classes = centered.T @ centered
    expected = 0.3 * sampled + 0.35 * classes * sampled.diagonal().mean() / classes.diagonal().mean()
    torch.testing.assert_close(moment[off], expected[off], rtol=1e-4, atol=1e-5)


def test_without_samples_the_metric_is_of_classes_and_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _teacher()[0] * torch.linspace(0.1, 2, N)
    moment = prior_moment(weight)
    assert moment is not None and float(torch.linalg.eigvalsh(moment.double())[0]) > 0.5
    classes = torch.cov(weight.T, correction=0)
    share = 0.6 * (C / N) ** 0.5
    expected = (1 - share) * torch.eye(N) + share * classes / classes.diagonal().mean() + 0.1
    torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "_PRIOR_WORK", C * N * N - 1)
    assert prior_moment(weight) is None


@pytest.mark.parametrize("bits", [1, 2])
def test_the_metric_without_samples_brings_answers_nearer(bits: int) -> None:
    """The features of a trained network lie in the directions of its classes, around a mean that is not 0."""
    weight = _teacher()[0] @ torch.diag(torch.logspace(0, -1, N)) * 2
    bias, draw = torch.zeros(C), torch.Generator().manual_seed(1)
    x = weight[torch.randint(C, (500,), generator=draw)] + 0.3 * torch.randn(500, N, generator=draw) + 1.0
    spec = HeadSpec("binary", N, C, **BINARY.default_options(N, has_features=False, bits_per_weight=bits))
    plain = encode(spec, weight)
    codes, gains = torch.from_numpy(plain.codes), torch.from_numpy(plain.gains)
    rounded = FixedClassifier(spec, codes=codes, gains=gains, scale=plain.scale)
    with torch.no_grad():
        rounded.bias.zero_()
    assert _divergence(replacement(spec, weight, bias).head, weight, bias, x) < 0.8 * _divergence(
        rounded, weight, bias, x
    )


def test_a_classifier_that_is_a_head_already_is_found_again() -> None:
    """W sigma = alpha Q: the bias then takes exactly b + W mu, and the logits are the old ones."""
    features = _features()
    head = _head(_teacher()[0], features, normalize=False)
    assert head.mean is not None and head.std is not None and head.bias is not None
    weight = 3.0 * head.codebook() / floor_std(head.std)
    bias = _teacher()[1]
    fit = fit_(head, features, weight, bias)
    assert fit.scale == pytest.approx(3.0, rel=1e-3)
    assert fit.mean_share == pytest.approx(1.0, abs=1e-3)
    expected = bias + weight @ head.mean
    torch.testing.assert_close(head.bias.detach(), expected - expected.mean(), atol=5e-3, rtol=0)
    new = _features(50, seed=9)
    old = F.linear(new, weight, bias)
    torch.testing.assert_close(
        head.eval()(new).detach(), old - old.mean(dim=1, keepdim=True) + head(new).detach().mean(dim=1, keepdim=True),
        atol=2e-2, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "share"), [({}, 0.8), ({"standardize": False}, 0.8), ({"bias": False}, 0.995)], ids=str
)
def test_fitting_brings_unseen_samples_nearer(options: dict[str, bool], share: float) -> None:
    weight, bias = _teacher()
    features, new = _features(), _features(500, seed=1)
    head = _head(weight, features, **options)
    before = _divergence(head, weight, bias, new)
    codes = head.codebook()
    fit = fit_(head, features, weight, bias)
    assert fit.refined
    assert _divergence(head, weight, bias, new) < share * before
    assert torch.equal(head.codebook(), codes)
    assert fit.scale == pytest.approx(head.scale.item()) and fit.scale > 0
    assert (fit.mean_share is None) == (head.bias is None)


def test_it_is_the_best_of_its_kind_on_its_samples() -> None:
    """Moving alpha either way from where it was put does not come nearer (few samples: the ridge holds the bias)."""
    weight, bias = _teacher()
    features = _features()
    head = _head(weight, features)
    fit = fit_(head, features, weight, bias)
    here = _divergence(head, weight, bias, features)
    for factor in (0.9, 1.1):
        with torch.no_grad():
            head.scale.fill_(factor * fit.scale)
        assert _divergence(head, weight, bias, features) > here


def test_a_given_scale_stays() -> None:
    weight, bias = _teacher()
    features = _features()
    head = _head(weight, features)
    with torch.no_grad():
        head.scale.fill_(5.0)
    assert fit_(head, features, weight, bias, fit_scale=False).scale == head.scale.item() == 5.0
    assert head.bias is not None and head.bias.any()
    bare = _head(weight, features, bias=False)
    before = bare.scale.item()
    assert not fit_(bare, features, weight, bias, fit_scale=False).refined
    assert bare.scale.item() == before


def test_codes_that_oppose_the_classes_do_not_turn_the_scale_round() -> None:
    weight, bias = _teacher()
    features = _features()
    head = _head(weight, features)
    before = head.scale.item()
    fit = fit_(head, features, -weight, bias)
    assert fit.scale == head.scale.item() == before


def test_too_few_samples_to_check_leave_the_closed_form() -> None:
    weight, bias = _teacher()
    head = _head(weight, _features(4))
    fit = fit_(head, _features(4), weight, bias)
    assert not fit.refined and fit.mean_share == 1.0
    assert head.mean is not None and head.bias is not None
    expected = bias + weight @ head.mean
    torch.testing.assert_close(head.bias.detach(), expected - expected.mean())


def test_it_draws_nothing_and_keeps_the_mode() -> None:
    weight, bias = _teacher()
    features = _features()
    heads = [_head(weight, features) for _ in range(2)]
    state = torch.get_rng_state()
    for head in heads:
        fit_(head, features, weight, bias)
        assert head.training and int(head.num_batches_tracked or 0) == max(10, -(-S // 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0].scale, heads[1].scale)


def test_sizes_that_do_not_fit_are_refused() -> None:
    weight, bias = _teacher()
    head = _head(weight, _features())
    with pytest.raises(HeadSpecError, match=r"40 classes and 64 features .* weight of shape \[40, 63\]"):
        fit_(head, _features(), weight[:, 1:], bias)
    with pytest.raises(HeadSpecError, match=r"features of shape \[240, 63\]"):
        fit_(head, _features()[:, 1:], weight, bias)


# --- Many logits


@pytest.mark.parametrize(
    "options", [{}, {"standardize": False}, {"bias": False}, {"normalize": False}], ids=lambda options: str(options)
)
@pytest.mark.parametrize("at_once", [1 << 21, 3 * C])
def test_many_logits_are_fitted_as_few_are(
    options: dict[str, bool], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = _teacher()
    features, new = _features(), _features(500, seed=1)
    head, large = (_head(weight, features, **options) for _ in range(2))
    fit = fit_(head, features, weight, bias)
    monkeypatch.setattr(module, "_MAX_LOGITS", 0)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_ROWS_OF_A_PRODUCT", 5)
    found = fit_(large, features, weight, bias)
    assert found.scale == pytest.approx(fit.scale, rel=3e-3)
    assert (found.mean_share, found.refined) == (pytest.approx(fit.mean_share, abs=1e-2), fit.refined)  # a flat optimum
    assert _divergence(large, weight, bias, new) == pytest.approx(_divergence(head, weight, bias, new), rel=1e-3)


def test_a_given_scale_stays_with_many_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LOGITS", 0)
    weight, bias = _teacher()
    head = _head(weight, _features())
    told: list[tuple[str, int, int]] = []
    scale = head.scale.item()
    fit = fit_(head, _features(), weight, bias, fit_scale=False, on_progress=lambda *now: told.append(now))
    assert fit.scale == head.scale.item() == scale
    assert head.bias is not None and head.bias.any()
    assert told and all(done <= total for _, done, total in told)
    with torch.no_grad():
        head.scale.fill_(0.0)
    assert fit_(head, _features(), weight, bias, fit_scale=False).scale == 0.0


def test_of_very_many_features_the_first_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LOGITS", 0)
    monkeypatch.setattr(module, "_LARGE_SAMPLES", N)
    weight, bias = _teacher()
    features = _features()
    one, other = (_head(weight, features) for _ in range(2))
    assert fit_(one, features, weight, bias) == fit_(other, features[:N], weight, bias)


# --- Replacement


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("hadamard", N, C),
        HeadSpec("hadamard", N, C, standardize=True),
        HeadSpec("binary", N, C, bits_per_class=24, gains=True, standardize="center"),
        HeadSpec("binary", N, C, bits_per_class=N, normalize=False),
    ],
    ids=lambda spec: f"{spec.kind}-{spec.standardize}",
)
def test_replacement_with_features_is_nearer_than_without(spec: HeadSpec) -> None:
    weight, bias = _teacher()
    features, new = _features(), _features(500, seed=1)
    fitted = replacement(spec, weight, bias, features=features).head
    plain = replacement(spec, weight, bias).head
    assert fitted.training and fitted.spec.digest is not None and fitted.spec.stores_codes
    assert _divergence(fitted, weight, bias, new) < _divergence(plain, weight, bias, new)
    assert torch.equal(plain.bias.detach(), bias)
    if spec.standardize:
        torch.testing.assert_close(fitted.mean, features.mean(dim=0))


def test_replacement_takes_convolutions_and_a_given_scale() -> None:
    weight, bias = _teacher()
    made = replacement(HeadSpec("hadamard", N, C), weight[:, :, None, None], bias, scale=7.0, channel_dim=1)
    assert made.head.scale.item() == 7.0
    assert "matched" in made.note
    assert made.head(torch.ones(2, N, 3, 3)).shape == (2, C, 3, 3)
    assert replacement(HeadSpec("hadamard", N, C), weight).head.scale.item() == pytest.approx(initial_scale(C))


def test_signs_without_row_scales_have_the_mean_length() -> None:
    weight, _ = _teacher()
    spec = HeadSpec("binary", N, C, bits_per_class=N, normalize=False)
    made, signs = replacement(spec, weight), encode(spec, weight, feature_moment=prior_moment(weight))
    assert made.head.row_scales is None
    assert made.head.scale.item() == pytest.approx(signs.scale * signs.gains.mean() / GAIN_STEPS)
    assert made.note == "64 signs per class taken from the old classifier"


@pytest.mark.parametrize("kind", ["orthogonal", "simplex", "identity"])
def test_codes_that_cannot_be_chosen_are_refused(kind: str) -> None:
    with pytest.raises(HeadSpecError, match=kind) as error:
        replacement(HeadSpec(kind, N, C), _teacher()[0])
    assert error.value.hint == "Those of hadamard and binary can."


def test_sizes_that_do_not_fit_a_replacement_are_refused() -> None:
    with pytest.raises(HeadSpecError, match=r"40 classes and 64 features .* \[40, 63\]"):
        replacement(HeadSpec("hadamard", N, C), _teacher()[0][:, 1:])
    with pytest.raises(HeadSpecError, match=r"\[samples, 64\], got shape \[240, 63\]"):
        replacement(HeadSpec("hadamard", N, C), _teacher()[0], features=_features()[:, 1:])
