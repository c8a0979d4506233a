"""fixify.catalogue.matches: what the shipped index shows of a state dict."""

from dataclasses import replace

import pytest

from fixify.catalogue import matches
from fixify.catalogue.matches import fit_by_keys, identify_by_keys
from fixify.catalogue.shipped import is_current
from fixify.errors import AmbiguousArchitectureError
from fixify.models import build, parse_architecture
from fixify.models.built import shapes_of
from fixify.models.identify import fit, identify
from fixify.models.skeletons import build_skeleton

pytestmark = pytest.mark.skipif(not is_current(), reason="the shipped index is of other versions of the libraries")

Shapes = dict[str, tuple[int, ...]]


def _shapes(ref: str, num_classes: int = 37) -> Shapes:
    return shapes_of(build(parse_architecture(ref), num_classes=num_classes, meta=True))


@pytest.mark.parametrize(
    "ref", ["resnet50", "vit_tiny_patch16_224", "levit_128s", "torchvision/swin_t", "fixify/resnet56_cifar"]
)
def test_it_finds_what_building_finds(ref: str) -> None:
    shapes = _shapes(ref)
    found = identify_by_keys(shapes)
    assert found is not None
    built = identify(shapes)
    assert replace(found, candidates=tuple(replace(each, network=None) for each in found.candidates)) == built
    arch = parse_architecture(ref)
    (candidate,) = [each for each in found.candidates if arch.ref in (each.architecture.ref, *each.aliases)]
    assert candidate.network is not None and candidate.network.skeleton(shapes) == build_skeleton(arch, 37)


@pytest.mark.parametrize("ref", ["resnet18,in_chans=1", "vit_tiny_patch16_224,img_size=384"])
def test_arguments_have_to_be_built(ref: str) -> None:
    assert fit_by_keys(parse_architecture(ref), _shapes(ref)) is None
    assert fit_by_keys(parse_architecture(ref.partition(",")[0]), _shapes(ref)) is None


def test_other_names_are_left_to_other_means() -> None:
    shapes = {f"net.{key}": shape for key, shape in _shapes("resnet18").items()}
    assert identify_by_keys(shapes) is None
    assert fit_by_keys(parse_architecture("resnet34"), _shapes("resnet18")) is None


def test_what_the_shapes_leave_open() -> None:
    shapes = _shapes("torchvision/googlenet,aux_logits=false")
    with pytest.raises(AmbiguousArchitectureError) as error:
        fit_by_keys(parse_architecture("torchvision/googlenet"), shapes)
    with pytest.raises(AmbiguousArchitectureError) as same:
        fit(parse_architecture("torchvision/googlenet"), shapes)
    assert error.value.choices == same.value.choices


@pytest.mark.parametrize(
    ("ref", "num_classes"),
    [
        ("vit_base_patch16_clip_224.openai", 10),  # a tag of a tower
        ("caformer_s18", 2048),  # as many classes as its hidden layer is wide
    ],
)
def test_what_only_a_build_shows(ref: str, num_classes: int) -> None:
    arch = parse_architecture(ref)
    found = fit_by_keys(arch, _shapes(ref, num_classes))
    assert found is not None and found.architecture == arch and found.network is None


def test_an_index_of_other_versions_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matches, "is_current", lambda: False)
    assert identify_by_keys(_shapes("resnet18")) is None
    assert fit_by_keys(parse_architecture("resnet18"), _shapes("resnet18")) is None
