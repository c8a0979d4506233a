"""fixify.reporting.costs: is it worth it, from names and shapes alone."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from tools.headers import outlines_of, write_header

from fixify import lookup
from fixify.conversion import convert
from fixify.errors import FixifyError, FormatError, NoClassifierError, SourceError
from fixify.heads import KINDS
from fixify.reporting import costs
from fixify.reporting.costs import plan


def _kinds(source: object) -> dict:
    return {kind.kind: kind for kind in plan(source).kinds}  # type: ignore[arg-type]


def test_verdicts() -> None:
    shares = {"resnet18": "4.4", "torchvision/alexnet": "6.7", "ghostnet_100": "24.7", "mobilenetv3_small_050": "64.3"}
    verdicts = {name: costs._verdict(costs.report(name)) for name in shares}
    assert all(f"{share} %" in verdicts[name] and name in verdicts[name] for name, share in shares.items())
    assert len({verdict.rpartition(": ")[2] for verdict in verdicts.values()}) == 4


@pytest.mark.parametrize(
    ("head", "num_classes"), [("hadamard", 10), ("hadamard", 300), ("orthogonal", 10), ("simplex", 10), ("binary", 300)]
)
def test_bytes_are_those_that_convert_stores(tmp_path: Path, head: str, num_classes: int) -> None:
    path = tmp_path / "model.safetensors"
    model = timm.create_model("test_efficientnet", num_classes=num_classes)
    safetensors.torch.save_file(model.state_dict(), path)
    made = plan(path)
    planned = {kind.kind: kind for kind in made.kinds}[head]
    done = convert(path, tmp_path / "out.fixed.safetensors", head=head)
    assert planned.stored == done.savings.classifier_bytes_after
    assert planned.saved == done.savings.classifier_bytes_before - done.savings.classifier_bytes_after
    if head == "hadamard":
        assert made.report.savings == done.savings
        assert (planned.note is None) is (num_classes <= 256)


def test_every_head_counts() -> None:
    kinds = _kinds("crossvit_9_240")
    assert kinds["orthogonal"].stored == sum(KINDS["orthogonal"].planned_bytes(width, 1000) for width in (128, 256))
    assert kinds["orthogonal"].saved == 4 * (128 + 256 + 2) * 1000 - kinds["orthogonal"].stored
    assert kinds["simplex"].stored is None and "at most 129" in (kinds["simplex"].note or "")
    assert "class order" in (kinds["hadamard"].note or "")  # 1000 classes, 128 features


def test_widths_without_a_hadamard_matrix(tmp_path: Path) -> None:
    kinds = _kinds("rexnet_100,initial_chs=18")  # whatever its width: some kind can be had
    assert kinds["orthogonal"].coherence is not None
    path = tmp_path / "model.pth"
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=386, num_heads=2, depth=1, num_classes=10)
    torch.save(model.state_dict(), path)
    kinds = {
        kind.kind: kind for kind in plan(path, arch="vit_tiny_patch16_224,embed_dim=386,num_heads=2,depth=1").kinds
    }
    assert kinds["hadamard"].stored is None and "386" in (kinds["hadamard"].note or "")
    assert kinds["orthogonal"].stored == KINDS["orthogonal"].planned_bytes(386, 10)


F16, BF16 = torch.float16, torch.bfloat16
# Architecture, classes, type of the weights, what is before the names, metadata, and `arch`.
KNOWN: list[tuple[str, int, torch.dtype | None, str, dict, str | None]] = [
    ("resnet50", 1000, None, "", {}, "timm/resnet50"),
    ("resnet50", 1000, F16, "", {"architecture": "timm/resnet50.a1_in1k"}, None),
    ("torchvision/resnet50", 10, None, "module.", {}, "torchvision/resnet50.IMAGENET1K_V2"),
    ("densenet121", 10, BF16, "module._orig_mod.", {"class_names": '["a"]'}, "densenet121.tv_in1k"),
    ("vit_tiny_patch16_224", 11221, None, "", {"format": "pt"}, "vit_tiny_patch16_224"),
    ("convnext_tiny", 10, BF16, "", {}, None),
    ("mobilenetv4_conv_small", 1000, None, "", {}, None),
    ("deit_tiny_distilled_patch16_224", 1000, None, "model.", {}, None),
    ("volo_d1_224", 10, F16, "", {}, None),
    ("levit_128s", 10, None, "", {}, None),
    ("torchvision/mobilenet_v3_large", 37, None, "", {}, None),
    ("torchvision/squeezenet1_1", 10, None, "", {}, None),
    ("torchvision/swin_t", 1000, F16, "", {}, None),
    ("torchvision/vit_b_16", 1000, None, "", {}, None),
    ("torchvision/googlenet", 1000, None, "", {}, "torchvision/googlenet.IMAGENET1K_V1"),
    ("caformer_s18", 2048, None, "", {}, "caformer_s18"),  # its hidden layer is as wide as its classifier
    ("fixify/resnet56_cifar", 10, None, "", {}, None),
]
REFUSED: list[tuple[str, int, torch.dtype | None, str, dict, str | None]] = [
    ("resnet50", 1000, None, "", {}, None),  # ambiguous
    ("torchvision/googlenet", 1000, None, "", {}, None),
    ("resnet50", 1000, None, "", {"architecture": "timm/resnet18"}, None),
    ("vit_base_patch16_clip_224", 512, None, "", {}, "vit_base_patch16_clip_224.openai"),  # a tower
    ("convnext_tiny", 10, torch.int8, "", {}, None),
    ("levit_128s", 10, None, "", {"architecture": "levit_128s", "pretrained_cfg": '{"std": [0.0, 1, 1]}'}, None),
]


def _outcome(path: Path, arch: str | None) -> object:
    try:
        return plan(path, arch=arch).to_dict()
    except FixifyError as error:
        return type(error), error.message, error.hint


@pytest.mark.parametrize(("ref", "num_classes", "dtype", "prefix", "metadata", "arch"), KNOWN + REFUSED)
def test_the_index_and_the_libraries_give_the_same_plan(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ref: str,
    num_classes: int,
    dtype: torch.dtype | None,
    prefix: str,
    metadata: dict[str, str],
    arch: str | None,
) -> None:
    tensors = outlines_of(ref, num_classes, dtype)
    path = write_header(tmp_path / "net.safetensors", {prefix + key: each for key, each in tensors.items()}, metadata)
    quick = _outcome(path, arch)
    assert isinstance(quick, dict) is ((ref, num_classes, dtype, prefix, metadata, arch) in KNOWN)
    for name in ("identify_by_keys", "fit_by_keys", "parse_known"):
        monkeypatch.setattr(lookup, name, lambda *_, **__: None)
    assert _outcome(path, arch) == quick


@pytest.mark.parametrize(
    ("ref", "num_classes", "parameters", "removed", "num_bytes", "heads"),
    [  # as torch counted them
        ("timm/levit_128s", 10, 7_014_758, 7_680, 28_218_040, ((384, 10), (384, 10))),
        ("torchvision/swin_t", 1000, 28_288_354, 768_000, 113_383_912, ((768, 1000),)),
        ("timm/mobilenetv4_conv_small", 10, 2_505_834, 12_800, 10_124_056, ((1280, 10),)),
    ],
)
def test_counts(
    tmp_path: Path, ref: str, num_classes: int, parameters: int, removed: int, num_bytes: int, heads: tuple
) -> None:
    made = plan(write_header(tmp_path / "net.safetensors", outlines_of(ref, num_classes))).report
    assert (made.architecture, made.heads) == (ref, heads)
    assert made.savings.parameters_before == parameters
    assert (made.savings.removed, made.savings.bytes_before) == (removed, num_bytes)


def test_any_source(tmp_path: Path) -> None:
    """A folder of the hub's kind, and the ways to name one."""
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 7}))
    for source in (tmp_path, f"local-dir:{tmp_path}", tmp_path / "model.safetensors"):
        assert plan(source).report.num_classes == 7
    assert costs.report("torchvision/resnet18:IMAGENET1K_V1").num_features == 512
    with pytest.raises(SourceError, match="nowhere"):
        plan("local-dir:nowhere")
    with pytest.raises(SourceError, match=r"nowhere\.pth"):
        plan("nowhere.pth")
    with pytest.raises(SourceError, match="fasterrcnn"):
        plan("torchvision/fasterrcnn_resnet50_fpn")
    with pytest.raises(NoClassifierError, match="dinov2"):
        plan("vit_small_patch14_dinov2")


def test_slim_checkpoints_are_planned_already(small_pth: Path, tmp_path: Path) -> None:
    done = convert(small_pth, tmp_path / "out.fixed.safetensors", arch="test_efficientnet", match=False)
    with pytest.raises(FormatError, match=re.escape(str(done.path))):
        plan(done.path)
