"""What a model sees in some images: labels and probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fixify.checkpoints.open import OpenModel
from fixify.data.dataset import OpenedData
from fixify.data.folder import FolderImages
from fixify.data.loader import make_loader
from fixify.errors import UsageError


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: As it was given.
        classes: Class numbers, most probable first.
        labels: Their names; the numbers as text where the checkpoint has no names.
        probabilities: Softmax of the logits, 0 to 1.
    """

    image: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    opened: OpenModel, images: Sequence[str], *, top: int = 5, batch_size: int = 16, device: str = "cpu"
) -> Iterator[Prediction]:
    """Classify image files, preprocessed as the checkpoint says.

    Args:
        opened: The model.
        images: Image files.
        top: How many classes of each; all, if there are fewer.
        batch_size: Images at a time.
        device: Where the model runs.

    Raises:
        UsageError: no images, or fewer than one class asked for.
        DataError: a file is not an image; the message names it.
    """
    if not images or top < 1:
        raise UsageError(f"Expected at least one image and one class, got {len(images)} and {top}.")
    data = OpenedData(
        images=FolderImages(Path(), images, [0] * len(images)),
        class_names=tuple(opened.labels or map(str, range(opened.num_classes))),
        location=".",
        description=f"{len(images)} images",
        name="images",
        split="val",
    )
    loader = make_loader(data, opened.preprocessing, training=False, batch_size=batch_size)
    model = opened.model.to(device)
    names = iter(images)
    with torch.inference_mode():
        for batch, _ in loader:
            probabilities = model(batch.to(device)).float().softmax(dim=-1)
            best = probabilities.topk(min(top, opened.num_classes), dim=-1)
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                labels = tuple(data.class_names[index] for index in indices)
                yield Prediction(next(names), tuple(indices), labels, tuple(values))
