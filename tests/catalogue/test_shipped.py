"""fixify.catalogue.shipped: what the index keeps of a network, and the versions it belongs to."""

import importlib.metadata

import pytest
import timm

from fixify.catalogue import shipped
from fixify.catalogue.shipped import Index, Network, is_current, library_versions
from fixify.catalogue.skeleton import ClassifierSite
from fixify.description import Architecture

SHAPES = {
    "conv.weight": (8, 3, 3, 3),
    "bn.weight": (8,),
    "bn.bias": (8,),
    "bn.running_mean": (8,),
    "bn.running_var": (8,),
    "index": (4,),
    "head.fc.weight": (5, 8),
    "head.fc.bias": (5,),
}


def test_a_skeleton() -> None:
    network = Network((("head.fc", "Linear"),), odd=(7,), integers=(7,))
    assert sorted(SHAPES)[7] == "index"
    skeleton = network.skeleton(SHAPES)
    assert skeleton.num_parameters == 8 * 27 + 16 + 45
    assert skeleton.sites == (ClassifierSite("head.fc", "Linear", 8, 5, -1, 45, True),)
    assert skeleton.floats == SHAPES.keys() - {"index"}
    assert skeleton.shapes == {**SHAPES, "bn.num_batches_tracked": ()}
    assert network.skeleton({**SHAPES, "bn.num_batches_tracked": ()}) == skeleton


def test_a_convolution_as_a_classifier() -> None:
    site = ClassifierSite.of_shapes("last", "Conv2d", {"last.weight": (5, 8, 1, 1)})
    assert site == ClassifierSite("last", "Conv2d", 8, 5, 1, 40, False)


def test_what_has_to_be_built() -> None:
    network, plain = Network((("head.fc", "Linear"),), tower=512, tags=("openai",)), Architecture("timm", "net")
    assert not network.may_be_another(plain, SHAPES)
    assert network.may_be_another(Architecture("timm", "net", tag="openai"), SHAPES)
    assert not network.may_be_another(Architecture("timm", "net", tag="in1k"), SHAPES)
    wide = {**SHAPES, "head.fc.weight": (512, 8)}
    assert network.may_be_another(plain, wide)
    assert not network.may_be_another(Architecture("timm", "net", tag="in1k"), wide)
    assert network.may_be_another(plain, {**SHAPES, "head.hidden.weight": (5, 8)})
    assert not network.may_be_another(plain, {**SHAPES, "neck.hidden.weight": (5, 8)})


def test_versions_are_known_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_versions()["timm"] == timm.__version__

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(shipped.importlib.metadata, "version", none)
    assert shipped._installed.__wrapped__("timm") == timm.__version__


def test_one_stale_library_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = library_versions()
    for index, current in (
        (Index({"timm": [versions["timm"]], "torchvision": [versions["torchvision"]]}, {}, ()), True),
        (Index({"timm": [versions["timm"]]}, {}, ()), False),
    ):
        monkeypatch.setattr(shipped, "load_index", lambda index=index: index)
        assert is_current.__wrapped__() is current
