from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fixify.errors import HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, feature_statistics, fit_, match
from fixify.heads.statistics import floored

C, N, S = 40, 64, 240


def _features(samples: int = S, seed: int = 0) -> torch.Tensor:
    """Rectified and correlated, as those of a network: uneven spread, mean far from 0."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(N, N, generator=generator) * torch.linspace(0.2, 2, N)
    generator.manual_seed(seed)
    return F.relu(torch.randn(samples, N, generator=generator) @ mixing * 0.2 + 1.0)


def _teacher() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(C, N, generator=generator) * 0.5, torch.randn(C, generator=generator)


def _head(weight: torch.Tensor, features: torch.Tensor, **options: bool) -> FixedClassifier:
    """Codes matched to the weight, center and spread of the features, as `convert --calibrate` makes it."""
    found_at = feature_statistics(features, standardize=options.get("standardize", True))
    found = match(weight * found_at.spread, feature_covariance=found_at.covariance)
    spec = HeadSpec("hadamard", N, C, **{"standardize": True, **options}, matched=True, blocks=found.blocks)  # type: ignore[arg-type]
    head = FixedClassifier(spec, codes=torch.from_numpy(found.codes))
    return head.calibrate_(features.split(32)) if spec.standardize else head


@torch.no_grad()
def _divergence(head: FixedClassifier, weight: torch.Tensor, bias: torch.Tensor, features: torch.Tensor) -> float:
    ours, theirs = head.eval()(features), F.linear(features, weight, bias)
    return float(F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"))


def test_statistics_are_those_of_the_standardised_features() -> None:
    features = _features()
    features[:, 5] = 3.0  # dead: its deviation is floored
    found = feature_statistics(features)
    x = features.double().numpy()
    deviation = np.maximum(x.std(axis=0), 0.05 * x.std(axis=0).mean())
    np.testing.assert_allclose(found.center.numpy(), x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.spread.numpy(), deviation, rtol=1e-6)
    covariance = np.cov((x / deviation).T, bias=True)
    expected = 0.6 * covariance + 0.4 * np.trace(covariance) / N * np.eye(N)
    np.testing.assert_allclose(found.covariance.numpy(), expected, atol=1e-6)


def test_without_standardising_the_covariance_is_that_of_the_features() -> None:
    features = _features()
    found = feature_statistics(features, standardize=False)
    assert not found.center.any() and (found.spread == 1).all()
    centered = feature_statistics(features, standardize="center")
    torch.testing.assert_close(centered.center, features.mean(dim=0))
    assert torch.equal(centered.spread, found.spread) and torch.equal(centered.covariance, found.covariance)
    off_diagonal = ~torch.eye(N, dtype=torch.bool)
    expected = 0.6 * torch.cov(features.double().T, correction=0)
    torch.testing.assert_close(found.covariance[off_diagonal], expected[off_diagonal])


def test_fewer_samples_than_features_give_a_covariance_of_full_rank() -> None:
    values = torch.linalg.eigvalsh(feature_statistics(_features(8)).covariance)
    assert values.min() > 0.01 * values.mean()


def test_a_classifier_that_is_a_head_already_is_found_again() -> None:
    """W sigma = alpha Q: the bias then takes exactly b + W mu, and the logits are the old ones."""
    features = _features()
    head = _head(_teacher()[0], features, normalize=False)
    assert head.center is not None and head.spread is not None and head.bias is not None
    weight = 3.0 * head.codebook() / floored(head.spread)
    bias = _teacher()[1]
    fit = fit_(head, features, weight, bias)
    assert fit.scale == pytest.approx(3.0, rel=1e-3)
    assert fit.mean_share == pytest.approx(1.0, abs=1e-3)
    expected = bias + weight @ head.center
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
    assert head.center is not None and head.bias is not None
    expected = bias + weight @ head.center
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
