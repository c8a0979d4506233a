"""fixify.models.build.load_weights: state dicts without module versions and without counters."""

import pytest
import torch

from fixify.catalogue.signature import is_counter
from fixify.models import build, parse_architecture
from fixify.models.build import load_weights


def test_mnasnet_loads_without_the_version_of_its_modules() -> None:
    arch = parse_architecture("torchvision/mnasnet0_5")
    model, other = build(arch, num_classes=9), build(arch, num_classes=9)
    tensors = dict(model.state_dict())  # as a safetensors file holds them
    with pytest.raises(ValueError, match="version"):
        other.load_state_dict(tensors)
    load_weights(other, tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in other.state_dict().items())


def test_only_counters_may_be_missing() -> None:
    arch = parse_architecture("resnet10t")
    model = build(arch, num_classes=9)
    tensors = {key: value for key, value in model.state_dict().items() if not is_counter(key)}
    load_weights(build(arch, num_classes=9), tensors)
    del tensors["fc.bias"]
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        load_weights(build(arch, num_classes=9), tensors)
