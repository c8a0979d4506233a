"""Classify image files with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fixify.checkpoints import read_labels
from fixify.checkpoints.open import OpenModel, open_model
from fixify.data.dataset import OpenedData
from fixify.data.folder import FolderImages
from fixify.data.loader import make_loader
from fixify.errors import UsageError


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: The image's path as it was given.
        classes: Class numbers, most probable first.
        labels: Their names; the numbers as text if the checkpoint has no names.
        probabilities: Softmax of the logits, 0 to 1.
    """

    image: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def predict(
    checkpoint: str | Path | OpenModel,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    labels: str | Path | None = None,
    arch: str | None = None,
    ema: bool = False,
    batch_size: int = 16,
    device: str = "cpu",
    on_image: Callable[[Prediction], object] | None = None,
) -> list[Prediction]:
    """Classify image files, preprocessed as the checkpoint says.

    Args:
        checkpoint: A slim or ordinary checkpoint, a model name, or one that is open already.
        images: Image files.
        top: How many classes per image; all, if there are fewer.
        labels: A file of class names, or "imagenet"; None takes those of the checkpoint.
        arch: The architecture, if the file does not show it.
        ema: Take the averaged weights of a training checkpoint.
        batch_size: Images per step.
        device: Where the model runs.
        on_image: Called with each prediction.

    Returns:
        One prediction per image, in the given order.

    Raises:
        UsageError: there are no images, or `top` is less than 1.
        DataError: a file is not an image; the message names it.
        SourceError, ArchitectureError, FormatError: the checkpoint cannot be opened.
    """
    if not images or top < 1:
        raise UsageError(f"Expected at least one image and top >= 1, got {len(images)} images and top {top}.")
    opened = checkpoint if isinstance(checkpoint, OpenModel) else open_model(checkpoint, arch=arch, ema=ema)
    if labels is not None:
        opened = replace(opened, labels=read_labels(labels, opened.num_classes))
    names = [str(image) for image in images]
    data = OpenedData(
        images=FolderImages(Path(), names, [0] * len(names)),
        class_names=tuple(opened.labels or map(str, range(opened.num_classes))),
        location=".",
        description=f"{len(names)} images",
        name="images",
        split="val",
    )
    loader = make_loader(data, opened.preprocessing, training=False, batch_size=batch_size)
    model = opened.model.to(device)
    found: list[Prediction] = []
    with torch.inference_mode():
        for batch, _ in loader:
            probabilities = model(batch.to(device)).float().softmax(dim=-1)
            best = probabilities.topk(min(top, opened.num_classes), dim=-1)
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                named = tuple(data.class_names[index] for index in indices)
                found.append(Prediction(names[len(found)], tuple(indices), named, tuple(values)))
                if on_image is not None:
                    on_image(found[-1])
    return found
