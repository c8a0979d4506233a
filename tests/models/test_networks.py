"""fixify.models.networks: the paper's own networks."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import fixify
from fixify.catalogue.shipped import load_index
from fixify.catalogue.signature import is_counter
from fixify.checkpoints import open_source
from fixify.errors import SourceError
from fixify.models import build, default_num_classes, find_classifiers, list_architectures, parse_architecture
from fixify.models.identify import identify
from fixify.models.index import entries_of
from fixify.models.networks import NETWORKS

# name: parameters, features, classes. The first three numbers are those of the paper's Table 1, the third without the
# scale. MobileNet's is the 1.3 million of Howard et al., as Keras counts trainable weights.
EXPECTED = {
    "resnet56_cifar": (855_770, 64, 10),
    "densenet100_bc_cifar": (800_032, 342, 100),
    "shufflenet_v1_g3": (1_826_555 - 1, 960, 1000),
    "mobilenet_v1_050": (1_331_592, 512, 1000),
    "resnet20_cifar": (272_474, 64, 10),
    "resnet44_cifar": (661_338, 64, 10),  # 272,474 + 4 / 6 of the difference between 20 and 56 layers
    "resnet18_050": (3_055_880, 256, 1000),
}
REFS = [f"fixify/{name}" for name in NETWORKS]
SAMPLE = ["densenet100_bc_cifar", "mobilenet_v1_050", "resnet20_cifar", "shufflenet_v1_g3"]  # one per module


def test_names() -> None:
    assert set(NETWORKS) == set(EXPECTED)
    assert list_architectures("fixify") == REFS
    assert not set(NETWORKS) & {ref.partition("/")[2] for ref in list_architectures("timm")}
    for name in NETWORKS:  # found under every spelling, and known to have no weights
        assert {parse_architecture(f"{prefix}{name}").ref for prefix in ("", "timm/", "fixify/")} == {f"fixify/{name}"}
        with pytest.raises(SourceError, match=f"fixify/{name}"):
            open_source(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_counts(name: str) -> None:
    parameters, features, classes = EXPECTED[name]
    arch = parse_architecture(name)
    model = build(arch, meta=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    (site,) = find_classifiers(model, arch)
    assert (site.path, site.num_features, site.num_classes) == ("fc", features, classes)
    assert default_num_classes(arch) == classes


def _shufflenet(branch: int, biases: tuple, norms: tuple, grouped: int, stem: tuple, scalar: int) -> int:
    """Count the parameters of a ShuffleNet with 3 groups; see `fixify.models.networks.shufflenet_v1`."""
    kernel, stem_bias, stem_norm = stem
    total, before = 3 * 24 * kernel**2 + 24 * stem_bias + 48 * stem_norm, 24
    for stage, (width, units) in enumerate(((240, 4), (480, 8), (960, 4))):
        for unit in range(units):
            into = before if unit == 0 else width
            out = width - before if unit == 0 else width
            middle = (out if branch else width) // 4
            groups = 3 if grouped or stage or unit else 1
            total += into * middle // groups + 9 * middle + middle * out // 3
            total += sum(b * c for b, c in zip(biases, (middle, middle, out), strict=True))
            total += sum(2 * n * c for n, c in zip(norms, (middle, middle, out), strict=True))
        before = width
    return total + 960 * 1000 + 1000 + scalar


def test_one_shufflenet_alone_has_the_printed_number_of_parameters() -> None:
    yes_no, three = (0, 1), list(itertools.product((0, 1), repeat=3))
    stems = list(itertools.product((1, 3), yes_no, yes_no))
    assert _shufflenet(0, (0, 0, 0), (1, 1, 1), 0, (3, 0, 1), 0) == 1_865_728  # as Zhang et al. describe it
    found = [
        choice
        for choice in itertools.product(yes_no, three, three, yes_no, stems, yes_no)
        if _shufflenet(*choice) == 1_826_555
    ]
    assert found == [(1, (1, 1, 1), (1, 1, 1), 0, (3, 1, 0), 1)]
    # Without the scalar it is the network here; the scale of a fixed head gives the printed number.
    model = timm.create_model("shufflenet_v1_g3")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_826_555 - 1
    assert all(parameter.numel() % 2 == 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", SAMPLE)
def test_timms_interface(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.5).eval()
    side = 64 if model.pretrained_cfg["input_size"][1] == 224 else 32
    x = torch.randn(1, 1, side, side)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
    assert torch.equal(model(x), model.forward_head(features))
    assert model.get_classifier() is model.fc and model.num_classes == 7
    assert model.default_cfg["classifier"] == "fc" and model.default_cfg["architecture"] == name
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 1

    plain = _gradients(model, x)
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, x), plain, strict=True))

    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(map(len, groups.values())) == len(list(model.parameters()))
        assert len(groups) > len(model.stages)

    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    maps = timm.create_model(name, features_only=True)
    with torch.inference_mode():
        shapes = [m.shape for m in maps(torch.randn(1, 3, side, side))]
    assert maps.feature_info.channels() == [shape[1] for shape in shapes]
    assert maps.feature_info.reduction() == [side // shape[2] for shape in shapes]


def _gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["densenet100_bc_cifar", "shufflenet_v1_g3"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    """A checkpoint that names no architecture is recognised and converted; its features are equal bit for bit."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=23, in_chans=1).eval()
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    fixify.convert(tmp_path / "mine.safetensors", tmp_path / "mine.fixed.safetensors")
    fixed = fixify.load(tmp_path / "mine.fixed.safetensors")
    assert type(fixed) is type(model) and isinstance(fixed.get_classifier(), fixify.FixedClassifier)
    assert fixed.fixify_info.architecture.spelled == f"fixify/{name},in_chans=1"
    assert fixify.report(tmp_path / "mine.fixed.safetensors").removable == 23 * model.num_features
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(fixed.forward_features(x), model.forward_features(x))
    assert fixed(x).shape == (1, 23)


def test_other_key_names_are_recognised_by_shapes_and_nothing_else_is() -> None:
    state = build(parse_architecture("densenet100_bc_cifar"), num_classes=37, meta=True).state_dict()
    shapes = [tuple(tensor.shape) for key, tensor in state.items() if not is_counter(key)]
    found = identify({f"x{number}": shape for number, shape in enumerate(shapes)})
    assert found.by == "shapes"
    assert [candidate.architecture.ref for candidate in found.candidates] == ["fixify/densenet100_bc_cifar"]
    # The ResNet-20 of He et al., whose shortcuts have no parameters, is another network.
    plain = build(parse_architecture("resnet20_cifar"), meta=True).state_dict()
    with pytest.raises(fixify.FixifyError, match=rf"\b{sum('.shortcut.' not in key for key in plain)}\b"):
        identify({key: tuple(tensor.shape) for key, tensor in plain.items() if ".shortcut." not in key})


def test_shipped_index_has_them_as_they_are_built() -> None:
    """After changing one of them, run `python -m fixify.models.index`."""
    shipped = [entry for entry in load_index().entries if entry.architecture.library == "fixify"]
    built = list(entries_of(REFS))
    assert [(entry.architecture, entry.signature) for entry in shipped] == [
        (e.architecture, e.signature) for e in built
    ]
    # No other architecture has these shapes, so no other checkpoint can be taken for one of them.
    others = [entry.signature for entry in load_index().entries if entry.architecture.library != "fixify"]
    assert not {s.named for s in others} & {entry.signature.named for entry in shipped}
    assert not {s.ordered for s in others} & {entry.signature.ordered for entry in shipped}


def test_timm_knows_them() -> None:
    """`import fixify.models` registers them; tests/test_layers.py checks that `import fixify` does not."""
    assert set(NETWORKS) <= set(timm.list_models())
    assert timm.list_models(module="residual") == ["resnet18_050", "resnet20_cifar", "resnet44_cifar", "resnet56_cifar"]
    with pytest.raises(RuntimeError, match="resnet20_cifar"):
        timm.create_model("resnet20_cifar", pretrained=True)
