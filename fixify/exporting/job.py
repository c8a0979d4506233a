"""A checkpoint that is being exported, and the result: what all formats share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify.checkpoints.header import FORMAT_VERSION, SLIM_KEY, VERSION_KEY, SlimInfo, info_as_text
from fixify.checkpoints.onnx_file import ONNX_KEY, OnnxInfo
from fixify.checkpoints.open import OpenModel
from fixify.checkpoints.slim import DTYPES
from fixify.exporting.check import Agreement
from fixify.exporting.options import ExportOptions
from fixify.exporting.parts import HeadParts

HALF = (torch.float16, torch.bfloat16)
LEAST_RUNTIME = "1.32"
"""Version of ONNX Runtime with which the fast head was measured; older ones may compute it slowly or refuse it."""


@dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
        paths: The files that were written, or the folder; what a person opens first.
        num_bytes: Their size together.
        head_bytes: Size of the head's constants.
        checks: How the result agrees with PyTorch.
        notes: What a person should know of it.
    """

    paths: tuple[Path, ...]
    num_bytes: int
    head_bytes: int
    checks: tuple[Agreement, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify export --json` prints."""
        return {
            "paths": [str(path) for path in self.paths],
            "bytes": self.num_bytes,
            "head_bytes": self.head_bytes,
            "checks": [check.to_dict() for check in self.checks],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Job:
    """A checkpoint that is being exported.

    Attributes:
        opened: The checkpoint.
        info: Its header.
        heads: Its heads by path, as small constants.
        options: How to export it.
    """

    opened: OpenModel
    info: SlimInfo
    heads: Mapping[str, HeadParts]
    options: ExportOptions

    @property
    def model(self) -> nn.Module:
        """The model in PyTorch."""
        return self.opened.model

    @property
    def head_bytes(self) -> int:
        """Size of the constants of all heads."""
        return sum(array.nbytes for parts in self.heads.values() for _, array in parts.arrays())

    @property
    def notes(self) -> list[str]:
        """What a person should know of the heads."""
        return [
            f"{path}: {self.info.heads[index].spec.kind} codes are real numbers, so the file holds all "
            f"{parts.num_classes} x {parts.num_features} of them; hadamard and binary heads stay small."
            for index, (path, parts) in enumerate(self.heads.items())
            if not parts.is_small
        ]


def stored_dtype(job: Job) -> torch.dtype:
    """Return the type in which weights are stored: the wanted one, or the checkpoint's."""
    dtype = DTYPES[job.options.dtype or job.info.dtype]
    return dtype if dtype in HALF else torch.float32


@torch.no_grad()
def metadata_of(info: SlimInfo, about: OnnxInfo) -> dict[str, str]:
    """Write the metadata of an ONNX file."""
    text = json.dumps(about.model_dump(), allow_nan=False, separators=(",", ":"), sort_keys=True)
    return {VERSION_KEY: FORMAT_VERSION, SLIM_KEY: info_as_text(info), ONNX_KEY: text}
