"""Models beside the one that is trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._io import sha256_of
from fixify.data import OpenedData, check_classes, override
from fixify.evaluation import check_input_size
from fixify.opening import OpenModel, open_model
from fixify.training.options import FinetuneOptions


@dataclass(frozen=True)
class OtherModel:
    """A trained classifier of the same classes: the original whose accuracy is the goal.

    Attributes:
        name: The file's or the model's name, without folders.
        sha256: Of the file; of the weights where there is no single file. 64 hexadecimal digits.
        model: Images to logits, in eval mode.
        preprocessing: timm's data configuration of this model.
    """

    name: str
    sha256: str
    model: nn.Module
    preprocessing: dict[str, Any]

    def identity(self) -> dict[str, str]:
        """What a run records about it."""
        return {"name": self.name, "sha256": self.sha256}


def open_original(ref: str | Path, val: OpenedData, options: FinetuneOptions) -> OtherModel:
    """Open a checkpoint or a model by its name, to be evaluated on the validation data.

    Raises:
        FixifyError: it cannot be opened (see `fixify.opening.open_model`).
        DataError: its classes are not the data's.
        UsageError: it does not take images of `options.img_size`.
    """
    opened = open_model(ref)
    training = (opened.slim.training if opened.slim is not None else None) or {}
    check_classes(val, opened.num_classes, training.get("class_names") or opened.labels)
    preprocessing = override(opened.preprocessing, img_size=options.img_size, crop_pct=options.crop_pct)
    if options.img_size is not None:
        check_input_size(opened.model, preprocessing["input_size"])
    return OtherModel(opened.name, digest(ref, opened), opened.model, preprocessing)


def digest(ref: str | Path, opened: OpenModel) -> str:
    """SHA-256 of the file that `ref` is; of the names and values of the weights if it is a folder or a model name."""
    path = Path(ref).expanduser()
    if path.is_file():
        return sha256_of(path)
    found = hashlib.sha256()
    for name, tensor in opened.model.state_dict().items():
        found.update(name.encode() + b"\0")
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
