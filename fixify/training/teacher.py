"""Models beside the one that is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fixify._files import sha256_of
from fixify.checkpoints.open import OpenModel, open_model
from fixify.data import ImageLoader, ImageSource, OpenedData, check_classes, override
from fixify.data.preprocessing import channels_of, normalization
from fixify.errors import DataError, UsageError
from fixify.metrics import Precision, autocast, check_input_size, eval_mode
from fixify.training import distributed
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
        FixifyError: it cannot be opened (see `fixify.checkpoints.open.open_model`).
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


# Learning from the original: its logits on the training images, beside the labels or instead of them.


class Teacher:
    """A frozen model that sees the very images that another is trained on.

    Args:
        other: The model; moved to `device`, and its parameters are frozen.
        preprocessing: Of the model that is trained. Where the two differ in mean, deviation or size, the images are
            normalised anew and resized for the teacher.
        device: Where the images are.
        amp: Autocast precision of the forward pass.
        channels_last: Memory format.

    Both take images of the same number of channels; `check_others` has made sure.
    """

    def __init__(
        self,
        other: OtherModel,
        preprocessing: Mapping[str, Any],
        *,
        device: torch.device,
        amp: Precision = "none",
        channels_last: bool = False,
    ) -> None:
        self.model = other.model.to(device).eval().requires_grad_(False)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.device, self.amp = device, amp
        self.size = tuple(other.preprocessing["input_size"][1:])
        (mean, std), (own_mean, own_std) = normalization(preprocessing), normalization(other.preprocessing)
        self.same = (mean, std) == (own_mean, own_std)
        m, s, own_m, own_s = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std, own_mean, own_std)
        )
        self.factor, self.offset = s / own_s, (m - own_m) / own_s

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, C], of preprocessed (and augmented) images [B, channels, height, width]."""
        if not self.same:
            images = images * self.factor + self.offset
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        with autocast(self.device, self.amp):
            logits: Tensor = self.model(images)
        return logits.float()


class _Answered:
    """Images whose labels are a model's answers."""

    def __init__(self, images: ImageSource, answers: list[int]) -> None:
        self.images = images
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.images.load(index)[0], self.answers[index]

    def listing(self) -> Iterable[bytes]:
        return self.images.listing()


def answered(
    data: OpenedData,
    other: OtherModel,
    loader: ImageLoader,
    *,
    device: torch.device,
    amp: Precision = "none",
    on_batch: Callable[[int], object],
    on_end: Callable[[], object],
) -> OpenedData:
    """The data with the most probable class that a model gives each image as its label: top-1 is agreement with it.

    Args:
        data: Images without labels.
        other: The model; moved to `device`.
        loader: All of the images in order, or this process's share of them, preprocessed for the model.
        device: Where to run it.
        amp: Autocast precision.
        on_batch: Called after each batch with the number of images so far.
        on_end: Called after the last one.
    """
    model, answers = other.model.to(device), list[int]()
    with eval_mode(model), torch.no_grad():
        for images, _ in loader:
            with autocast(device, amp):
                answers += model(images.to(device)).argmax(dim=-1).tolist()
            on_batch(len(answers))
    on_end()
    return replace(data, images=_Answered(data.images, distributed.interleaved(answers)), labelled=True)
