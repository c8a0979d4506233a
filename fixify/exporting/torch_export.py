"""Write a model as a .pt2 file that `torch.export.load` reads without fixify, with packed codes in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify._files import atomic_path
from fixify.checkpoints.header import FORMAT_VERSION, info_as_text
from fixify.errors import ExportError
from fixify.exporting.check import EXACT, agreement, random_features, recorded
from fixify.exporting.job import Exported, Job, stored_dtype
from fixify.exporting.parts import First, HeadParts, Picked, Signs, Table, Transform
from fixify.heads import unpack_signs
from fixify.heads.normalisation import NORM_EPSILON
from fixify.surgery import replace_module

METADATA = "fixify.json"
"""Name of the extra file in the archive: what `torch.export.load(path, extra_files={METADATA: ""})` fills in."""


class PackedHead(nn.Module):
    """A fixed head made of small constants and torch's own operators; packed signs are unpacked at each call.

    Args:
        parts: The head.
    """

    def __init__(self, parts: HeadParts) -> None:
        super().__init__()
        self.parts = parts
        for name, array in parts.arrays():
            self.register_buffer(name, torch.from_numpy(np.array(_for_torch(array))))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [..., C] of features [..., N], or of feature maps [B, N, ...]."""
        parts = self.parts
        maps = parts.channel_dim == 1
        x = (x.movedim(1, -1) if maps else x).float()
        if parts.mean is not None:
            x = x - self._buffer("mean")
        if parts.std is not None:
            x = x / self._buffer("std")
        if parts.normalize:
            x = F.normalize(x, dim=-1, eps=NORM_EPSILON)
        logits = self._product(parts.product, x) * self._buffer("scale")
        if parts.gains is not None:
            logits = logits * (self._buffer("gains").float() / 255)
        if parts.bias is not None:
            logits = logits + self._buffer("bias")
        return logits.movedim(-1, 1) if maps else logits

    def _buffer(self, name: str) -> Tensor:
        found: Tensor = getattr(self, name)
        return found

    def _signs(self, name: str, count: int) -> Tensor:
        packed = self._buffer(name)
        return unpack_signs(packed if packed.dim() == 2 else packed[None], count, torch.float32)

    def _product(self, product: Picked | Signs | Table | First, x: Tensor) -> Tensor:
        match product:
            case Picked(transform, block_signs, _, negative):
                x = F.pad(x, (0, transform.padding))
                x = x.unsqueeze(-2) * self._signs("block_signs", transform.order) if block_signs is not None else x
                x = self._transformed(transform, x)
                x = (x.flatten(-2) if block_signs is not None else x).index_select(-1, self._buffer("position").long())
                return x * self._signs("negative", x.shape[-1])[0] if negative is not None else x
            case Signs(_, width, rotation):
                planes = product.planes
                if product.directions is not None:
                    x = F.linear(x, self._buffer("directions").float())
                    x = x.index_select(-1, self._buffer("columns").long()) * self._buffer("factors")
                if rotation is not None:
                    x = self._transformed(rotation, x * self._signs("rotation_signs", x.shape[-1])[0])[..., :width]
                if len(planes) > 1:
                    x = F.pad(x, (0, product.plane_width - width))
                    x = (x.unsqueeze(-2) * self._buffer("planes").float()[:, None]).flatten(-2)
                return F.linear(x, self._signs("codes", product.read_width))
            case Table():
                return F.linear(x, self._buffer("codes"))
            case First(count):
                return x[..., :count]

    def _transformed(self, transform: Transform, x: Tensor) -> Tensor:
        a, b = len(transform.left), len(transform.right)
        scores = F.linear(x.unflatten(-1, (a, b)), self._buffer("right").float())
        return torch.matmul(self._buffer("left").float(), scores).flatten(-2)


def _for_torch(array: np.ndarray) -> np.ndarray:
    """Convert to a type that every version of torch can index with and store."""
    return array.astype(np.int32) if array.dtype in (np.uint16, np.uint32) else array


def write_torch_export(job: Job, target: Path, batches: Mapping[str, Iterator[Tensor]], *, force: bool) -> Exported:
    """Write a model as a .pt2 file; see `fixify.exporting.export.export`.

    The program maps images, float32 [batch, channels, height, width], to logits [batch, C]. The archive has an extra
    file, `METADATA`: preprocessing, labels and head specs.
    """
    compared = [(name, list(images)) for name, images in batches.items()]
    model = job.model
    expected = _answers(model, compared)
    for path, parts in job.heads.items():
        replace_module(model, path, PackedHead(parts).eval())
    sizes = [int(size) for size in job.info.data_config["input_size"]]
    return _write(job, target, model, torch.zeros(2, *sizes), compared, expected, force=force)


def write_bare_torch_export(job: Job, target: Path, *, force: bool) -> Exported:
    """Write a classifier without a network; the program maps features, float32 [batch, N], to logits [batch, C]."""
    ((path, parts),) = job.heads.items()
    compared = [("random features", list(random_features(parts.num_features)))]
    expected = _answers(job.model.get_submodule(path), compared)
    example = torch.zeros(2, parts.num_features)
    return _write(job, target, PackedHead(parts).eval(), example, compared, expected, force=force)


_Batches = list[tuple[str, list[Tensor]]]


def _answers(model: Any, compared: _Batches) -> list[list[Tensor]]:
    with torch.inference_mode():
        return [[model(batch).float() for batch in batches] for _, batches in compared]


def _write(
    job: Job,
    target: Path,
    model: nn.Module,
    example: Tensor,
    compared: _Batches,
    expected: list[list[Tensor]],
    *,
    force: bool,
) -> Exported:
    """Trace a model whose heads are packed, write it, and compare what can be loaded with these answers."""
    program = _exported(model, example)
    about = json.dumps({"version": FORMAT_VERSION, "fixify": json.loads(info_as_text(job.info))}, sort_keys=True)
    notes = job.notes
    if stored_dtype(job) != torch.float32:
        notes.append("A .pt2 file stores weights as they are computed, in float32.")
    with atomic_path(target, force=force) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files={METADATA: about})
        with open(temporary, "rb") as file:
            loaded = torch.export.load(file).module()
        checks = []
        for (name, batches), answers in zip(compared, expected, strict=True):
            checks.append(agreement(name, batches, recorded(answers), _run(loaded), allowed=EXACT))
        num_bytes = temporary.stat().st_size
    return Exported((target,), num_bytes, job.head_bytes, tuple(checks), tuple(notes))


def _exported(model: nn.Module, example: Tensor) -> Any:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    try:
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    # torch.export does not specify what it raises for a model that it cannot trace; all of these occur.
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(
            f"torch.export cannot trace this model: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
        ) from error


def _run(loaded: Any) -> Any:
    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return loaded(batch).float()

    return run
