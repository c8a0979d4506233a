"""Classify image files with a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixify._values import counted
from fixify.checkpoints import read_labels
from fixify.checkpoints.open import OpenModel, open_model
from fixify.data.dataset import OpenedData
from fixify.data.folder import FolderImages
from fixify.data.loader import UnreadableImages, make_loader, name_the_first
from fixify.errors import UsageError, resources_explained
from fixify.heads import FixedClassifier, TopK

_MANY_CLASSES = 4096
"""Classes from which the largest logits are found without holding all."""


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
    max_unreadable: float = 0.0,
    on_image: Callable[[Prediction], object] | None = None,
    on_warning: Callable[[str], object] | None = None,
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
        max_unreadable: Share of the images that may be unreadable. They are left out; `Prediction.image` says which
            image a prediction is of.
        on_image: Called with each prediction.
        on_warning: Called with what is wrong or unusual about images; the first of each kind are named.

    Returns:
        One prediction per image that can be read, in the given order.

    Raises:
        UsageError: there are no images, or `top` is less than 1.
        DataError: a file cannot be read as an image, or more than allowed; the message names it.
        ResourceError, LoaderError: memory or file handles ran out.
        SourceError, ArchitectureError, FormatError: the checkpoint cannot be opened.
    """
    if not images or top < 1:
        raise UsageError(
            f"Expected at least one image and top >= 1, got {counted(len(images), 'image')} and top {top}."
        )
    opened = checkpoint if isinstance(checkpoint, OpenModel) else open_model(checkpoint, arch=arch, ema=ema)
    if labels is not None:
        opened = replace(opened, labels=read_labels(labels, opened.num_classes))
    names = [str(image) for image in images]
    data = OpenedData(
        images=FolderImages(Path(), names, range(len(names))),  # the label says which image it is
        class_names=tuple(opened.labels or map(str, range(opened.num_classes))),
        location=".",
        description=counted(len(names), "image"),
        name="images",
        split="val",
    )
    unreadable = UnreadableImages(len(names), max_unreadable)
    if on_warning is not None:
        unreadable.on_found, unreadable.on_remark = name_the_first(on_warning), on_warning
    loader = make_loader(data, opened.preprocessing, training=False, batch_size=batch_size, unreadable=unreadable)
    model = opened.model.to(device)
    found: list[Prediction] = []
    with loader, torch.inference_mode(), resources_explained("classify the images"):
        for batch, numbers in loader:
            best = most_probable(model, batch.to(device), min(top, opened.num_classes))
            for number, values, indices in zip(
                numbers.tolist(), best.values.tolist(), best.classes.tolist(), strict=True
            ):
                named = tuple(data.class_names[index] for index in indices)
                found.append(Prediction(names[number], tuple(indices), named, tuple(values)))
                if on_image is not None:
                    on_image(found[-1])
    if on_warning is not None and (summary := unreadable.summary()) is not None:
        on_warning(summary)
    return found


def most_probable(model: nn.Module, images: Tensor, k: int) -> TopK:
    """Find the most probable classes of a batch, without the logits of all classes where the head can do without.

    It can where the model ends in one fixed head: its logits leave the model as they are.

    Args:
        model: A classifier, in evaluation mode.
        images: A batch.
        k: Number of classes per image.

    Returns:
        Softmax probabilities float32 [B, k], largest first, and classes int64 [B, k].
    """
    heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    if len(heads) == 1 and heads[0].out_features >= _MANY_CLASSES:
        features: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            features.append(x)
            return x

        heads[0].forward = keep  # type: ignore[method-assign]
        try:
            output = model(images)
        finally:
            del heads[0].forward
        if len(features) == 1 and _is_view(output, features[0]):
            found = heads[0].top_k(features[0], k, probabilities=True)
            return TopK(found.values.reshape(-1, k).float(), found.classes.reshape(-1, k))
    best = model(images).float().softmax(dim=-1).topk(k, dim=-1)
    return TopK(best.values, best.indices)


def _is_view(output: object, features: Tensor) -> bool:
    """Check that a model's output is what its head returned, one vector per image and at most reshaped."""
    return (
        isinstance(output, Tensor)
        and output.data_ptr() == features.data_ptr()
        and output.ndim == 2
        and output.shape == (features.shape[0], features[0].numel())
        and features.shape[1:].numel() == max(features.shape[1:])
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Shorten paths to their file names, and to more of the path where several files have one name.

    >>> short_names(["data/a/1.png", "data/b/1.png", "data/b/2.png"])
    ['a/1.png', 'b/1.png', '2.png']
    """
    found = {path: Path(path).name for path in paths}
    for depth in range(2, 1 + max((len(Path(path).parts) for path in found), default=0)):
        same: defaultdict[str, list[str]] = defaultdict(list)
        for path, name in found.items():
            same[name].append(path)
        unclear = [path for several in same.values() if len(several) > 1 for path in several]
        if not unclear:
            break
        found.update({path: str(Path(*Path(path).parts[-depth:])) for path in unclear})
    return [found[path] for path in paths]
