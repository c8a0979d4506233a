"""Check that packages are installed that only some commands need."""

from __future__ import annotations

import importlib.util

from fixify.errors import UsageError


def require_onnx(doing: str, *names: str) -> None:
    """Check that packages of the extra `onnx` are installed.

    Args:
        doing: What needs them, at the beginning of a sentence.
        names: The packages; none for all of them.

    Raises:
        UsageError: one is missing; the hint says what to install.
    """
    for name in names or ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{doing} needs the package {name}.", hint="pip install 'fixify[onnx]'")
