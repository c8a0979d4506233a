"""Run a slim checkpoint on a few images per class, and record what its heads are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixify.checkpoints.header import SlimInfo
from fixify.data import UnreadableImages, draw_images, make_loader, name_the_first
from fixify.errors import DataError, resources_explained
from fixify.features import record_inputs, samples_of
from fixify.metrics import eval_mode, resolve_device

_PER_CLASS = 256
_BATCH = 32
_MAX_UNREADABLE = 0.01


@dataclass(frozen=True)
class ClassFeatures:
    """The inputs of the heads of a model, by class.

    Attributes:
        labels: The classes.
        features: By the path of a head, then by class: float32 [samples, N] on the CPU; no samples where a head does
            not run.
        notes: What is wrong or unusual about the images.
    """

    labels: tuple[str, ...]
    features: dict[str, dict[str, Tensor]]
    notes: tuple[str, ...]


def observe(
    model: nn.Module, info: SlimInfo, folder: Path, labels: Sequence[str], device: str | None = None
) -> ClassFeatures:
    """Run a model on up to 256 images of each class.

    Args:
        model: The model.
        info: What its slim checkpoint says about it.
        folder: A folder with a folder of images per class.
        labels: The classes, whose folders are called like them.
        device: Where the model runs; None: the first accelerator, else the CPU.

    Raises:
        DataError: A class has no folder or no images, or more than 1 % of them cannot be read.
        ResourceError: Memory ran out.
    """
    missing = [label for label in labels if not (folder / label).is_dir()]
    if missing:
        raise DataError(
            f"{folder} has no folder {missing[0]!r}.",
            hint="Put the images of each new class into a folder called like it.",
        )
    notes: list[str] = []
    where = resolve_device(device)
    dims = {record.path: record.channel_dim for record in info.heads}
    features: dict[str, dict[str, Tensor]] = {path: {} for path in dims}
    widths = {record.path: record.spec.num_features for record in info.heads}
    model = model.to(where)
    for label in labels:
        drawn = draw_images(str(folder / label), count=_PER_CLASS)
        unreadable = UnreadableImages(
            len(drawn), _MAX_UNREADABLE, name_the_first(notes.append), notes.append, option=None
        )
        settings: Any = info.data_config
        loader = make_loader(
            drawn, settings, training=False, batch_size=_BATCH, workers=0, device=where, unreadable=unreadable
        )
        with (
            record_inputs(model, dims, lambda path, x: samples_of(x, dims[path])) as seen,
            loader,
            eval_mode(model),
            torch.no_grad(),
            resources_explained("run the images"),
        ):
            for images, _ in loader:
                model(images.to(where))
        for path, parts in seen.items():
            features[path][label] = torch.cat(parts) if parts else torch.empty(0, widths[path])
    return ClassFeatures(tuple(labels), features, tuple(notes))
