"""No model's own names may be taken for those of a wrapper, in any architecture of the two libraries."""

from __future__ import annotations

import pytest

from fixify.checkpoints.keys import _split_average, strip_wrappers
from fixify.models.architectures import build, list_architectures, parse_architecture

SAMPLE = [
    "timm/resnet18",
    "timm/vit_tiny_patch16_224",
    "timm/densenet121",
    "timm/swin_tiny_patch4_window7_224",
    "timm/crossvit_9_240",
    "timm/qwen3_vit_88m",
    "timm/test_vit4",
    "torchvision/densenet121",
    "torchvision/vit_b_16",
    "torchvision/googlenet",
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # builders' advice on their own arguments
def test_all() -> None:
    for ref in list_architectures():
        stay(ref)
