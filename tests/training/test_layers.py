"""fixify.training.optimisers: stages and layers of torchvision's networks, which do not tell them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from fixify.models import build, parse_architecture
from fixify.surgery import fix_classifier_
from fixify.training import FinetuneOptions
from fixify.training.optimisers import freeze_, number_groups, parameter_groups

# One of each kind, and how many stages and layers it has with the head.
NETWORKS = {
    "alexnet": (8, 8),
    "convnext_tiny": (9, 23),
    "densenet121": (9, 9),
    "efficientnet_b0": (10, 19),
    "efficientnet_v2_s": (9, 43),
    "googlenet": (16, 16),
    "inception_v3": (20, 20),
    "maxvit_t": (8, 8),
    "mnasnet0_5": (11, 21),
    "mobilenet_v2": (20, 20),
    "mobilenet_v3_small": (15, 15),
    "regnet_y_400mf": (6, 6),
    "resnet18": (6, 10),
    "shufflenet_v2_x0_5": (6, 19),
    "squeezenet1_0": (10, 10),
    "swin_t": (9, 17),
    "vgg11_bn": (11, 11),
    "vit_b_16": (14, 14),
}


def network(name: str, *, fixed: bool = True) -> nn.Module:
    model = build(parse_architecture(f"torchvision/{name}"), num_classes=20, meta=True)
    return fix_classifier_(model, "auto") if fixed else model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_is_that_of_the_computation(name: str) -> None:
    model = network(name).eval()
    called: list[str] = []
    for path, module in model.named_modules():
        if path and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
    side = 299 if name == "inception_v3" else 224
    model(torch.empty(1, 3, side, side, device="meta"))
    for coarse, count in zip((True, False), NETWORKS[name], strict=True):
        groups = number_groups(model, coarse=coarse, option="--freeze")
        assert list(groups) == [key for key, _ in model.named_parameters()]
        assert sorted(set(groups.values())) == list(range(count))
        # The head is alone in the last group.
        kinds = {key.rpartition(".")[2] for key, number in groups.items() if number == count - 1}
        assert "scale" in kinds and kinds <= {"scale", "bias"}  # MaxVit's classifier has no bias
        own = {path: model.get_submodule(path).named_parameters(path, recurse=False) for path in called}
        numbers = {path: {groups[key] for key, _ in parameters} for path, parameters in own.items()}
        assert all(len(found) == 1 for found in numbers.values())
        order = [found.pop() for found in numbers.values()]
        assert order == sorted(order)


@pytest.mark.parametrize("coarse", [True, False])
def test_torchvisions_resnet_has_the_groups_of_timms(coarse: bool) -> None:
    with torch.device("meta"):
        theirs = timm.create_model("resnet50", num_classes=20)
    expected = group_parameters(theirs, theirs.group_matcher(coarse=coarse), reverse=True)
    assert number_groups(network("resnet50", fixed=False), coarse=coarse, option="") == expected


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ("conv1, bn1", "layer1", "layer2")),
        ("vit_b_16", ("class_token, conv_proj, encoder.pos_embedding", "encoder.layers.encoder_layer_0")),
        ("efficientnet_b0", ("features.0", "features.1")),
        ("densenet121", ("features.conv0, features.norm0", "features.denseblock1", "features.transition1")),
    ],
)
@pytest.mark.parametrize("fixed", [True, False])
def test_stages_that_are_frozen(name: str, stages: tuple[str, ...], fixed: bool) -> None:
    model = network(name, fixed=fixed)
    assert freeze_(model, len(stages)).stages == stages
    started = tuple(part for stage in stages for part in stage.split(", "))
    assert {key for key, each in model.named_parameters() if not each.requires_grad} == {
        key for key, _ in model.named_parameters() if key.startswith(tuple(f"{part}" for part in started))
    } - {key for key, _ in model.named_parameters() if key.startswith("encoder.layers.encoder_layer_1")}


def test_layer_decay() -> None:
    model: Any = network("resnet18")
    options = FinetuneOptions.create(layer_decay=0.5, head_lr_scale=3)
    scale = {id(each): group["lr_scale"] for group in parameter_groups(model, options) for each in group["params"]}
    rates = {key: scale[id(parameter)] for key, parameter in model.named_parameters()}
    assert rates["fc.scale"] == rates["fc.bias"] == 3
    assert rates["layer4.1.conv2.weight"] == rates["layer4.1.bn2.bias"] == 0.5
    assert rates["layer4.0.conv1.weight"] == 0.25
    assert rates["conv1.weight"] == rates["bn1.weight"] == 0.5**9
