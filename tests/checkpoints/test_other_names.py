"""Checkpoints with names that are not today's, or with other heads: the same answer from .pth and .safetensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from fixify.checkpoints.learned import read_original
from fixify.checkpoints.open import open_model
from fixify.conversion import convert
from fixify.errors import AmbiguousArchitectureError, ArchitectureError, HeadSpecError, NoClassifierError, SourceError
from fixify.models.identify import identify

State = dict[str, Tensor]
CONTAINERS = ("pth", "safetensors")


def values(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer values of its own, so that exchanging two of them changes the answers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(folder: Path, state: State, container: str) -> Path:
    path = folder / f"model.{container}"
    if container == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
    return path


def same_answers(path: Path, model: nn.Module, size: int, **options: Any) -> bool:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return torch.equal(read_original(path, **options).model()(images), model(images))


def old_swin(model: Any) -> State:
    """The names of timm before 0.9 and of the authors' code."""
    state = {}
    for key, tensor in model.state_dict().items():
        key = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        state[key.replace("head.fc.", "head.")] = tensor
    for name, module in model.named_modules():
        for buffer in ("relative_position_index", "attn_mask"):
            if getattr(module, buffer, None) is not None:
                state[f"{name}.{buffer}"] = getattr(module, buffer)
    return state


def authors_convnext(model: nn.Module) -> State:
    state = {}
    for key, tensor in model.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key).replace(".blocks.", ".")
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        state[key.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = tensor
    return state


def old_torchvision_vit(model: nn.Module) -> State:
    return {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for key, tensor in model.state_dict().items()
    }


def under(prefix: str, head: str, classifier: str) -> Callable[[nn.Module], State]:
    """A user's own wrapper: the backbone below one name, the classifier below another."""

    def rename(model: nn.Module) -> State:
        return {
            key.replace(classifier, head) if key.startswith(classifier) else prefix + key: tensor
            for key, tensor in model.state_dict().items()
        }

    return rename


def openmmlab(*pairs: tuple[str, str], head: str = "head.fc.") -> Callable[[nn.Module], State]:
    """The names of mmpretrain, from pairs of a pattern of timm's names and what mmpretrain writes there."""

    def rename(model: nn.Module) -> State:
        state = {}
        for key, tensor in model.state_dict().items():
            new = re.sub(r"^(head\.fc|head|fc)\.(?=weight|bias)", head, key)
            for pattern, other in pairs:
                new = re.sub(pattern, other, new)
            state[new if new.startswith("head.") else f"backbone.{new}"] = tensor
        return state

    return rename


MM_MLP = (
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
    (r"patch_embed\.proj", "patch_embed.projection"),
)
mm_vit = openmmlab(
    *MM_MLP,
    *((r"^blocks", "layers"), (r"norm([12])\.", r"ln\1."), (r"^norm\.", "ln1."), (r"^fc_norm\.", "ln2.")),
    head="head.layers.head.",
)
mm_convnext = openmmlab(
    *((r"^stem", "downsample_layers.0"), (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"), (r"\.blocks", "")),
    *((r"mlp\.fc", "pointwise_conv"), (r"conv_dw", "depthwise_conv"), (r"head\.norm", "norm3")),
)


def mm_swin(model: nn.Module) -> State:
    """mmpretrain's Swin: `torch.nn.Unfold` joins the patches, which puts channel by channel, rows before columns."""
    rename = openmmlab(
        *MM_MLP,
        (r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample"),  # type: ignore[arg-type]
        *((r"^layers", "stages"), (r"\.attn\.", ".attn.w_msa."), (r"^norm\.", "norm3.")),
    )
    state = {}
    for key, tensor in rename(model).items():
        if re.search(r"downsample\.(norm|reduction)", key):
            four, channels = tensor.unflatten(-1, (4, -1)), tensor.shape[-1] // 4
            tensor = torch.stack([four[..., place, c] for c in range(channels) for place in (0, 2, 1, 3)], dim=-1)
        state[key] = tensor
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    return state


SWIN = "swin_tiny_patch4_window7_224"
FILES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], State], str, int]] = {
    "Swin of the authors": (lambda: timm.create_model(SWIN, num_classes=5), old_swin, f"timm/{SWIN}", 224),
    "ConvNeXt of the authors": (
        lambda: timm.create_model("convnext_atto", num_classes=5),
        authors_convnext,
        "timm/convnext_atto",
        64,
    ),
    "torchvision's old ViT": (
        lambda: torchvision.models.vit_b_32(num_classes=5),
        old_torchvision_vit,
        "torchvision/vit_b_32",
        224,
    ),
    "MAE, averaged": (
        lambda: timm.create_model("test_vit", num_classes=5, global_pool="avg"),
        lambda model: model.state_dict(),
        'timm/test_vit,global_pool="avg"',
        160,
    ),
    "Swin of mmpretrain": (lambda: timm.create_model(SWIN, num_classes=5), mm_swin, f"timm/{SWIN}", 224),
    "ConvNeXt of mmpretrain": (
        lambda: timm.create_model("convnext_atto", num_classes=5),
        mm_convnext,
        "timm/convnext_atto",
        64,
    ),
    "ConvNeXt V2 of mmpretrain": (
        lambda: timm.create_model("convnextv2_atto", num_classes=5),
        lambda model: {
            key.replace(".mlp.grn.weight", ".grn.gamma").replace(".mlp.grn.bias", ".grn.beta"): tensor
            for key, tensor in mm_convnext(model).items()
        },
        "timm/convnextv2_atto",
        64,
    ),
    "ViT of mmpretrain": (
        lambda: timm.create_model("deit_tiny_patch16_224", num_classes=5),
        mm_vit,
        "timm/deit_tiny_patch16_224",
        224,
    ),
    "ViT of mmpretrain, averaged": (
        lambda: timm.create_model("test_vit", num_classes=5, global_pool="avg"),
        mm_vit,
        'timm/test_vit,global_pool="avg"',
        160,
    ),
    "wrapped": (
        lambda: timm.create_model("test_resnet", num_classes=5),
        under("backbone.", "head.", "fc."),
        "timm/test_resnet",
        64,
    ),
    "mmpretrain": (
        lambda: timm.create_model("test_resnet", num_classes=5),
        under("backbone.", "head.fc.", "fc."),
        "timm/test_resnet",
        64,
    ),
    "wrapper of another name": (
        lambda: timm.create_model("test_resnet", num_classes=5),
        under("feature_extractor.", "feature_extractor.fc.", "fc."),
        "timm/test_resnet",
        64,
    ),
    "last_linear": (
        lambda: timm.create_model("test_resnet", num_classes=5),
        under("", "last_linear.", "fc."),
        "timm/test_resnet",
        64,
    ),
    "Dropout and Linear": (
        lambda: timm.create_model("test_resnet", num_classes=5),
        under("", "fc.1.", "fc."),
        "timm/test_resnet",
        64,
    ),
    "Dropout and Linear in a head": (
        lambda: timm.create_model("test_convnext", num_classes=5),
        under("", "head.fc.1.", "head.fc."),
        "timm/test_convnext",
        64,
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", FILES)
def test_known_names(tmp_path: Path, name: str, container: str) -> None:
    make, rename, spelled, size = FILES[name]
    model = values(make())
    path = saved(tmp_path, rename(model), container)
    original = read_original(path, arch=spelled.partition(",")[0], meta=True)
    assert original.architecture.spelled == spelled and original.num_classes == 5
    assert original.notes
    assert same_answers(path, model, size, arch=spelled)


@pytest.mark.parametrize(
    "name",
    [
        *("Swin of the authors", "ConvNeXt of the authors", "MAE, averaged", "mmpretrain"),
        *("Swin of mmpretrain", "ConvNeXt of mmpretrain", "ViT of mmpretrain"),
    ],
)
def test_known_names_are_recognised(name: str) -> None:
    make, rename, spelled, _ = FILES[name]
    state = rename(make())
    for keys in (list(state), sorted(state)):
        found = identify({key: tuple(state[key].shape) for key in keys})
        assert found.by == "reading"
        assert spelled in [candidate.architecture.spelled for candidate in found.candidates]


def test_the_order_of_unfold() -> None:
    """Joining patches as mmpretrain does, with reordered weights, gives what timm's layer gives."""
    from timm.models.swin_transformer import PatchMerging

    from fixify.models.openmmlab import patches_first

    torch.manual_seed(0)
    images, weight = torch.randn(2, 6, 8, 5), torch.randn(10, 20)  # [batch, height, width, channels]
    joined = nn.functional.unfold(images.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    norm = nn.LayerNorm(20)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    theirs = norm(joined) @ weight.T
    layer = PatchMerging(5, 10)
    layer.reduction.weight.data = patches_first(weight)
    layer.norm.weight.data, layer.norm.bias.data = patches_first(norm.weight.data), patches_first(norm.bias.data)
    torch.testing.assert_close(layer(images).flatten(1, 2), theirs)


def test_openmmlab_without_a_rule_is_refused_by_name(tmp_path: Path) -> None:
    state = {
        "backbone.stages.0.blocks.0.attn.w_msa.logit_scale": torch.ones(3, 1, 1),
        "head.fc.weight": torch.ones(5, 9),
    }
    detector = {key: tensor for key, tensor in mm_swin(timm.create_model(SWIN)).items() if "head" not in key}
    for each, said in ((state, "Swin V2 of mmpretrain"), (detector | {"neck.0.weight": torch.ones(2, 2)}, "OpenMMLab")):
        path = saved(tmp_path, each, "pth")
        for arch in (None, SWIN):
            with pytest.raises(ArchitectureError, match=said) as error:
                read_original(path, arch=arch, meta=True)
            assert "fixify convert timm/" in (error.value.hint or "")


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_converted_file_holds_the_backbone_bit_for_bit(tmp_path: Path, container: str) -> None:
    from fixify.checkpoints.verify import verify

    make, rename, spelled, _ = FILES["MAE, averaged"]
    path = saved(tmp_path, rename(values(make())), container)
    slim = convert(path, tmp_path / "x.fixed.safetensors").path
    assert open_model(slim).architecture.spelled == spelled
    assert all(check.passed for check in verify(slim, source=path))


@pytest.mark.parametrize("container", CONTAINERS)
def test_one_renamed_tensor_is_no_match(tmp_path: Path, container: str) -> None:
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    state = {key.replace("blocks.0.norm1", "blocks.0.pre"): tensor for key, tensor in state.items()}
    path = saved(tmp_path, state, container)
    for arch in (None, "test_vit"):
        with pytest.raises(ArchitectureError) as error:
            read_original(path, arch=arch, meta=True)
        assert "blocks.0.pre.weight" in error.value.message and "blocks.0.norm1.weight" in error.value.message


MLPS = {
    "two": (
        {"fc.0": (64, 96), "fc.3": (5, 64)},
        {},
        r"fc\.0, fc\.3: a hand-made head of two Linears \(96 -> 64 -> 5\)",
    ),
    "norm": ({"fc.1": (5, 96)}, {"fc.0": 96}, r"fc\.1: a hand-made head of one Linear .*fc\.0, a batch norm"),
    "batch norm without weights": ({"fc.1": (5, 96)}, {"fc.0": 0}, r"fc\.1: .* one Linear .*fc\.0, a batch norm"),
    "layer norm": ({"fc.1": (5, 96)}, {"fc.0": -96}, r"fc\.1: a hand-made head of one Linear .*fc\.0, a norm"),
    "named": ({"fc.hidden": (64, 96), "fc.out": (5, 64)}, {}, r"fc\.hidden, fc\.out: .* two Linears"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", MLPS)
def test_hand_made_heads_are_named(tmp_path: Path, name: str, container: str) -> None:
    linear, norms, said = MLPS[name]
    state = {k: v for k, v in timm.create_model("test_resnet").state_dict().items() if not k.startswith("fc.")}
    for path, shape in linear.items():
        state |= {f"{path}.weight": torch.ones(shape), f"{path}.bias": torch.ones(shape[0])}
    for path, width in norms.items():  # negative: without statistics; zero: without weights
        parts = (*(("weight", "bias") if width else ()), *(("running_mean", "running_var") if width >= 0 else ()))
        state |= {f"{path}.{part}": torch.ones(abs(width) or 96) for part in parts}
    path = saved(tmp_path, state, container)
    for arch in (None, "test_resnet"):
        with pytest.raises((ArchitectureError, NoClassifierError), match=said) as error:
            read_original(path, arch=arch, meta=True)
        assert "--arch" not in (error.value.hint or "")


def test_the_difference_is_listed(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    del state["layer1.0.bn1.bias"]
    state |= {"fc2.weight": torch.ones(5, 5), "conv1.0.weight": torch.zeros(16, 3, 5, 5)}
    path = saved(tmp_path, state, "pth")
    with pytest.raises(ArchitectureError) as error:
        read_original(path, arch="test_resnet", meta=True)
    said = error.value.message
    assert re.search(r"missing: .*layer1\.0\.bn1\.bias", said) and re.search(r"extra: .*fc2\.weight", said)
    assert "fc.weight" not in said  # another number of classes is no difference
    assert "--arch" not in (error.value.hint or "")


@pytest.mark.parametrize("container", CONTAINERS)
def test_auxiliary_classifiers_of_another_width(tmp_path: Path, container: str) -> None:
    model = torchvision.models.googlenet(num_classes=1000, aux_logits=True, init_weights=False)
    model.fc = nn.Linear(1024, 5)
    path = saved(tmp_path, values(model).state_dict(), container)
    spelled = "torchvision/googlenet,aux_logits=false,transform_input=false"
    for arch in (None, "torchvision/googlenet"):
        with pytest.raises(AmbiguousArchitectureError) as error:
            read_original(path, arch=arch, meta=True)
        assert spelled in error.value.choices
        assert "aux1, aux2" in error.value.message
        # What to type depends on how the network was trained, and both ways are there.
        assert all(f"--arch {name}" in (error.value.hint or "") for name in error.value.choices)
    original = read_original(path, arch=spelled)
    assert original.num_classes == 5 and any("aux1, aux2" in note for note in original.notes)
    assert same_answers(path, model, 64, arch=spelled)


def test_one_logit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, timm.create_model("test_resnet", num_classes=1).state_dict(), "pth")
    with pytest.raises(SourceError, match="one logit"):
        open_model(path, arch="test_resnet")
    with pytest.raises(HeadSpecError, match="one logit"):
        convert(path, tmp_path / "x.fixed.safetensors", arch="test_resnet")
    with pytest.raises(HeadSpecError, match="one logit"):
        convert(tmp_path / path.name, tmp_path / "x.fixed.safetensors", arch="test_resnet", num_classes=1)
    assert convert(path, tmp_path / "x.fixed.safetensors", arch="test_resnet", num_classes=3).info.num_classes == 3
