"""What the commands say of a checkpoint of the paper's published code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fixify.models import build, parse_architecture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def saved(tmp_path: Path) -> None:
    """old.pth, a Hadamard head, and random.pth, a random orthogonal one, in the folder where commands run."""
    model = build(parse_architecture("fixify/resnet20_cifar"), num_classes=10)
    backbone = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("fc.")}
    for name, scale in (("old", "scale"), ("random", "weight")):
        head = {f"fc.{scale}": torch.tensor([0.3]), "fc.bias": torch.zeros(10)}
        torch.save({"state_dict": backbone | head}, tmp_path / f"{name}.pth")


@pytest.mark.usefixtures("saved")
def test_what_it_is(run: Run) -> None:
    code, out, err = run("identify", "old.pth", "--json")
    assert code == 0, err
    assert json.loads(out)["reference_code_head"] == "fc"
    assert [each["architecture"]["name"] for each in json.loads(out)["candidates"]] == ["resnet20_cifar"]
    assert "fc" in err and "published code" in " ".join(err.split())
    code, out, err = run("plan", "old.pth")
    assert code == 0, err
    assert "fc is fixed already" in " ".join(out.split())
    assert "Rankin" not in out and max(map(len, out.splitlines())) <= 80
    code, _, err = run("inspect", "old.pth")
    assert code == 1 and "fixify convert old.pth" in err


@pytest.mark.usefixtures("saved")
def test_counts_before_and_after_converting(run: Run) -> None:
    code, out, err = run("report", "old.pth", "random.pth", "--json")
    assert code == 0, err
    old, random = json.loads(out)["models"]
    assert old["fixed"] and old["savings"]["classifier_bytes_after"] == 44 and old["savings"]["removed"] == 640
    said = " ".join(err.split())
    assert "old.pth: fc" in said and "random.pth: fc" in said
    assert "matrix" in random["note"]

    code, _, err = run("convert", "random.pth")
    assert code == 1 and "--head hadamard" in err
    code, _, err = run("convert", "old.pth")
    assert code == 0, err
    assert "next: fixify eval old.fixed.safetensors --data DATA" in err
    code, out, err = run("report", "old.fixed.safetensors", "--json")
    assert json.loads(out)["models"][0]["savings"] == old["savings"]
