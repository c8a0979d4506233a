"""Write the head alone: an ONNX file that maps features to logits, and its constants for NumPy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixify._files import refuse_existing, write_atomic
from fixify.checkpoints.header import FORMAT_VERSION, info_as_text
from fixify.checkpoints.onnx_file import OnnxInfo, new_session
from fixify.errors import UsageError
from fixify.exporting.check import EIGHT_BIT, EXACT, Agreement, agreement, random_features
from fixify.exporting.job import LEAST_RUNTIME, Exported, Job, metadata_of
from fixify.exporting.onnx_models import add_metadata, head_model
from fixify.exporting.options import OPSET
from fixify.exporting.parts import HeadParts, Picked, Signs, Table

_MAP = 3  # height and width of random feature maps


def write_head(job: Job, target: Path, *, force: bool) -> Exported:
    """Write the head of a checkpoint as NAME.onnx and NAME.npz; see `fixify.exporting.export.export`.

    The ONNX file is that of `fixify.exporting.onnx_models.head_model`, and the arrays of the other are listed in
    `head_arrays`.

    Raises:
        UsageError: The target has the suffix of the constants.
    """
    portable = job.options.portable
    constants = target.with_suffix(".npz")
    if constants == target:
        raise UsageError(f"{target} is the name of the constants; -o names the ONNX file beside them.")
    refuse_existing(constants, force=force)
    made = head_model(job.heads, opset=job.options.opset or OPSET, portable=portable)
    session = new_session(made.SerializeToString())
    rounded = any(parts.rounds_features(portable=portable) for parts in job.heads.values())
    checks = []
    for index, (path, parts) in enumerate(job.heads.items()):
        name = "random features" if len(job.heads) == 1 else f"random features of {path}"
        module = job.model.get_submodule(path)
        allowed = EIGHT_BIT if rounded else EXACT
        checks.append(_compare(name, session, index, parts, module, allowed=allowed, job=job))
    about = OnnxInfo(
        part="head",
        portable=portable,
        onnxruntime=LEAST_RUNTIME if rounded else None,
        check=[check.to_dict() for check in checks],
    )
    add_metadata(made, metadata_of(job.info, about))
    data, arrays = made.SerializeToString(), _npz(job)
    write_atomic(target, data)
    write_atomic(constants, arrays)
    return Exported((target, constants), len(data) + len(arrays), job.head_bytes, tuple(checks), tuple(job.notes))


def head_arrays(parts: HeadParts) -> dict[str, np.ndarray]:
    """List the constants of a head.

    Features x [N] become logits [C] in this order; what is absent is skipped:

    - `x = (x - mean) / std`, then, if `normalize` is 1, x is divided by max(|x|, 1e-6);
    - if there are `rotation_signs` (packed, one bit per feature, 1 is minus): x is multiplied by them, then by the
      matrix kron(left, right), and cut to the first `width` numbers;
    - with `directions`: x is multiplied by them; number i of the new x is number `columns[i]` of the result, times
      `factors[i]`;
    - with `planes`: x is padded with zeros to a multiple of 8, and repeated, times each of `planes`;
    - with `codes` of type uint8 (packed signs, one row per class): the product of the signs with x; of type float32:
      `codes @ x`; with `first`: the first C numbers of x;
    - with `position`: x is padded with `padding` zeros, each row of `block_signs` (packed; all plus if absent) gives
      kron(left, right) @ (signs * x), and class c reads number position[c] of these one after another, negated where
      bit c of `negative` (packed) is 1;
    - the result is multiplied by `scale`, by `gains` / 255, and `bias` is added.
    """
    arrays: dict[str, Any] = dict(parts.arrays())
    arrays["normalize"] = np.uint8(parts.normalize)
    match parts.product:
        case Picked(transform):
            arrays["padding"] = np.int64(transform.padding)
        case Signs(_, width):
            arrays["width"] = np.int64(width)
        case Table():
            pass
        case _:
            arrays["first"] = np.int64(parts.num_classes)
    return arrays


def _npz(job: Job) -> bytes:
    """Pack the constants of all heads; with several heads, names begin with the path and a slash."""
    several = len(job.heads) > 1
    arrays: dict[str, Any] = {
        (f"{path}/{name}" if several else name): array
        for path, parts in job.heads.items()
        for name, array in head_arrays(parts).items()
    }
    about = json.dumps({"version": FORMAT_VERSION, "fixify": json.loads(info_as_text(job.info))}, sort_keys=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(about), **arrays)
    return buffer.getvalue()


def _compare(
    name: str, session: Any, index: int, parts: HeadParts, module: Any, *, allowed: float, job: Job
) -> Agreement:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    several = {
        value.name: torch.zeros(1, other.num_features, *([_MAP, _MAP] if other.channel_dim == 1 else [])).numpy()
        for value, other in zip(inputs, job.heads.values(), strict=True)
    }

    def run(features: Tensor) -> Tensor:
        (made,) = session.run([outputs[index].name], {**several, inputs[index].name: features.numpy()})
        return _rows(torch.from_numpy(made), parts)

    def reference(features: Tensor) -> Tensor:
        with torch.inference_mode():
            return _rows(module(features), parts)

    return agreement(
        name, random_features(parts.num_features, maps=parts.channel_dim == 1), reference, run, allowed=allowed
    )


def _rows(logits: Tensor, parts: HeadParts) -> Tensor:
    return (logits.movedim(1, -1) if parts.channel_dim == 1 else logits).reshape(-1, parts.num_classes)
