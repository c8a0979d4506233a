"""fixify.models.skeletons: what a build shows, and what the index keeps of it."""

import pytest
import torch

from fixify.errors import NoClassifierError
from fixify.models import build, parse_architecture
from fixify.models.skeletons import build_skeleton, network_of


@pytest.mark.parametrize(
    "ref", ["test_vit", "levit_128s", "mobilenetv3_small_050", "torchvision/swin_t", "swinv2_cr_tiny_224"]
)
def test_the_index_gives_the_skeleton_back(ref: str) -> None:
    arch = parse_architecture(ref)
    network = network_of(arch, build(arch, num_classes=7, meta=True))
    assert network is not None
    skeleton = build_skeleton(arch, 12)
    assert network.skeleton(skeleton.shapes) == skeleton
    without = {key: shape for key, shape in skeleton.shapes.items() if not key.endswith("num_batches_tracked")}
    assert network.skeleton(without) == skeleton


def test_towers_and_their_tags() -> None:
    arch = parse_architecture("vit_base_patch16_clip_224")
    network = network_of(arch, build(arch, num_classes=7, meta=True))
    assert network is not None and "openai" in network.tags and not any("_ft_in" in tag for tag in network.tags)
    arch = parse_architecture("resnet50_clip")
    network = network_of(arch, build(arch, num_classes=7, meta=True))
    assert network is not None and network.tower == 1024
    with pytest.raises(NoClassifierError):
        build_skeleton(arch, 1024)


def test_what_cannot_be_given_back() -> None:
    """A counter that is none of a BatchNorm, and a parameter that no state dict shows."""
    arch = parse_architecture("torchvision/alexnet")
    model = build(arch, meta=True)
    assert network_of(arch, model) is not None
    model.features.register_buffer("num_batches_tracked", torch.zeros((), device="meta"))
    assert network_of(arch, model) is None
    model = build(arch, meta=True)
    model._register_state_dict_hook(lambda _model, state, *_: state.__delitem__("features.0.bias"))
    assert network_of(arch, model) is None
