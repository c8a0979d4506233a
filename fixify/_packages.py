"""Check that packages are installed that only some commands need."""

from __future__ import annotations

import importlib.metadata
import re

from fixify.errors import UsageError

_LEAST = {"onnx": "1.19", "onnxscript": "0.6", "onnxruntime": "1.24"}
"""The oldest version of each with which the tests passed."""
_LEAST_TORCH = "2.12"
"""The oldest version of torch whose exporter writes the models of the tests."""


def require_onnx(doing: str, *names: str) -> None:
    """Check that packages of the extra `onnx` are installed, in versions that do.

    Args:
        doing: What needs them, at the beginning of a sentence.
        names: The packages; none for all of them, and a torch that exports.

    Raises:
        UsageError: one is missing or too old; the hint says what to install.
    """
    for name, least in {name: _LEAST[name] for name in names or _LEAST}.items():
        _require(doing, name, least)
    if not names:
        _require(doing, "torch", _LEAST_TORCH)


def _require(doing: str, name: str, least: str) -> None:
    hint = "pip install --upgrade 'fixify[onnx]'   (Python 3.11 or newer)"
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"{doing} needs the package {name}.", hint=hint) from None
    if _numbers(installed) < _numbers(least):
        raise UsageError(f"{doing} needs {name} {least} or newer; {installed} is installed.", hint=hint)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
