"""fixify.models.built.traits and fixify.catalogue.matches.Behaviour: what sets networks of the same shapes apart."""

from torch import nn

from fixify.catalogue.matches import Behaviour, merge, set_apart
from fixify.models import build, parse_architecture, preprocessing
from fixify.models.built import traits


def _traits(ref: str) -> dict:
    return traits(build(parse_architecture(ref), meta=True))


def test_padding_of_tensorflow() -> None:
    ours, theirs = _traits("efficientnet_lite0"), _traits("tf_efficientnet_lite0")
    assert ours["padding"][1] == "even"
    assert "as TensorFlow" in theirs["padding"][1]
    assert ours["padding"][0] != theirs["padding"][0]
    assert ours["activation"] == theirs["activation"]
    assert ours["activation"][1] == "ReLU6"
    assert ours["epsilon"][1] == "1e-05"
    assert theirs["epsilon"][1] == "0.001"


def test_general_traits_are_the_same_in_both_libraries() -> None:
    ours, theirs = _traits("timm/resnet18"), _traits("torchvision/resnet18")
    for name in ("padding", "stride", "epsilon"):
        assert ours[name] == theirs[name], name
    assert ours["activation"][1] == theirs["activation"][1] == "ReLU"
    assert ours["pooling"][1] == theirs["pooling"][1]


def test_number_of_attention_heads() -> None:
    few = traits(nn.Sequential(nn.TransformerEncoderLayer(64, 2)))
    many = traits(nn.Sequential(nn.TransformerEncoderLayer(64, 4)))
    assert {name for name in few if few[name] != many[name]} == {".num_heads", ".head_dim"}


def test_attributes_without_effect_on_predictions_are_no_traits() -> None:
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.BatchNorm2d(4))
    second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.1), nn.BatchNorm2d(4, momentum=0.01)).eval()
    assert traits(first) == traits(second)


def test_merge_and_set_apart() -> None:
    a = Behaviour("timm", {"padding": ("1", "even"), ".num_heads": ("2", "2"), "mean": ("x", "x")})
    b = Behaviour("timm", {"padding": ("1", "even"), ".num_heads": ("4", "4"), "mean": ("x", "x")})
    c = Behaviour("torchvision", {"padding": ("1", "even"), ".class": ("r", "ResNet"), "mean": ("y", "y")})
    d = Behaviour("torchvision", {"padding": ("1", "even"), ".class": ("r", "ResNet"), "mean": ("x", "x")})
    assert merge([a, a, b, a, c]) == [[0, 1, 3], [2], [4]]
    assert set_apart([a, b]) == [{"num_heads": "2"}, {"num_heads": "4"}]
    # Attributes of modules cannot be compared between libraries; the preprocessing can.
    assert set_apart([a, c]) == [{"mean": "x"}, {"mean": "y"}]
    assert set_apart([a, d]) == [{}, {}]
    assert merge([a, d]) == [[0], [1]]
    e = Behaviour("timm", {"padding": ("9", "even"), ".num_heads": ("2", "2"), "mean": ("x", "x")})
    assert set_apart([a, e]) == [{"padding": "even (placed differently)"}] * 2
    assert set_apart([a, b, d]) == [{"num_heads": "2"}, {"num_heads": "4"}, {}]


def test_behaviour_includes_the_preprocessing() -> None:
    facts = Behaviour.of("timm", {}, preprocessing(parse_architecture("tf_efficientnet_lite0")))
    assert facts.values["mean"] == ("0.5 0.5 0.5", "0.5 0.5 0.5")
    assert facts.values["interpolation"][1] == "bicubic"
