"""Convert a classifier that comes without a network: text embeddings of class names, or another framework's last layer.

The file becomes a slim head alone (`convert_bare`), or its matrix is put onto an encoder (`fixify.conversion`).
"""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixify._values import counted
from fixify._watch import OnProgress, unwatched
from fixify.checkpoints.beside import class_lists_beside, fitting_lists
from fixify.checkpoints.encoder import Encoder
from fixify.checkpoints.matrix import Matrix, MatrixOptions, class_mean, read_matrix, unit_sides
from fixify.checkpoints.slim import SlimInfo, bare_tensors, describe_bare, is_slim
from fixify.conversion_options import ConvertOptions
from fixify.description import BARE_PATH
from fixify.errors import FormatError, SourceError, UsageError
from fixify.models.classifiers import ClassifierSite
from fixify.savings import Savings
from fixify.surgery import heads_of_class_vectors, require_fitted_codes

_OF_A_NETWORK = {
    "arch": "names one",
    "num_classes": "is the size of a new label set",
    "dtype": "is the type of its weights",
    "ema": "chooses among its weights",
    "calibrate": "runs it on images",
}


@dataclass(frozen=True)
class BareHead:
    """A slim head alone, ready to be written.

    Attributes:
        info: What its header says.
        tensors: Its tensors, under the names in the file.
        savings: Parameters and bytes, before and after.
        notes: Decisions that a person should know of.
    """

    info: SlimInfo
    tensors: dict[str, Tensor]
    savings: Savings
    notes: tuple[str, ...]


def convert_bare(source: Path, options: ConvertOptions, on_progress: OnProgress = unwatched) -> BareHead:
    """Make a fixed head of a classifier that comes without a network.

    Args:
        source: A .npy, .npz or .safetensors file.
        options: How to convert it; those that need a network are refused.
        on_progress: See `fixify.heads.replacement`.

    Raises:
        SourceError: See `fixify.checkpoints.matrix.read_matrix`.
        HeadSpecError: There is no such codebook.
        UsageError: An option needs a network, or the head would keep nothing of the class vectors.
    """
    for name, reason in _OF_A_NETWORK.items():
        if getattr(options, name) not in (None, False):
            raise UsageError(
                f"{source} is a classifier without a network, and --{name.replace('_', '-')} {reason}.",
                hint=f"Leave it out, or put the classifier onto a network: fixify convert MODEL --classifier {source}",
            )
    matrix, options = read_bare(source, options)
    require_fitted_codes(options, "nothing of a classifier without a network would be kept")
    bias = {} if matrix.bias is None else {f"{BARE_PATH}.bias": matrix.bias}
    tensors = {f"{BARE_PATH}.weight": matrix.weight, **bias}
    c, n = matrix.weight.shape
    site = ClassifierSite(BARE_PATH, "Linear", n, c, -1, c * n + (c if bias else 0), bool(bias))
    (head,) = heads_of_class_vectors((site,), tensors, options, on_progress=on_progress)
    savings = Savings.of_bare(head.module, has_bias=bool(bias), stored_bytes=matrix.stored_bytes)
    record = matrix.record()
    info = describe_bare(
        head.module,
        savings,
        labels=matrix.labels,
        source={**{key: record[key] for key in ("name", "sha256", "bytes")}, **classifier_record(matrix, options)},
    )
    return BareHead(info, bare_tensors(head.module), savings, (*matrix.notes, *head.notes))


def read_bare(path: Path, options: ConvertOptions, encoder: Encoder | None = None) -> tuple[Matrix, ConvertOptions]:
    """Read a classifier without a network, and choose the head that keeps most of it unless the caller did."""
    if encoder is not None and is_slim(path):
        raise SourceError(
            f"{path} is a slim checkpoint, and a classifier is put onto a network as a matrix.",
            hint="Give the file that it was made from.",
        )
    wanted = MatrixOptions(
        keys=options.key,
        rows=options.rows,
        labels=options.labels,
        widths=() if encoder is None else encoder.widths,
        widths_in_words="" if encoder is None else encoder.widths_in_words,
        logit_scale=options.logit_scale,
    )
    matrix = read_matrix(path, wanted)
    notes = list(matrix.notes)
    if options.logit_scale is None and unit_sides(matrix.weight)[0]:
        notes.append(
            f"{path.name}: all class vectors have length 1, as text embeddings have. If logits are cosines times a "
            "scale: --logit-scale 100"
        )
    beside = [] if matrix.labels is not None else fitting_lists(class_lists_beside(path), matrix.num_classes)
    if beside:
        notes.append(
            f"{beside[0].name} beside {path.name} has {counted(matrix.num_classes, 'class name')} and is not read. "
            f"If these are its classes: --labels {shlex.quote(str(beside[0]))}"
        )
    if matrix.bias is None:
        options = options.replace(bias=False)
    if options.head == "auto":
        options = options.replace(head="binary")
        notes.append("Binary head: it keeps the class vectors best without training.")
    return replace(matrix, notes=tuple(notes)), options


def refuse_bare_options(source: str | Path, options: ConvertOptions) -> None:
    """Refuse the options of a classifier without a network where there is none."""
    given = [name for name in ("key", "rows", "logit_scale") if getattr(options, name)]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{flag} is for a classifier without a network, and {source} is read as a network.",
            hint=f"Drop {flag}, or name the classifier: --classifier FILE",
        )


def classifier_record(matrix: Matrix | None, options: ConvertOptions) -> dict[str, Any]:
    """Say which classifier without a network was taken, and how, for the header.

    The mean over classes, which codes do not show, is kept, so that classes can be added later by their vectors.
    """
    if matrix is None:
        return {}
    scale = options.logit_scale
    mean = class_mean(matrix.weight, directions=scale is not None)
    text = base64.b64encode(mean.numpy().astype("<f4").tobytes()).decode()
    return {"classifier": {**matrix.record(), "logit_scale": scale, "class_mean": text}}


@dataclass(frozen=True)
class ClassVectors:
    """How the class vectors of a slim checkpoint were made, so that others can be compared with them.

    Attributes:
        logit_scale: See `fixify.checkpoints.matrix.MatrixOptions`.
        mean: Their mean over classes, or that of their directions, float32 [N].
    """

    logit_scale: float | None
    mean: Tensor

    @classmethod
    def recorded(cls, info: SlimInfo, num_features: int) -> ClassVectors | None:
        """Read what `classifier_record` wrote; None if the checkpoint was not made from class vectors.

        Raises:
            FormatError: The record is damaged.
        """
        known = info.source.get("classifier")
        if known is None:
            return None
        try:
            scale, text = known["logit_scale"], known["class_mean"]
            mean = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
            if mean.shape != (num_features,) or not np.isfinite(mean).all():
                raise ValueError(f"class_mean does not have {num_features} numbers")
            if scale is not None and not (type(scale) in (int, float) and 0 < scale < float("inf")):
                raise ValueError("logit_scale is not a positive number")
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"What the header says of the class vectors is damaged: {error}.") from error
        return cls(scale, torch.from_numpy(mean.astype(np.float32)))
