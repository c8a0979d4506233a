"""Memory and time of classifiers while they run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fixify.comparing.running import Int4Classifier, Int8Classifier, integer_classifier, memory_bytes, seconds_per_batch


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_integers_run_as_pytorch_runs_them(bits: int, bias: bool) -> None:
    made = integer_classifier(64, 50, bits, bias)
    assert isinstance(made, Int8Classifier if bits == 8 else Int4Classifier)
    logits = made(torch.randn(3, 64))
    assert logits.shape == (3, 50) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert memory_bytes(made, 64) < memory_bytes(nn.Linear(64, 50, bias=bias), 64)
    assert [found.keys() for found in seconds_per_batch([made], 64)] == [{1, 64}]


def test_four_bits_need_whole_groups_of_features() -> None:
    assert integer_classifier(40, 50, 4, True) is None
    assert integer_classifier(40, 50, 8, True) is not None


def test_four_bits_take_half_a_byte_a_weight() -> None:
    made = Int4Classifier(1280, 1000, bias=False)
    scales = 2 * 2 * 1008 * 1280 // 32
    assert memory_bytes(made, 1280) == 1008 * 1280 // 2 + scales
