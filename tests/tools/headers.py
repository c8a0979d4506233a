"""Write safetensors files that have a header and no values: they are sparse, however large the network is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from fixify.checkpoints.outline import STORED, Outline
from fixify.models import build, parse_architecture

_CODES = {name: code for code, name in STORED.items()}


def outlines_of(ref: str, num_classes: int | None = None, dtype: torch.dtype | None = None) -> dict[str, Outline]:
    """Return the tensors of an architecture without values; floating-point ones in another type."""
    state = build(parse_architecture(ref), num_classes=num_classes, meta=True).state_dict()
    return {
        key: Outline.of(value.to(dtype) if dtype and value.is_floating_point() else value)
        for key, value in state.items()
    }


def write_header(path: Path, tensors: Mapping[str, Outline], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a file with these tensors, whose values are zeros that take no space."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        entries[key] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
