"""What is minimised, with labels and with mixed targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fixify.training import FinetuneOptions
from fixify.training.losses import training_loss


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the teacher's logits, and the targets of a batch mixed 7 to 3 with its mirror image."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = (3 * torch.randn(4, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 2, 4, 1])
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    return logits, teacher_logits, 0.7 * one_hot + 0.3 * one_hot.flip(0)


def by_hand(logits: Tensor, targets: Tensor) -> float:
    return float(-(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_mixed_targets_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, targets = batch
    # The smoothing is in the targets already (timm's Mixup); it must not be applied again.
    loss = training_loss(logits, targets, None, FinetuneOptions.create(smoothing=0.3))
    assert float(loss) == pytest.approx(by_hand(logits, targets), rel=1e-5)


def test_mixed_targets_beside_a_teacher(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, teacher_logits, targets = batch
    options = FinetuneOptions.create(distill_weight=0.25, distill_temperature=2.0)
    soft = (teacher_logits / 2).softmax(dim=1)
    divergence = by_hand(logits / 2, soft) - by_hand(teacher_logits / 2, soft)
    expected = 0.75 * by_hand(logits, targets) + 0.25 * 4 * divergence
    assert float(training_loss(logits, targets, teacher_logits, options)) == pytest.approx(expected, rel=1e-5)
    alone = training_loss(logits, targets, teacher_logits, options.replace(unlabelled=True))
    assert float(alone) == pytest.approx(4 * divergence, rel=1e-5)


def test_smoothed_labels_are_those_that_mixing_by_nothing_makes(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, _ = batch
    labels = torch.tensor([0, 2, 4, 1])
    targets = torch.full((4, 5), 0.1 / 5).scatter_(1, labels[:, None], 0.1 / 5 + 0.9)
    loss = training_loss(logits, labels, None, FinetuneOptions.create(smoothing=0.1))
    assert float(loss) == pytest.approx(by_hand(logits, targets), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32(batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    logits, teacher_logits, targets = batch
    loss = training_loss(logits.to(dtype), targets, teacher_logits, FinetuneOptions.create())
    assert loss.dtype == torch.float32
    exact = training_loss(logits.to(dtype).float(), targets, teacher_logits, FinetuneOptions.create())
    assert float(loss) == float(exact)
