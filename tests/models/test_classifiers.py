"""fixify.models.classifiers: the classifier layers of every kind of head, and which architectures have one."""

from collections import Counter

import pytest
import timm
import torchvision
from torch import nn

from fixify.catalogue.shipped import load_index
from fixify.errors import NoClassifierError
from fixify.models import build, find_classifiers, list_architectures, parse_architecture
from fixify.models.classifiers import coverage

# One model for each way in which timm and torchvision build a classifier.
SITES = [
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
    ("timm/volo_d1_224", [("aux_head", 384, -1), ("head", 384, -1)]),  # get_classifier() returns one of the two
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


@pytest.mark.parametrize(("ref", "expected"), SITES, ids=[ref for ref, _ in SITES])
def test_sites(ref: str, expected: list) -> None:
    num_classes = 37
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
    with pytest.raises(NoClassifierError, match=ref):
        find_classifiers(build(arch, meta=True), arch)


def test_encoder_built_with_classes_has_a_classifier() -> None:
    arch = parse_architecture("vit_small_patch14_dinov2")
    assert [site.path for site in find_classifiers(build(arch, num_classes=5, meta=True), arch)] == ["head"]


def test_models_that_fixify_cannot_read() -> None:
    with pytest.raises(NoClassifierError, match="Sequential"):
        find_classifiers(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(NoClassifierError, match="ResNet"):
        find_classifiers(timm.create_model("resnet18", num_classes=0))
    model = timm.create_model("resnet18", num_classes=4)
    model.fc = nn.Bilinear(2, 2, 4)
    with pytest.raises(NoClassifierError, match="Bilinear"):
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


def test_rows_of_the_coverage() -> None:
    resnet, deit, dino, encoder, squeezenet = coverage(
        [
            "timm/resnet50",
            "timm/deit_tiny_distilled_patch16_224",
            "timm/vit_small_patch14_dinov2",
            "timm/mobilenetv5_300m_enc",
            "torchvision/squeezenet1_1",
        ]
    )
    assert (resnet.convertible, resnet.reason) == (True, None)
    assert (resnet.head_parameters, resnet.num_parameters) == (2048 * 1000 + 1000, 25_557_032)
    assert deit.head_parameters == 2 * (192 * 1000 + 1000)
    assert squeezenet.head_parameters == 512 * 1000 + 1000
    assert not dino.convertible and dino.takes_classes
    assert dino.reason is not None and "num_classes" in dino.reason
    assert not encoder.convertible and not encoder.takes_classes
    assert encoder.reason is not None and "num_classes" not in encoder.reason


def test_the_projection_of_a_clip_tower_is_no_classifier() -> None:
    ref = "timm/resnet50_clip"
    (row,) = coverage([ref])
    assert not row.convertible and row.takes_classes and row.reason is not None and "CLIP" in row.reason
    arch = parse_architecture(ref)
    with pytest.raises(NoClassifierError):
        find_classifiers(build(arch, meta=True), arch)
    assert len(find_classifiers(build(arch, num_classes=5, meta=True), arch)) == 1


@pytest.mark.parametrize("ref", list_architectures()[::211])
def test_sample_agrees_with_the_index(ref: str) -> None:
    """An architecture is in the index exactly if it takes a number of classes."""
    (row,) = coverage([ref])
    assert row.takes_classes == (ref in {entry.architecture.ref for entry in load_index().entries})
    assert (row.reason is None) == row.convertible
    assert row.head_parameters < row.num_parameters


# get_classifier() of timm's models as they are built by default, and how many there are in timm 1.0.31.
KINDS = {
    "Linear": 1091,
    "Conv2d": 39,
    "RepVitClassifier": 17,
    "NormLinear": 8,
    "NormLinear NormLinear": 12,
    "Linear Linear": 19,
    "ModuleList": 15,
    "ModuleList ModuleList": 4,
    "LinearLayer": 9,
    "MlpHead": 8,
    "ClassifierHead": 7,
}
# Counted above, but their ClassifierHead is empty unless they are built with a number of classes.
EMPTY = {"timm/samvit_base_patch16", "timm/samvit_large_patch16", "timm/samvit_huge_patch16"}


@pytest.mark.slow
def test_totals() -> None:
    """1,229 of timm's models have a `get_classifier()` that is not an Identity; torchvision's 80 and our 7 have one.

    Three of the 1,229 have an empty one, and 51 are image towers of CLIP, with those of the Perception Encoder; these
    convert if they are built with a number of classes.
    """
    if timm.__version__ != "1.0.31" or not torchvision.__version__.startswith("0.29."):
        pytest.skip("the totals are those of timm 1.0.31 and torchvision 0.29")
    rows = {row.ref: row for row in coverage()}
    libraries = Counter(ref.partition("/")[0] for ref in rows)
    convertible = Counter(ref.partition("/")[0] for ref, row in rows.items() if row.convertible)
    assert libraries == {"timm": 1371, "torchvision": 80, "fixify": 7}
    assert convertible == {"timm": 1229 - len(EMPTY) - 51, "torchvision": 80, "fixify": 7}
    assert {ref for ref in EMPTY if rows[ref].takes_classes and not rows[ref].convertible} == EMPTY
    assert Counter(row.takes_classes for row in rows.values()) == {True: 1226 + 80 + 7 + 138, False: 7}
    for row in rows.values():
        assert (row.reason is None) == row.convertible
        assert row.head_parameters < row.num_parameters

    kinds: Counter[str] = Counter()
    for ref in list_architectures("timm"):
        model = build(parse_architecture(ref), meta=True)
        classifier = model.get_classifier() if hasattr(model, "get_classifier") else nn.Identity()
        parts = classifier if isinstance(classifier, tuple) else (classifier,)
        kinds[" ".join(type(part).__name__ for part in parts)] += 1
    assert kinds.pop("Identity") == 1371 - 1229
    assert kinds == KINDS
    assert sum(KINDS.values()) == 1229
