"""fixify.models.signature: free dimensions, and comparing state dicts with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixify.catalogue.signature import FreeDimensions, Signature, StateShapes, is_counter
from fixify.models import build, parse_architecture
from fixify.models.built import shapes_of, signature_of


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(-5, 50))
def test_linear_choices_are_solved_exactly(choice: int, slope: int, offset: int) -> None:
    free = FreeDimensions("num_classes", ((0, offset), (1000, 1000 * slope + offset)), ())
    assert free.solve(choice * slope + offset) == {choice}
    if slope > 1:
        assert free.solve(choice * slope + offset + 1) == set()


@given(st.integers(1, 64), st.sampled_from([4, 8, 14, 16, 32]), st.integers(0, 5), st.integers(1, 100))
def test_image_sizes_are_solved_exactly(default: int, patch: int, tokens: int, grid: int) -> None:
    """Position embeddings of a ViT: one row per patch, and some tokens."""
    size = default * patch
    samples = tuple((k * size, (k * size // patch) ** 2 + tokens) for k in (1, 2, 3))
    free = FreeDimensions("img_size", samples, ())
    assert free.solve(grid**2 + tokens) == {grid * patch}
    assert free.solve(grid**2 + tokens + 1) <= {patch * root for root in range(1, 102)}
    assert grid * patch not in free.solve(grid**2 + tokens + 1)


def test_dimensions_that_no_choice_gives() -> None:
    free = FreeDimensions("img_size", ((224, 197), (448, 785), (672, 1765)), ())
    assert free.solve(0) == set()  # fewer rows than the class token needs
    assert free.solve(1) == set()  # only an image of size 0 would give this
    assert FreeDimensions("num_classes", ((0, 0), (1, 1)), ()).solve(0) == set()


# One architecture for each way in which shapes depend on choices: convolutional stem, patches as a Linear (a multiple
# of the channels), position embeddings, relative positions of several stages, two heads, torchvision's names.
CASES = [
    ("timm/resnet18", {"in_chans": 1}, 1),
    ("timm/mobilenetv3_small_050", {}, 5000),
    ("timm/naflexvit_base_patch16_gap", {"in_chans": 5}, 37),
    ("timm/vit_tiny_patch16_224", {"in_chans": 4, "img_size": 96}, 1),
    ("timm/deit_tiny_distilled_patch16_224", {"img_size": 384}, 5000),
    ("timm/levit_128s", {"img_size": 448}, 37),
    ("timm/beit_base_patch16_224", {"img_size": 384}, 37),
    ("timm/volo_d1_224", {"in_chans": 1}, 5000),
    ("torchvision/vit_b_32", {"image_size": 384}, 1),
    ("torchvision/googlenet", {}, 37),
]


@pytest.mark.parametrize(("ref", "kwargs", "num_classes"), CASES, ids=[ref for ref, *_ in CASES])
def test_choices_are_read_from_the_shapes(ref: str, kwargs: dict, num_classes: int, signatures: dict) -> None:
    signature: Signature = signatures[ref]
    model = build(parse_architecture(ref, **kwargs), num_classes=num_classes, meta=True)
    state = StateShapes(shapes_of(model))
    assert len(state.ordered) == signature.num_tensors
    assert state.keys == signature.keys
    assert state.named(signature.free) == signature.named
    assert state.by_order(signature.free) == signature.ordered
    expected = {**signature.defaults, **kwargs, "num_classes": num_classes}
    assert state.choices(signature.free) == expected


@pytest.fixture(scope="module")
def signatures() -> dict[str, Signature]:
    return {ref: signature_of(parse_architecture(ref))[0] for ref, *_ in CASES}


def test_any_other_change_is_seen(signatures: dict) -> None:
    signature = signatures["timm/resnet18"]
    shapes = shapes_of(build(parse_architecture("resnet18"), meta=True))
    shapes["layer1.0.conv1.weight"] = (64, 64, 3, 5)
    state = StateShapes(shapes)
    assert state.keys == signature.keys
    assert state.named(signature.free) != signature.named
    assert state.by_order(signature.free) != signature.ordered


def test_contradictory_heads_are_no_match(signatures: dict) -> None:
    signature = signatures["timm/deit_tiny_distilled_patch16_224"]
    shapes = shapes_of(build(parse_architecture("deit_tiny_distilled_patch16_224"), num_classes=10, meta=True))
    shapes["head_dist.weight"] = (11, 192)
    assert StateShapes(shapes).choices(signature.free) is None
    shapes["head_dist.weight"] = ()
    assert StateShapes(shapes).choices(signature.free) is None


def test_order_matters_for_shapes_and_not_for_names(signatures: dict) -> None:
    signature = signatures["timm/resnet18"]
    shapes = shapes_of(build(parse_architecture("resnet18"), meta=True))
    state = StateShapes(dict(reversed(shapes.items())))
    assert state.named(signature.free) == signature.named
    assert state.by_order(signature.free) != signature.ordered


def test_counters_are_ignored(signatures: dict) -> None:
    shapes = shapes_of(build(parse_architecture("resnet18"), meta=True))
    without = {key: shape for key, shape in shapes.items() if not is_counter(key)}
    assert len(without) < len(shapes)
    assert StateShapes(without).ordered == StateShapes(shapes).ordered
    assert is_counter("num_batches_tracked")
    assert not is_counter("head.num_batches_tracked.weight")


def test_models_that_take_no_classes_have_no_signature() -> None:
    assert signature_of(parse_architecture("mobilenetv5_300m_enc")) is None
