"""Evaluate a checkpoint on a data set, and compare two checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fixify._watch import unheard
from fixify.checkpoints.open import OpenModel, open_model
from fixify.data import (
    DataOptions,
    ImageLoader,
    Matched,
    OpenedData,
    UnreadableImages,
    default_workers,
    make_loader,
    match_classes,
    name_the_first,
    open_data,
    override,
)
from fixify.errors import DataError, UsageError, resources_explained
from fixify.metrics import Agreement, Metrics, check_input_size, resolve_device
from fixify.metrics import compare as compare_models
from fixify.metrics import evaluate as evaluate_model
from fixify.models.architectures import Preprocessing

_SPLITS = ("train", "val", "test")
_PRECISIONS = ("none", "bf16", "fp16")
_CLASS_ORDERS = (None, "natural", "lexical")


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        data: Name of the data.
        split: The split that was read.
        description: The data in words: how many images, of how many classes, how labels were matched.
        name: Name of the checkpoint.
        metrics: What the checkpoint gets right.
        against_name, against_metrics: The other checkpoint; None without one.
        agreement: How often both name the same class; None without another checkpoint. Its "first" model is the other
            checkpoint.
        unreadable: A message for each image that could not be read and was left out.
    """

    data: str
    split: str
    description: str
    name: str
    metrics: Metrics
    against_name: str | None = None
    against_metrics: Metrics | None = None
    agreement: Agreement | None = None
    unreadable: tuple[str, ...] = ()

    @property
    def models(self) -> list[tuple[str, Metrics]]:
        """Name and metrics of each checkpoint, the evaluated one first."""
        found = [(self.name, self.metrics)]
        if self.against_name is not None and self.against_metrics is not None:
            found.append((self.against_name, self.against_metrics))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify eval --json` prints."""
        models = [{"name": name, **metrics.to_dict()} for name, metrics in self.models]
        agreement = {} if self.agreement is None else {"agreement": vars(self.agreement)}
        left_out = {"unreadable": list(self.unreadable)} if self.unreadable else {}
        return {"data": self.data, "split": self.split, "models": models, **agreement, **left_out}


@dataclass(frozen=True)
class Prepared:
    """A checkpoint on the device, and the data with its labels."""

    model: OpenModel
    matched: Matched
    preprocessing: Preprocessing


def evaluate(
    checkpoint: str | Path | OpenModel,
    data: str | Path,
    *,
    against: str | Path | OpenModel | None = None,
    split: str = "val",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    amp: str = "none",
    img_size: int | None = None,
    crop_pct: float | None = None,
    download: bool = False,
    class_map: str | Path | None = None,
    class_order: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    max_unreadable: float = 0.01,
    arch: str | None = None,
    ema: bool = False,
    on_start: Callable[[OpenedData], object] | None = None,
    on_images: Callable[[int], object] | None = None,
    on_warning: Callable[[str], object] | None = None,
) -> Evaluation:
    """Measure top-1, top-5, loss and calibration error of a checkpoint, and how often another one agrees.

    Labels are matched by class name if the checkpoint has names: it may be evaluated on some of its classes only.

    Args:
        checkpoint: A slim or ordinary checkpoint, a model name, or one that is open already.
        data: A folder with train/ and val/, or a data name; see `fixify.data.open_data`.
        against: Another checkpoint to compare with.
        split: "train", "val" or "test".
        batch_size: Images per step.
        workers: Loader processes; None fits the machine.
        device: Where the models run; None takes the first accelerator, else the CPU.
        amp: Autocast precision: "none", "bf16" or "fp16".
        img_size: Side of the images; None takes the checkpoint's.
        crop_pct: Share kept by the center crop; None takes the checkpoint's.
        download: Whether `torch/...` data may be downloaded.
        class_map: File with the label of each class; like the next three see `fixify.data.DataOptions`.
        class_order: "natural" or "lexical".
        input_key: Image column or file extensions.
        target_key: Label column or field.
        max_unreadable: Share of the images that may be unreadable; they are left out.
        arch: The architecture, if the file does not show it.
        ema: Take the averaged weights of a training checkpoint.
        on_start: Called with the data before the first image is evaluated.
        on_images: Called after each batch with the number of images so far.
        on_warning: Called with what is wrong or unusual about images; the first of each kind are named.

    Raises:
        UsageError: an option is out of its range, or the model does not take images of that size.
        DataError: the data is missing or not the checkpoint's, too many images are unreadable, or the two checkpoints
            order their classes differently.
        ResourceError, LoaderError: memory or file handles ran out, or a loader process ended.
        SourceError, ArchitectureError, FormatError: a checkpoint cannot be opened.
    """
    if amp not in _PRECISIONS:
        raise UsageError(f"amp must be one of {', '.join(_PRECISIONS)}, not {amp!r}.")
    where = resolve_device(device)
    reading = (class_order, class_map, input_key, target_key)
    opened = open_labelled(data, split, *reading, download=download)

    def prepare(source: str | Path | OpenModel) -> Prepared:
        model = source if isinstance(source, OpenModel) else open_model(source, arch=arch, ema=ema)
        return prepare_model(model, opened, where, img_size, crop_pct)

    warn = on_warning if on_warning is not None else unheard
    unreadable = UnreadableImages(len(opened), max_unreadable, name_the_first(warn), warn)
    loaders = contextlib.ExitStack()

    def loader(prepared: Prepared) -> ImageLoader:
        made = make_loader(
            first.matched.data,
            prepared.preprocessing,
            training=False,
            batch_size=batch_size,
            workers=default_workers(where) if workers is None else workers,
            device=where,
            unreadable=unreadable,
        )
        return loaders.enter_context(made)

    first = prepare(checkpoint)
    other = None if against is None else prepare(against)
    if other is not None:
        refuse_other_order(first, other)
    about = (opened.name, split, first.matched.data.description, first.model.name)
    if on_start is not None:
        on_start(first.matched.data)
    with loaders, resources_explained("evaluate"):
        if other is None:
            metrics = evaluate_model(first.model.model, loader(first), device=where, amp=amp, on_batch=on_images)  # type: ignore[arg-type]
            found = Evaluation(*about, metrics)
        else:
            compared = compare_models(
                other.model.model,
                first.model.model,
                loader(other),
                None if other.preprocessing == first.preprocessing else loader(first),
                device=where,
                amp=amp,  # type: ignore[arg-type]
                on_batch=on_images,
            )
            found = Evaluation(*about, compared.second, other.model.name, compared.first, compared.agreement)
    if (summary := unreadable.summary()) is not None:
        warn(summary)
    return replace(found, unreadable=tuple(unreadable.messages))


def open_labelled(
    data: str | Path,
    split: str,
    class_order: str | None = None,
    class_map: str | Path | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    *,
    download: bool = False,
) -> OpenedData:
    """Open the data that models are measured on; see `evaluate` for the arguments.

    Raises:
        UsageError: the split or the class order is none.
        DataError: see `fixify.data.open_data`.
    """
    for name, value, allowed in (("split", split, _SPLITS), ("class_order", class_order, _CLASS_ORDERS)):
        if value not in allowed:
            choices = ", ".join(each for each in allowed if each is not None)
            raise UsageError(f"{name} must be one of {choices}, not {value!r}.")
    reading = DataOptions(class_order, class_map, input_key, target_key)  # type: ignore[arg-type]
    return open_data(str(data), split=split, download=download, options=reading)  # type: ignore[arg-type]


def prepare_model(
    model: OpenModel, opened: OpenedData, device: torch.device, img_size: int | None, crop_pct: float | None
) -> Prepared:
    """Give data the labels of a checkpoint, and put the model on the device.

    Raises:
        DataError: the classes of the data are not those of the checkpoint.
        UsageError: the model does not take images of that size.
    """
    training = (model.slim.training if model.slim is not None else None) or {}
    matched = match_classes(opened, model.num_classes, training.get("class_names"), model.labels, subset=True)
    preprocessing = override(model.preprocessing, img_size=img_size, crop_pct=crop_pct)
    if img_size is not None:
        check_input_size(model.model, preprocessing["input_size"])
    model.model.to(device)
    return Prepared(model, matched, preprocessing)


def refuse_other_order(first: Prepared, other: Prepared) -> None:
    """Raise a DataError if two checkpoints order their classes differently."""
    if other.matched.label_of != first.matched.label_of:
        names = [prepared.matched.data.class_names[:3] for prepared in (first, other)]
        raise DataError(
            f"{first.model.name} and {other.model.name} order their classes differently, so their answers cannot be "
            f"compared: {names[0]} ... and {names[1]} ...",
            hint="Evaluate them one by one; each gets its own labels.",
        )
