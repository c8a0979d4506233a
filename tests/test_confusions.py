"""Confusions, compared with a C x C matrix."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fixify.metrics import Confusions, Predictions, count_confusions, evaluate


@pytest.mark.parametrize(("num_classes", "images"), [(10, 3000), (300, 5000)])
def test_the_counts_are_those_of_the_matrix(num_classes: int, images: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, images)
    predicted = np.where(rng.random(images) < labels / num_classes, labels, rng.integers(0, num_classes, images))
    matrix = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(matrix, (labels, predicted), 1)
    found = count_confusions(np.stack([labels, predicted]), num_classes)
    assert found.images == tuple(matrix.sum(axis=1)) and found.right == tuple(matrix.diagonal())
    accuracy = matrix.diagonal() / matrix.sum(axis=1)
    kept = [row.label for row in found.worst]
    assert len(kept) == min(20, (accuracy < 1).sum())
    assert [accuracy[label] for label in kept] == sorted(accuracy[accuracy < 1])[: len(kept)]
    for row in found.worst:
        off = matrix[row.label].copy()
        off[row.label] = 0
        assert [count for _, count in row.taken_for] == sorted(off[off > 0], reverse=True)[:3]
        assert all(off[label] == count for label, count in row.taken_for)
    assert Confusions.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_ten_thousand_classes_take_little() -> None:
    labels = np.repeat(np.arange(10_000), 5)
    found = count_confusions(np.stack([labels, (labels + (np.arange(50_000) % 7 == 0)) % 10_000]), 10_000)
    assert len(found.images) == 10_000 and len(found.worst) == 20
    assert len(json.dumps(found.to_dict())) < 100_000


def test_classes_without_images_or_without_mistakes_are_not_among_the_worst() -> None:
    found = count_confusions(np.array([[0, 0, 2, 2], [0, 0, 2, 1]]), 4)
    assert found.images == (2, 0, 2, 0) and found.right == (2, 0, 1, 0)
    assert [(row.label, row.taken_for) for row in found.worst] == [(2, ((1, 1),))]
    assert count_confusions(np.zeros((2, 0), dtype=int), 3).worst == ()


@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        ({"images": [1], "right": [1, 2], "worst": []}, {"1", "2"}),
        ({"images": [1], "right": [1], "worst": [{"label": 5, "taken_for": []}]}, {"5", "1"}),
    ],
)
def test_values_that_do_not_fit_together_are_refused(damaged: dict[str, object], named: set[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Confusions.from_dict(damaged)
    assert named <= set(str(caught.value).split())


def test_an_evaluation_collects_predictions() -> None:
    loader = [(torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([2]))]
    predictions = Predictions()
    metrics = evaluate(nn.Identity(), loader, device=torch.device("cpu"), predictions=predictions)
    found = count_confusions(predictions.pairs().numpy(), 3)
    assert predictions.pairs().tolist() == [[0, 1, 1, 2], [0, 1, 2, 0]]
    assert metrics.top1 == 100 * sum(found.right) / sum(found.images) == 50
