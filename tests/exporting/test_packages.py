"""The packages that exporting to ONNX needs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

import fixify
from fixify._packages import require_onnx
from fixify.errors import UsageError


def test_they_are_installed() -> None:
    """Show why the tests of ONNX files were left out, where they were."""
    try:
        require_onnx("Exporting")
    except UsageError as error:
        pytest.skip(error.message)


def test_a_missing_package_is_named(
    slims: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UsageError, match="package onnx") as caught:
        fixify.export(slims(head="hadamard"), tmp_path / "net.onnx")
    assert "fixify[onnx]" in str(caught.value.hint)


@pytest.mark.parametrize("old", ["onnx", "onnxscript", "onnxruntime", "torch"])
def test_an_old_package_is_named(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnx": "1.19.0", "onnxscript": "0.6.0", "onnxruntime": "1.24.1", "torch": "2.12.0+cpu"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    require_onnx("Exporting")
    versions[old] = {"onnxscript": "0.5.9"}.get(old, "1.9.3")
    with pytest.raises(UsageError, match=f"{old}.*{versions[old]}"):
        require_onnx("Exporting")
    require_onnx("Running", "onnxruntime" if old != "onnxruntime" else "onnx")
