"""`fixify export`, and the commands that run what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_export_then_predict_and_eval(run: Run, make_stripes: Callable[[int, int], Path], tmp_path: Path) -> None:
    folder = make_stripes(8, 8)
    code, out, err = run("export", folder / "net.fixed.safetensors", "--images", folder / "data", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["paths"] == ["net.onnx"]
    assert [check["count"] for check in found["checks"]] == [5, 8]
    assert found["bytes"] == (tmp_path / "net.onnx").stat().st_size
    image = next((folder / "data" / "val").rglob("*.png"))
    code, out, err = run("predict", "net.onnx", image, "--json")
    assert code == 0, err
    assert len(json.loads(out)["predictions"][0]["classes"]) == 4
    code, out, err = run("eval", "net.onnx", "--data", folder / "data", "--workers", "0", "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["models"][0]["num_images"] == 8
    assert run("export", folder / "net.fixed.safetensors")[0] == 1
    code, out, err = run("inspect", "net.onnx", "--json")
    assert code == 0, err


def test_head_only(run: Run, make_stripes: Callable[[int, int], Path], tmp_path: Path) -> None:
    folder = make_stripes(4, 4)
    code, out, err = run("export", folder / "net.fixed.safetensors", "--head-only")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"net.head.onnx", "net.head.npz"}
    assert "random features" in out


def test_a_failed_check_is_exit_code_3(
    run: Run, make_stripes: Callable[[int, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_stripes(4, 4)
    monkeypatch.setattr("fixify.exporting.head_only.EXACT", 0.0)
    code, _, err = run("export", folder / "net.fixed.safetensors", "--head-only")
    assert code == 3
    assert "check" in err
    assert list(tmp_path.iterdir()) == []


def test_bad_usage(run: Run, make_stripes: Callable[[int, int], Path]) -> None:
    slim = make_stripes(4, 4) / "net.fixed.safetensors"
    assert run("export", slim, "--to", "dense", "--portable")[0] == 2
    assert run("export", slim, "--opset", "9")[0] == 2
    assert run("export", slim.parent / "learned.pth")[0] == 2
