"""Files that keep a network and its classifier as two state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fixify.checkpoints.learned import read_original
from fixify.checkpoints.open import open_model
from fixify.errors import FixifyError, SourceError
from fixify.identification import identify


def parts() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Return a network, its tensors without the classifier, and those of the classifier."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    nn.init.normal_(model.fc.bias)
    state = model.state_dict()
    network = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    return model, network, {"weight": state["fc.weight"], "bias": state["fc.bias"]}


def save(tree: Any, path: Path) -> Path:
    torch.save(tree, path)
    return path


@pytest.mark.parametrize("inner", ["", "fc.", "head.1."])
@pytest.mark.parametrize("keys", [("backbone", "classifier"), ("model", "head"), ("encoder", "fc"), ("net", "linear")])
def test_two_parts_are_joined(tmp_path: Path, keys: tuple[str, str], inner: str) -> None:
    model, network, head = parts()
    tree = {keys[0]: network, keys[1]: {inner + key: tensor for key, tensor in head.items()}, "epoch": 3}
    opened = open_model(save(tree, tmp_path / "w.pth"), arch="test_resnet")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened.model(images), model(images))
    assert any("joined" in note and keys[0] in note and keys[1] in note for note in opened.notes)


@pytest.mark.parametrize("keys", [("backbone", "classifier"), ("model", "head"), ("encoder", "fc")])
@pytest.mark.parametrize("name", ["mlp", "norm", "wide", "other network"])
def test_parts_that_make_no_network_are_refused_with_both_names(
    tmp_path: Path, keys: tuple[str, str], name: str
) -> None:
    _, network, head = parts()
    if name == "mlp":
        head = nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 5)).state_dict()
    elif name == "norm":
        head = nn.Sequential(nn.BatchNorm1d(96), nn.Linear(96, 5)).state_dict()
    elif name == "wide":
        head = nn.Linear(97, 5).state_dict()
    else:
        network = {f"other.{key}": tensor for key, tensor in network.items() if "layer2" not in key}
    path = save({keys[0]: network, keys[1]: head}, tmp_path / "w.pth")
    for call in (read_original, lambda path: read_original(path, arch="test_resnet"), identify):
        with pytest.raises(FixifyError) as error:
            call(path)
        assert all(key in error.value.message for key in keys)
        assert "torch.save" in (error.value.hint or "")


def test_a_second_classifier_is_not_joined(tmp_path: Path) -> None:
    model, _, head = parts()
    with pytest.raises(SourceError, match="head"):
        read_original(save({"model": model.state_dict(), "head": head}, tmp_path / "w.pth"))


def test_two_networks_are_not_joined(tmp_path: Path) -> None:
    _, network, _ = parts()
    with pytest.raises(SourceError, match="no weights") as error:
        read_original(save({"student": network, "teacher": network}, tmp_path / "w.pth"))
    assert "student" in (error.value.hint or "") and "teacher" in (error.value.hint or "")
