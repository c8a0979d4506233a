"""What is kept of the answers, against a matrix of C x C."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fixify.metrics import Confusions, Predictions, confusions, evaluate


@pytest.mark.parametrize(("num_classes", "images"), [(10, 3000), (300, 5000)])
def test_the_counts_are_those_of_the_matrix(num_classes: int, images: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, images)
    guesses = np.where(rng.random(images) < labels / num_classes, labels, rng.integers(0, num_classes, images))
    matrix = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(matrix, (labels, guesses), 1)
    found = confusions(np.stack([labels, guesses]), num_classes)
    assert found.images == tuple(matrix.sum(axis=1)) and found.right == tuple(matrix.diagonal())
    shares = matrix.diagonal() / matrix.sum(axis=1)
    kept = [row.label for row in found.worst]
    assert len(kept) == min(20, (shares < 1).sum())
    assert [shares[label] for label in kept] == sorted(shares[shares < 1])[: len(kept)]
    for row in found.worst:
        off = matrix[row.label].copy()
        off[row.label] = 0
        assert [count for _, count in row.taken_for] == sorted(off[off > 0], reverse=True)[:3]
        assert all(off[label] == count for label, count in row.taken_for)
    assert Confusions.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_ten_thousand_classes_take_little() -> None:
    labels = np.repeat(np.arange(10_000), 5)
    found = confusions(np.stack([labels, (labels + (np.arange(50_000) % 7 == 0)) % 10_000]), 10_000)
    assert len(found.images) == 10_000 and len(found.worst) == 20
    assert len(json.dumps(found.to_dict())) < 100_000


def test_a_class_without_images_and_one_without_a_mistake_are_not_among_the_worst() -> None:
    found = confusions(np.array([[0, 0, 2, 2], [0, 0, 2, 1]]), 4)
    assert found.images == (2, 0, 2, 0) and found.right == (2, 0, 1, 0)
    assert [(row.label, row.taken_for) for row in found.worst] == [(2, ((1, 1),))]
    assert confusions(np.zeros((2, 0), dtype=int), 3).worst == ()


@pytest.mark.parametrize(
    "damaged",
    [
        {"images": [1], "right": [1, 2], "worst": []},
        {"images": [1], "right": [1], "worst": [{"label": 5, "taken_for": []}]},
    ],
)
def test_what_does_not_fit_together_is_refused(damaged: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="class"):
        Confusions.from_dict(damaged)


def test_an_evaluation_collects_them() -> None:
    loader = [(torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([2]))]
    answers = Predictions()
    metrics = evaluate(nn.Identity(), loader, device=torch.device("cpu"), answers=answers)
    found = confusions(answers.pairs().numpy(), 3)
    assert answers.pairs().tolist() == [[0, 1, 1, 2], [0, 1, 2, 0]]
    assert metrics.top1 == 100 * sum(found.right) / sum(found.images) == 50
