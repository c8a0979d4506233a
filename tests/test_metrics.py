from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fixify.errors import DataError, UsageError
from fixify.metrics import Metrics, check_input_size, compare, evaluate, resolve_device

CPU = torch.device("cpu")


def batches(logits: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits.split(size), labels.split(size), strict=True))


def random_problem(seed: int, num_images: int, num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_images, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (num_images,), generator=generator)


def reference(logits: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    """The definitions, image by image, in float64."""
    top1 = top5 = loss = 0.0
    bins: dict[int, list[tuple[float, float]]] = {}
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        ranked = np.argsort(-probabilities)
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        loss -= math.log(probabilities[label])
        confidence = probabilities[ranked[0]]
        bins.setdefault(math.ceil(confidence * 15), []).append((confidence, float(ranked[0] == label)))
    n = len(labels)
    ece = sum(abs(sum(c for c, _ in inside) - sum(r for _, r in inside)) for inside in bins.values()) / n
    return 100 * top1 / n, 100 * top5 / n, loss / n, 100 * ece


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(1, 50), classes=st.integers(2, 12), size=st.integers(1, 20))
def test_metrics_are_the_definitions_whatever_the_batch_size(seed: int, images: int, classes: int, size: int) -> None:
    logits, labels = random_problem(seed, images, classes)
    found = evaluate(nn.Identity(), batches(logits, labels, size), device=CPU)
    assert (found.top1, found.top5, found.loss, found.ece) == pytest.approx(
        reference(logits, labels), rel=1e-5, abs=1e-4
    )
    assert found.num_images == images


def test_top5_of_fewer_than_five_classes_is_100() -> None:
    assert evaluate(nn.Identity(), batches(*random_problem(0, 20, 3), 8), device=CPU).top5 == 100


def test_a_confident_model_that_is_always_wrong_has_a_calibration_error_of_100_percent() -> None:
    logits = 100 * torch.eye(4)
    assert evaluate(nn.Identity(), [(logits, torch.arange(4))], device=CPU).ece == pytest.approx(0, abs=1e-4)
    assert evaluate(nn.Identity(), [(logits, torch.arange(4).roll(1))], device=CPU).ece == pytest.approx(100, abs=1e-4)


def test_modules_keep_their_own_modes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()
    before = model[0].running_mean.clone()
    evaluate(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))], device=CPU)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.equal(model[0].running_mean, before)


def test_half_precision_forward() -> None:
    logits, labels = random_problem(1, 40, 6)
    model = nn.Linear(6, 6)
    exact = evaluate(model, batches(logits, labels, 7), device=CPU)
    half = evaluate(model, batches(logits, labels, 7), device=CPU, amp="bf16")
    assert half.loss == pytest.approx(exact.loss, rel=0.02)
    assert half.loss != exact.loss


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError):
        evaluate(nn.Identity(), [], device=CPU)


def test_progress_is_reported_in_images() -> None:
    counts: list[int] = []
    evaluate(nn.Identity(), batches(*random_problem(0, 10, 3), 4), device=CPU, on_batch=counts.append)
    assert counts == [4, 8, 10]


def test_a_loss_that_is_not_finite_is_null_in_json() -> None:
    metrics = Metrics(top1=0, top5=0, loss=math.nan, ece=0, num_images=1, seconds=0)
    assert json.loads(json.dumps(metrics.to_dict(), allow_nan=False))["loss"] is None


class TestCompare:
    def test_a_model_agrees_with_itself(self) -> None:
        logits, labels = random_problem(2, 30, 5)
        found = compare(nn.Identity(), nn.Identity(), batches(logits, labels, 8), device=CPU)
        assert found.agreement.same == found.agreement.confident_same == 100
        assert (found.agreement.only_first_right, found.agreement.only_second_right) == (0, 0)
        alone = evaluate(nn.Identity(), batches(logits, labels, 8), device=CPU)
        assert (found.first.top1, found.second.loss) == (alone.top1, alone.loss)

    def test_counts(self) -> None:
        logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0.1, 0, 0], [0, 9.0, 0]])
        other = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0.1, 0, 0], [0, 0, 9.0]])
        labels = torch.tensor([0, 1, 0, 1])
        found = compare(nn.Identity(), nn.Identity(), [(logits, labels)], [(other, labels)], device=CPU).agreement
        assert found.same == 50
        assert found.confident_images == 3
        assert found.confident_same == pytest.approx(100 / 3)
        assert (found.only_first_right, found.only_second_right) == (1, 1)

    def test_nothing_confident(self) -> None:
        loader = [(torch.zeros(3, 4), torch.zeros(3).long())]
        found = compare(nn.Identity(), nn.Identity(), loader, device=CPU).agreement
        assert (found.confident_images, found.confident_same) == (0, None)

    def test_different_class_counts_and_different_images_are_refused(self) -> None:
        logits, labels = random_problem(4, 6, 4)
        with pytest.raises(DataError) as caught:
            compare(nn.Identity(), nn.Linear(4, 2), [(logits, labels)], device=CPU)
        assert {"4", "2"} <= set(caught.value.message.split())
        with pytest.raises(DataError, match="loaders"):
            compare(nn.Identity(), nn.Identity(), [(logits, labels)], [(logits, (labels + 1) % 4)], device=CPU)


def test_an_image_size_that_the_model_cannot_take() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2), nn.BatchNorm1d(2))
    check_input_size(model, (3, 8, 8))
    assert model.training
    with pytest.raises(UsageError) as caught:
        check_input_size(model, (3, 8, 9))
    assert "8 x 9" in caught.value.message


@pytest.mark.parametrize("name", ["nonsense", "cpu:x"])
def test_a_device_that_does_not_exist(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_device(name)
    assert repr(name) in caught.value.message and "--device cpu" in str(caught.value.hint)
