"""fixify.catalogue.names: names and preprocessing from the shipped index are those of the libraries."""

import pytest

from fixify.catalogue import names
from fixify.catalogue.names import adapted_preprocessing, known_preprocessing, parse_known
from fixify.catalogue.shipped import is_current
from fixify.description import Architecture
from fixify.errors import ArchitectureError
from fixify.models import parse_architecture, preprocessing

pytestmark = pytest.mark.skipif(not is_current(), reason="the shipped index is of other versions of the libraries")


@pytest.mark.parametrize(
    "text",
    [
        "resnet50",
        "timm/resnet50.a1_in1k",
        "torchvision/resnet50.DEFAULT",
        "ResNet50_Weights.IMAGENET1K_V2",
        "tf_efficientnet_b0_ns",
        "timm/resnet56_cifar",
        "vit_base_patch16_224,img_size=384",
        "vit_base_patch16_clip_224.openai",
        "torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1",
    ],
)
def test_known_names(text: str) -> None:
    known = parse_known(text)
    assert known is not None and known == parse_architecture(text)
    images = known_preprocessing(known)
    assert images is not None and adapted_preprocessing(images, known) == preprocessing(known)


@pytest.mark.parametrize(
    "text", ["no_such_network", "resnet50.nonsense", "foo/resnet50", "torchvision/fasterrcnn_resnet50_fpn", "a,b", ""]
)
def test_the_libraries_say_what_is_wrong_with_other_names(text: str) -> None:
    assert parse_known(text) is None
    with pytest.raises(ArchitectureError):
        parse_architecture(text)


def test_arguments_are_checked() -> None:
    assert parse_known("resnet50", in_chans=1) == parse_architecture("resnet50,in_chans=1")
    assert parse_known("resnet50", pretrained=True) is None


def test_a_tag_that_is_not_known_has_the_preprocessing_of_the_default() -> None:
    default = known_preprocessing(Architecture("timm", "resnet50"))
    assert known_preprocessing(Architecture("timm", "resnet50", tag="of_tomorrow")) == default is not None
    assert known_preprocessing(Architecture("timm", "no_such_network")) is None


def test_an_index_of_other_versions_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "is_current", lambda: False)
    assert parse_known("resnet50") is None
    assert known_preprocessing(Architecture("timm", "resnet50")) is None
