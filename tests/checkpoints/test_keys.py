"""fixify.checkpoints.keys: no model's own names are taken for those of a wrapper."""

from __future__ import annotations

import pytest
import torch

from fixify.checkpoints.keys import _split_average, strip_wrappers
from fixify.models.architectures import build, list_architectures, parse_architecture

SAMPLE = [
    "timm/resnet18",
    "timm/vit_tiny_patch16_224",
    "timm/crossvit_9_240",
    "timm/mobilenetv4_conv_small",
    "timm/test_vit4",
    "torchvision/densenet121",
    "torchvision/vit_b_16",
    "torchvision/squeezenet1_0",
]


def stay(ref: str) -> None:
    state = build(parse_architecture(ref), meta=True).state_dict()
    stripped, outside = strip_wrappers(state, ref)
    assert list(stripped) == list(state) and not outside
    assert _split_average(state, ref) == (state, {})


@pytest.mark.parametrize("ref", SAMPLE)
def test_sample(ref: str) -> None:
    stay(ref)


def test_names_of_an_old_densenet() -> None:
    old = {"features.denseblock1.denselayer1.norm.1.weight": torch.ones(2), "features.norm0.weight": torch.ones(2)}
    new, dropped = strip_wrappers(old, "densenet121.pth")
    assert list(new) == ["features.denseblock1.denselayer1.norm1.weight", "features.norm0.weight"]
    assert dropped == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the builders' advice about their own arguments
def test_all() -> None:
    for ref in list_architectures():
        stay(ref)
