"""Checkpoints of the paper's reference code (github.com/eladhoffer/fix_your_classifier), converted and refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import scipy.linalg
import timm
import torch
from torch import Tensor

import fixify
import fixify.models  # timm knows resnet20_cifar from here on
from fixify.checkpoints.learned import read_original
from fixify.checkpoints.open import open_model
from fixify.checkpoints.reference_code import find_reference_code_head
from fixify.checkpoints.verify import verify
from fixify.conversion import convert
from fixify.errors import HeadSpecError, SourceError, UsageError

SCALE, CLASSES = 0.37, 10
# Pattern -> the name in its author's networks for CIFAR. Ours have the same layers in the same order.
THEIRS = (
    (r"^stem\.conv", "conv1"),
    (r"^stem\.bn", "bn1"),
    (r"^stages\.(\d)", lambda found: f"layer{int(found[1]) + 1}"),
    (r"shortcut", "downsample"),
)


def hadamard_logits(x: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Compute what `HadamardProj` does with features [B, N], from its description."""
    order = 2 ** math.ceil(math.log2(max(x.shape[1], len(bias))))
    weight = torch.from_numpy(scipy.linalg.hadamard(order)).to(x.dtype)[: len(bias), : x.shape[1]]
    unit = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-8)
    return -scale * (unit @ weight.T) + bias


def network(name: str = "resnet20_cifar", num_classes: int = CLASSES) -> torch.nn.Module:
    """A network with the BatchNorm statistics of a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model(name, num_classes=num_classes)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def their_name(key: str) -> str:
    for ours, theirs in THEIRS:
        key = re.sub(ours, theirs, key)
    return key


def save(
    path: Path, model: torch.nn.Module, head: dict[str, Tensor], *, prefix: str = "module.", counters: bool = False
) -> Path:
    """Write a checkpoint as its author's script did. Before PyTorch 0.4.1, BatchNorm had no counters."""
    state = {
        prefix + their_name(key): tensor
        for key, tensor in model.state_dict().items()
        if not key.startswith("fc.") and (counters or not key.endswith("num_batches_tracked"))
    }
    state |= {f"{prefix}fc.{name}": tensor for name, tensor in head.items()}
    regime = {0: {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}, 81: {"lr": 0.01}}
    kept = {"epoch": 4, "model": "resnet", "config": "{'depth': 20}", "state_dict": state}
    torch.save({**kept, "best_prec1": torch.tensor(91.5), "regime": regime}, path)
    return path


def trained(num_classes: int = CLASSES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    return {"scale": torch.tensor([SCALE]), "bias": torch.randn(num_classes, generator=generator)}


@torch.inference_mode()
def expected(model: torch.nn.Module, images: Tensor, head: dict[str, Tensor]) -> Tensor:
    model = model.double()
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    return hadamard_logits(features, float(head["scale"]), head["bias"].double())


@pytest.mark.parametrize(("name", "num_classes"), [("resnet20_cifar", 10), ("resnet44_cifar", 64)])
def test_logits_are_those_of_the_reference_code(tmp_path: Path, name: str, num_classes: int) -> None:
    """The checkpoint is recognised by its shapes, and compared with the formula in float64."""
    model, head = network(name, num_classes), trained(num_classes)
    source = save(tmp_path / "old.pth", model, head, counters=num_classes == 64)
    done = convert(source, tmp_path / "old.fixed.safetensors")
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slim = fixify.load(done.path).double()
    wanted = expected(model, images, head)
    assert wanted.std() > 0.1
    with torch.inference_mode():
        torch.testing.assert_close(slim(images), wanted, atol=1e-6, rtol=1e-6)  # alpha is stored in float32
        torch.testing.assert_close(open_model(source).model.double()(images), wanted, atol=1e-6, rtol=1e-6)
    spec = done.info.heads[0].spec
    assert spec.construction == "truncated-sylvester" and not spec.matched and not spec.standardize
    assert torch.equal(slim.fc.bias.float(), head["bias"])
    assert slim.fc.scale.item() == pytest.approx(SCALE * 8)
    assert done.notes[-1].startswith("fc: the Hadamard head")
    assert all(check.passed for check in verify(done.path, source=source))
    assert done.savings.removed == 64 * num_classes
    assert done.savings.classifier_bytes_before == 4 * 65 * num_classes
    assert done.savings.classifier_bytes_after == 4 * (num_classes + 1)
    assert done.savings.parameters_before == sum(p.numel() for p in network(name, num_classes).parameters())


def test_duplicate_codes_are_refused(tmp_path: Path) -> None:
    """CIFAR-100 on 64 features: in the reference code, 36 classes have the same row as another class."""
    source = save(tmp_path / "old.pth", network(num_classes=100), trained(100))
    with pytest.raises(HeadSpecError, match=r"class 64 .*class 0\b.*\b36\b") as error:
        convert(source, tmp_path / "old.fixed.safetensors")
    assert "--head hadamard" in error.value.hint
    assert convert(source, tmp_path / "new.fixed.safetensors", head="hadamard").info.num_classes == 100


def test_random_features_in_float64(tmp_path: Path) -> None:
    """The converted head alone, for 20 classes on 256 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model("test_efficientnet", num_classes=20).eval()
    head = trained(20)
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("classifier.")}
    state |= {f"classifier.{name}": tensor for name, tensor in head.items()}
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    done = convert(tmp_path / "old.pth", arch="timm/test_efficientnet", out=tmp_path / "a.fixed.safetensors")
    slim = fixify.load(done.path).classifier.double()
    x = torch.randn(50, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).relu()
    with torch.inference_mode():
        torch.testing.assert_close(slim(x), hadamard_logits(x, SCALE, head["bias"].double()), atol=1e-6, rtol=1e-6)
    assert done.info.architecture.ref == "timm/test_efficientnet"
    held = convert(
        tmp_path / "old.pth", arch="timm/test_efficientnet", out=tmp_path / "b.fixed.safetensors", fixed_scale=True
    )
    again = fixify.load(held.path).classifier
    assert held.info.heads[0].spec.fixed_scale and torch.equal(again.scale, slim.scale.float())


def test_torchvisions_resnet(tmp_path: Path) -> None:
    """Its author's ImageNet networks have torchvision's key names, which timm shares, so the library must be given."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = torchvision.models.resnet18(num_classes=37).eval()
    head = trained(37)
    source = save(tmp_path / "old.pth", model, head)
    done = convert(source, tmp_path / "old.fixed.safetensors", arch="torchvision/resnet18")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.fc = torch.nn.Identity()
    with torch.inference_mode():
        wanted = hadamard_logits(model.double()(images), SCALE, head["bias"].double())
        torch.testing.assert_close(fixify.load(done.path).double()(images), wanted, atol=1e-6, rtol=1e-6)


MATRIX = torch.from_numpy(scipy.linalg.hadamard(64))
RANDOM = torch.linalg.qr(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))[0].T
REFUSED = {
    "random orthogonal": ({"weight": torch.tensor([10.0])}, "seed 123", "--head hadamard"),
    "its matrix": (
        {"weight": torch.tensor([10.0]), "proj": RANDOM},
        r"fc\.proj.*\[10, 64\]",
        "--head hadamard",
    ),
    "a learned matrix": (
        {"scale": torch.tensor([0.3]), "proj": MATRIX * 1.01},
        r"fc\.proj.*\[64, 64\]",
        "--head hadamard",
    ),
    "a matrix without scale": ({"proj": RANDOM}, r"fc\.proj.*\[10, 64\]", "--head hadamard"),
    "Hadamard without scale": ({"proj": MATRIX}, "fc .*scale", "torch.tensor([S])"),
    "fixed scale": ({}, "fc .*bias", "state['fc.scale'] = torch.tensor([S])"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_cannot_be_rebuilt_are_refused_and_their_backbone_can_be_kept(tmp_path: Path, case: str) -> None:
    stored, words, advice = REFUSED[case]
    model = network()
    source = save(tmp_path / "old.pth", model, {**stored, "bias": torch.zeros(10)})
    with pytest.raises(SourceError, match=words) as error:
        convert(source, tmp_path / "a.fixed.safetensors")
    assert advice in error.value.hint
    with pytest.raises(SourceError, match=words):
        open_model(source)
    done = convert(source, tmp_path / "b.fixed.safetensors", head="hadamard")  # as the hint says
    assert done.notes[-1].startswith("fc: a new head")
    assert done.info.heads[0].spec.construction == "sylvester-64" and not done.info.heads[0].spec.matched
    slim = fixify.load(done.path)
    assert torch.equal(slim.stem.conv.weight, model.stem.conv.weight)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_saved_hadamard_matrix_is_left_out(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = convert(save(tmp_path / "a.pth", network(), trained()), tmp_path / "a.fixed.safetensors")
    source = save(tmp_path / "b.pth", network(), {"proj": MATRIX.to(dtype), **trained()})
    saved = convert(source, tmp_path / "b.fixed.safetensors")
    assert saved.info.heads == plain.info.heads
    assert {k: v.tolist() for k, v in fixify.load(saved.path).fc.state_dict().items()} == {
        k: v.tolist() for k, v in fixify.load(plain.path).fc.state_dict().items()
    }


def test_without_bias_the_number_of_classes_is_not_there(tmp_path: Path) -> None:
    source = save(tmp_path / "old.pth", network(), {"scale": torch.tensor([0.3])})
    with pytest.raises(SourceError, match=r"fc .*scale.*bias") as error:
        read_original(source)
    assert "state['fc.bias'] = torch.zeros(C)" in error.value.hint


def test_options_that_conflict_with_a_trained_head(tmp_path: Path) -> None:
    source, out = save(tmp_path / "old.pth", network(), trained()), tmp_path / "out.fixed.safetensors"
    for options, advice in (
        ({"scale": 5.0}, "--alpha"),
        ({"bias": False}, "--no-bias"),
        ({"calibrate": tmp_path}, "--calibrate"),
        ({"head": "binary"}, "--head hadamard"),
    ):
        with pytest.raises(UsageError, match=r"old\.pth") as error:
            convert(source, out, **options)
        assert advice in error.value.hint
    assert not out.exists()
    new = convert(source, out, num_classes=7)
    assert new.info.num_classes == 7 and new.info.heads[0].spec.construction == "sylvester-64"


@pytest.mark.parametrize("name", ["timm/caformer_s18", "timm/poolformerv2_s12", "timm/hgnetv2_b0"])
def test_activations_with_a_scale_are_no_such_heads(name: str) -> None:
    model = fixify.models.build(fixify.models.parse_architecture(name), num_classes=10, meta=True)
    state = model.state_dict()
    assert any(key.endswith(".scale") for key in state)
    assert find_reference_code_head(state) is None
    assert find_reference_code_head({key: value for key, value in state.items() if not key.startswith("head.")}) is None
