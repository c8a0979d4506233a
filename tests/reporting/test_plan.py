"""fixify.reporting.costs: is it worth it, from names and shapes alone."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from fixify.conversion import convert
from fixify.errors import FormatError, NoClassifierError, SourceError
from fixify.heads import KINDS
from fixify.reporting.costs import plan


def _kinds(source: object) -> dict:
    return {kind.kind: kind for kind in plan(source).kinds}  # type: ignore[arg-type]


def test_verdicts() -> None:
    shares = {"resnet18": "4.4", "torchvision/alexnet": "6.7", "ghostnet_100": "24.7", "mobilenetv3_small_050": "64.3"}
    verdicts = {name: plan(name).verdict for name in shares}
    assert all(f"{share} %" in verdicts[name] and name in verdicts[name] for name, share in shares.items())
    assert len({verdict.rpartition(": ")[2] for verdict in verdicts.values()}) == 4


@pytest.mark.parametrize(
    ("head", "num_classes"), [("hadamard", 10), ("hadamard", 300), ("orthogonal", 10), ("simplex", 10), ("binary", 300)]
)
def test_bytes_are_those_that_convert_stores(tmp_path: Path, head: str, num_classes: int) -> None:
    path = tmp_path / "model.safetensors"
    model = timm.create_model("test_efficientnet", num_classes=num_classes)
    safetensors.torch.save_file(model.state_dict(), path)
    planned = _kinds(path)[head]
    done = convert(path, tmp_path / "out.fixed.safetensors", head=head)
    assert planned.stored == done.savings.classifier_bytes_after
    assert planned.saved == done.savings.classifier_bytes_before - done.savings.classifier_bytes_after
    if head == "hadamard":
        assert plan(path).report.savings == done.savings


def test_every_head_counts() -> None:
    kinds = _kinds("crossvit_9_240")
    assert kinds["orthogonal"].stored == sum(KINDS["orthogonal"].planned_bytes(width, 1000) for width in (128, 256))
    assert kinds["orthogonal"].saved == 4 * (128 + 256 + 2) * 1000 - kinds["orthogonal"].stored
    assert kinds["simplex"].stored is None and "at most 129" in (kinds["simplex"].note or "")
    assert "in order" in (kinds["hadamard"].note or "")  # 1000 classes, 128 features
    assert _kinds("resnet50")["hadamard"].note is None


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


def test_any_source(tmp_path: Path) -> None:
    """A folder of the hub's kind, and the ways to name one."""
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 7}))
    for source in (tmp_path, f"local-dir:{tmp_path}", tmp_path / "model.safetensors"):
        assert plan(source).report.num_classes == 7
    assert plan("torchvision/resnet50:IMAGENET1K_V2").report.num_features == 2048
    with pytest.raises(SourceError, match="nowhere"):
        plan("local-dir:nowhere")
    with pytest.raises(SourceError, match=r"nowhere\.pth"):
        plan("nowhere.pth")
    with pytest.raises(SourceError, match="fasterrcnn"):
        plan("torchvision/fasterrcnn_resnet50_fpn")
    with pytest.raises(NoClassifierError, match="dinov2"):
        plan("vit_small_patch14_dinov2")


def test_slim_checkpoints_are_planned_already(small_pth: Path, tmp_path: Path) -> None:
    done = convert(small_pth, tmp_path / "out.fixed.safetensors")
    with pytest.raises(FormatError, match=re.escape(str(done.path))):
        plan(done.path)
