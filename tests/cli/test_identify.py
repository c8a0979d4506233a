"""`fixify identify`: what a file says of itself, beside what its keys and shapes say."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.cli.app import main
from fixify.models import build, parse_architecture


def _save(path: Path, name: str, metadata: dict[str, str] | None = None) -> None:
    shapes = build(parse_architecture(name), num_classes=9, meta=True).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    safetensors.torch.save_file(state, path, metadata=metadata)


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, str]:
    monkeypatch.setattr(sys, "argv", ["fixify", "identify", *map(str, arguments), "--json"])
    try:
        main()
    except SystemExit as end:
        assert not end.code
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_what_a_file_says_settles_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    _save(path, "resnet18")
    found, err = _run(monkeypatch, capsys, path)
    assert (found["says"], found["fits"], found["by"]) == (None, None, "keys")
    assert len(found["candidates"]) == 3
    assert f"next: fixify convert {path} --arch timm/resnet18 " in err

    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')  # beside it
    found, err = _run(monkeypatch, capsys, path)
    assert (found["says"], found["fits"]) == ("timm/resnet18", True)
    assert "timm/resnet18" in err and f"next: fixify convert {path} " in err and "--arch" not in err

    for other in ('{"architecture": "resnet34"}', '{"architecture": "resnet18", "model_args": {"x": 1}}', "no JSON"):
        (tmp_path / "config.json").write_text(other)  # of another checkpoint, or of another program
        found, _ = _run(monkeypatch, capsys, path)
        assert found["says"] is None


def test_what_does_not_fit_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    _save(path, "resnet18", {"architecture": "timm/resnet34"})
    found, err = _run(monkeypatch, capsys, path)
    assert (found["says"], found["fits"]) == ("timm/resnet34", False)
    assert "warning: " in err and "timm/resnet34" in err and "--arch timm/resnet18" in err


def test_arguments_that_no_list_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path / "model.safetensors", "vit_tiny_patch16_224,depth=2")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2}}')
    found, _ = _run(monkeypatch, capsys, tmp_path)
    assert found["fits"]
    assert [c["architecture"]["kwargs"] for c in found["candidates"]] == [{"depth": 2}]
