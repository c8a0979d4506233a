"""fixify.models.classifiers: the classifier layers of every kind of head."""

import pytest
import timm
from torch import nn

from fixify.errors import NoClassifierError
from fixify.models import build, find_classifiers, parse_architecture

# One model for each way in which timm and torchvision build a classifier.
KINDS = [
    ("timm/resnet18", [("fc", 512, -1)]),
    ("timm/dla34", [("fc", 512, 1)]),  # 1x1 convolution
    ("timm/convnext_atto", [("head.fc", 320, -1)]),
    ("timm/deit_tiny_distilled_patch16_224", [("head", 192, -1), ("head_dist", 192, -1)]),
    ("timm/levit_128s", [("head.linear", 384, -1), ("head_dist.linear", 384, -1)]),  # BatchNorm + Linear, a pair
    ("timm/levit_256d", [("head.linear", 512, -1)]),
    ("timm/levit_384_s8", [("head.linear", 768, -1), ("head_dist.linear", 768, -1)]),  # its cfg names one of two
    ("timm/repvit_m0_9", [("head.head.l", 384, -1), ("head.head_dist.l", 384, -1)]),
    ("timm/crossvit_9_240", [("head.0", 128, -1), ("head.1", 256, -1)]),
    ("timm/cpubone_b0_bfrobust", [("head.classifier.linear", 1600, -1)]),
    ("timm/volo_d1_224", [("aux_head", 384, -1), ("head", 384, -1)]),  # get_classifier() is one of two
    ("timm/caformer_s18", [("head.fc.fc2", 2048, -1)]),  # MlpHead
    ("timm/efficientvim_m1", [("heads.0", 128, -1), ("heads.1", 192, -1), ("heads.2", 320, -1), ("heads.3", 320, -1)]),
    ("torchvision/resnet18", [("fc", 512, -1)]),
    ("torchvision/squeezenet1_1", [("classifier.1", 512, 1)]),
    ("torchvision/vgg11", [("classifier.6", 4096, -1)]),
    ("torchvision/vit_b_32", [("heads.head", 768, -1)]),
    ("torchvision/swin_t", [("head", 768, -1)]),
    ("torchvision/maxvit_t", [("classifier.5", 512, -1)]),
    ("torchvision/inception_v3", [("AuxLogits.fc", 768, -1), ("fc", 2048, -1)]),
    ("torchvision/googlenet", [("aux1.fc2", 1024, -1), ("aux2.fc2", 1024, -1), ("fc", 1024, -1)]),
]


@pytest.mark.parametrize(("ref", "expected"), KINDS, ids=[ref for ref, _ in KINDS])
@pytest.mark.parametrize("num_classes", [1000, 37])
def test_sites(ref: str, expected: list, num_classes: int) -> None:
    arch = parse_architecture(ref)
    model = build(arch, num_classes=num_classes, meta=True)
    sites = find_classifiers(model, arch)
    assert [(site.path, site.num_features, site.channel_dim) for site in sites] == expected
    for site in sites:
        layer = model.get_submodule(site.path)
        assert site.num_classes == num_classes
        assert site.layer_type == ("Linear" if site.channel_dim == -1 else "Conv2d")
        assert site.num_parameters == sum(parameter.numel() for parameter in layer.parameters())
        assert site.has_bias == (layer.bias is not None)


def test_hidden_layer_as_wide_as_the_classes_is_not_a_classifier() -> None:
    hidden = 2048
    model = build(parse_architecture("caformer_s18"), num_classes=hidden, meta=True)
    assert model.head.fc.fc1.out_features == hidden
    assert [site.path for site in find_classifiers(model)] == ["head.fc.fc2"]


@pytest.mark.parametrize(
    "ref", ["timm/vit_small_patch14_dinov2", "timm/mobilenetv5_300m_enc", "timm/aimv2_1b_patch14_224"]
)
def test_encoders_say_so(ref: str) -> None:
    arch = parse_architecture(ref)
    with pytest.raises(NoClassifierError, match=rf"{ref}.*(encoder)"):
        find_classifiers(build(arch, meta=True), arch)


def test_encoder_built_with_classes_has_a_classifier() -> None:
    arch = parse_architecture("vit_small_patch14_dinov2")
    assert [site.path for site in find_classifiers(build(arch, num_classes=5, meta=True), arch)] == ["head"]


def test_models_that_fixify_cannot_read() -> None:
    with pytest.raises(NoClassifierError, match="Sequential has no classifier that fixify can find"):
        find_classifiers(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(NoClassifierError, match=r"resnet18|ResNet"):
        find_classifiers(timm.create_model("resnet18", num_classes=0))
    model = timm.create_model("resnet18", num_classes=4)
    model.fc = nn.Bilinear(2, 2, 4)
    with pytest.raises(NoClassifierError, match="its classifier is a Bilinear"):
        find_classifiers(model)


def test_plain_module_with_a_torchvision_like_head() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Linear(3, 8)
            self.classifier = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5, bias=False))

    (site,) = find_classifiers(Net())
    assert (site.path, site.num_features, site.num_classes, site.num_parameters) == ("classifier.2", 16, 5, 80)
    assert not site.has_bias
