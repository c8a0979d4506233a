"""The digest of a file's tensors, by which a reader notices a single changed bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fixify.errors import FormatError


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of some tensors, in the order of their names.

    >>> digest_of({"a": torch.zeros(2)})[:20]
    'sha256:6ffaf78bf26e0'
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(total, name, tensors[name].detach().cpu().contiguous())
    return f"sha256:{total.hexdigest()}"


def add_to_digest(total: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a contiguous tensor on the CPU to a hash of `hashlib`; the order of the names is part of the digest."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    total.update(json.dumps([name, dtype, list(tensor.shape)]).encode() + b"\n")
    total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def compare_digests(found: str, recorded: str, path: Path | str) -> None:
    """Check that the digest of a file's tensors is the recorded one.

    Raises:
        FormatError: it is another one.
    """
    if found != recorded:
        raise FormatError(
            f"The tensors of {path} are not those that were written: their digest is another one.",
            hint="The file is damaged, or was edited. Copy or download it again, or make it again.",
        )
