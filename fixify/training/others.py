"""Models beside the one that is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._io import sha256_of
from fixify.data import OpenedData, check_classes, override
from fixify.data.preprocessing import channels_of
from fixify.errors import DataError, UsageError
from fixify.evaluation import check_input_size
from fixify.opening import OpenModel, open_model
from fixify.training.options import FinetuneOptions


@dataclass(frozen=True)
class OtherModel:
    """A trained classifier of the same classes: the original whose accuracy is the goal, or the teacher.

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


def check_others(
    options: FinetuneOptions,
    preprocessing: Mapping[str, Any],
    data: Sequence[OpenedData],
    original: OtherModel | None,
    teacher: OtherModel | None,
) -> None:
    """Raise `UsageError` if the options or the data need a model that was not given, or one that does not fit them."""
    if options.original_top1 is not None and original is not None:
        raise UsageError(
            f"The original's top-1 was given ({options.original_top1:g} %) and so was {original.name}, to measure it.",
            hint="Give --against or --original-top1, not both.",
        )
    if options.max_drop is not None and options.original_top1 is None and original is None:
        raise UsageError(
            f"A drop of at most {options.max_drop:g} points needs the original's top-1 on the validation data.",
            hint="Add --against ORIGINAL to have it measured, or --original-top1 97.8 if you know it.",
        )
    if teacher is None and (options.unlabelled or not all(split.labelled for split in data)):
        raise UsageError(
            "Without labels there has to be a teacher to learn from.", hint="Add --distill ORIGINAL, or use labels."
        )
    if not data[0].labelled and not options.unlabelled:
        raise UsageError(
            "The training images have no labels.", hint="Add --unlabelled, to learn from the teacher alone."
        )
    if teacher is not None:
        theirs, ours = channels_of(teacher.preprocessing), channels_of(preprocessing)
        if theirs != ours:
            raise UsageError(
                f"{teacher.name} takes images of {theirs} channels, and the model that is trained images of {ours}.",
                hint="A teacher sees the very images that the model sees; use the checkpoint that was converted.",
            )


def open_other(ref: str | Path, data: OpenedData, options: FinetuneOptions) -> OtherModel:
    """Open a checkpoint or a model by its name, to be used on images of these classes.

    Raises:
        FixifyError: it cannot be opened (see `fixify.opening.open_model`).
        DataError: its classes are not the data's, which have been compared with the checkpoint's.
        UsageError: it does not take images of `options.img_size`.
    """
    opened = open_model(ref)
    training = (opened.slim.training if opened.slim is not None else None) or {}
    if opened.num_classes != data.num_classes:
        raise DataError(
            f"{opened.name} has {opened.num_classes} classes, and the checkpoint that is trained {data.num_classes}.",
            hint="Use the checkpoint that was converted, or another one of the same classes.",
        )
    check_classes(data, opened.num_classes, training.get("class_names"), opened.labels)
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
