"""Measure classifiers: accuracy, loss, calibration, agreement of two models, and which classes are confused.

All metrics are computed from sums over images, never from means of batches. Confusions are counted without a C x C
matrix, so they work for 10 classes and for 10,000.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fixify._values import Count, Measured, Percent, counted
from fixify.errors import DataError, ResourceError, UsageError, resource_problem
from fixify.heads import FixedClassifier
from fixify.many_classes import Ranked, deferring, rank

Precision = Literal["none", "bf16", "fp16"]
Batches = Iterable[tuple[Tensor, Tensor]]

WORST = 20
_MOST_TAKEN_FOR = 3
_BINS = 15
_CONFIDENT = 0.5


@dataclass(frozen=True)
class Metrics:
    """How well a model classifies a data set.

    Attributes:
        top1: Percentage of images whose most probable class is the label.
        top5: Percentage of images whose label is among the 5 most probable classes (100 with 5 classes or fewer).
        loss: Mean cross-entropy in nats.
        ece: Expected calibration error in percent, over 15 equally wide bins of confidence (Guo et al., 2017).
        num_images: Number of images.
        seconds: Time taken, loading included.
    """

    top1: Percent
    top5: Percent
    loss: Measured
    ece: Measured
    num_images: Count
    seconds: Measured

    def to_dict(self) -> dict[str, float | int | None]:
        """Return values that JSON knows: a loss that is not finite becomes None.

        >>> Metrics(top1=0.0, top5=0.0, loss=math.nan, ece=0.0, num_images=1, seconds=0.5).to_dict()["loss"] is None
        True
        """
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Agreement:
    """How often two models predict the same class.

    Attributes:
        same: Percentage of images for which both predict the same class.
        confident_same: The same percentage among the images on which the first model is more than 50 % confident; None
            if there are none.
        confident_images: Number of those images.
        only_first_right: Number of images that the first model gets right and the second gets wrong.
        only_second_right: Number of images that the second model gets right and the first gets wrong.
    """

    same: float
    confident_same: float | None
    confident_images: int
    only_first_right: int
    only_second_right: int


@dataclass(frozen=True)
class Comparison:
    """Metrics of two models on the same images, and how often they agree."""

    first: Metrics
    second: Metrics
    agreement: Agreement


@dataclass(frozen=True)
class WorstClass:
    """A class that a model gets wrong.

    Attributes:
        label: The class.
        taken_for: (class, number of images) for the classes that its images are most often mistaken for, the most
            frequent first.
    """

    label: int
    taken_for: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Confusions:
    """What a model predicts on a data set, per class.

    Attributes:
        images: Number of images per class, C numbers.
        right: Number of those that the model gets right, C numbers.
        worst: The classes with the lowest accuracy, lowest first, at most 20. Of classes with equal accuracy the one
            with more images comes first. Classes without a wrong prediction are not included.
    """

    images: tuple[int, ...]
    right: tuple[int, ...]
    worst: tuple[WorstClass, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confusions:
        """Read back what `to_dict` returned.

        Raises:
            ValueError, KeyError, TypeError: the values are something else.
        """
        images, right = (tuple(int(count) for count in values[name]) for name in ("images", "right"))
        if len(images) != len(right):
            raise ValueError(f"{len(images)} numbers of images, but {len(right)} of right predictions")
        worst = tuple(
            WorstClass(int(row["label"]), tuple((int(label), int(count)) for label, count in row["taken_for"]))
            for row in values["worst"]
        )
        named = {row.label for row in worst} | {label for row in worst for label, _ in row.taken_for}
        if unknown := sorted(label for label in named if not 0 <= label < len(images)):
            raise ValueError(f"There is no class {unknown[0]} among {counted(len(images), 'class', 'classes')}.")
        return cls(images, right, worst)


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device,
    amp: Precision = "none",
    channels_last: bool = False,
    on_batch: Callable[[int], object] | None = None,
    predictions: Predictions | None = None,
) -> Metrics:
    """Measure a classifier on every image of a loader.

    Args:
        model: Maps images [B, channels, height, width] to logits [B, C]. It runs in eval mode; the modes of its modules
            are restored afterwards.
        loader: Batches of (images, labels int64 [B]).
        device: Where the model is.
        amp: Autocast precision of the forward pass. The metrics are computed in float32 and float64.
        channels_last: Whether the model is in that memory format.
        on_batch: Called after each batch with the number of images so far.
        predictions: Collects the label and the predicted class of every image.

    Raises:
        DataError: there are no images.

    >>> batches = [(torch.eye(3), torch.tensor([0, 1, 0]))]
    >>> found = evaluate(nn.Identity(), batches, device=torch.device("cpu"))
    >>> round(found.top1, 1), found.num_images
    (66.7, 3)
    """
    started = time.perf_counter()
    sums = add_up(
        model, loader, device=device, amp=amp, channels_last=channels_last, on_batch=on_batch, predictions=predictions
    )
    return sums.metrics(time.perf_counter() - started)


def add_up(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device,
    amp: Precision = "none",
    channels_last: bool = False,
    on_batch: Callable[[int], object] | None = None,
    predictions: Predictions | None = None,
    deferred: FixedClassifier | None = None,
) -> MetricSums:
    """Compute the sums behind `evaluate`, with the same arguments. The loader may be empty.

    With `deferred`, the model's only fixed head, there are never logits of all classes; see `fixify.many_classes`.
    """
    sums = MetricSums(device)
    with eval_mode(model), torch.no_grad():
        for images, labels in loader:
            labels = labels.to(device, non_blocking=True)
            if deferred is None:
                logits = _outputs(model, images, device, amp, channels_last).float()
                sums.add(logits, labels)
                predicted = logits.argmax(dim=-1)
            else:
                with deferring(deferred):
                    features = _outputs(model, images, device, amp, channels_last)
                with autocast(device, amp):
                    ranked = rank(deferred, features, labels)
                sums.add_ranked(ranked, labels)
                predicted = ranked.classes[:, 0]
            if predictions is not None:
                predictions.add(labels, predicted)
            if on_batch is not None:
                on_batch(sums.num_images)
    return sums


def compare(
    first: nn.Module,
    second: nn.Module,
    loader: Batches,
    second_loader: Batches | None = None,
    *,
    device: torch.device,
    amp: Precision = "none",
    on_batch: Callable[[int], object] | None = None,
) -> Comparison:
    """Measure two models on the same images, and how often they agree.

    Args:
        first: The reference, for example the original. Both models have the same classes in the same order.
        second: The other model, for example the converted one.
        loader: Batches of (images, labels) for the first model.
        second_loader: The same images in the same batches, preprocessed for the second model. None means that both
            models take the images of `loader`.
        device: Where both models are.
        amp: As in `evaluate`.
        on_batch: As in `evaluate`.

    Raises:
        DataError: there are no images, the loaders differ, or the models have different numbers of classes.
    """
    started = time.perf_counter()
    sums = (MetricSums(device), MetricSums(device))
    same = confident = confident_same = only_first = only_second = torch.zeros((), dtype=torch.int64, device=device)
    with eval_mode(first), eval_mode(second), torch.no_grad():
        for (images, labels), (other_images, other_labels) in _paired(loader, second_loader):
            if not torch.equal(labels, other_labels):
                raise DataError("The two loaders do not give the same images in the same order.")
            labels = labels.to(device, non_blocking=True)
            logits = _outputs(first, images, device, amp).float()
            other_logits = _outputs(second, other_images, device, amp).float()
            if logits.shape != other_logits.shape:
                raise DataError(
                    f"The models have {logits.shape[-1]} and {counted(other_logits.shape[-1], 'class', 'classes')}."
                )
            sums[0].add(logits, labels)
            sums[1].add(other_logits, labels)
            confidence, ours = logits.softmax(dim=-1).max(dim=-1)
            theirs = other_logits.argmax(dim=-1)
            sure = confidence > _CONFIDENT
            same = same + (ours == theirs).sum()
            confident = confident + sure.sum()
            confident_same = confident_same + (sure & (ours == theirs)).sum()
            only_first = only_first + ((ours == labels) & (theirs != labels)).sum()
            only_second = only_second + ((ours != labels) & (theirs == labels)).sum()
            if on_batch is not None:
                on_batch(sums[0].num_images)
    seconds = time.perf_counter() - started
    num_confident = int(confident)
    return Comparison(
        first=sums[0].metrics(seconds),
        second=sums[1].metrics(seconds),
        agreement=Agreement(
            same=100 * int(same) / sums[0].num_images,
            confident_same=100 * int(confident_same) / num_confident if num_confident else None,
            confident_images=num_confident,
            only_first_right=int(only_first),
            only_second_right=int(only_second),
        ),
    )


class MetricSums:
    """Running sums on the device. They are read once at the end, because each read makes the device wait.

    Attributes:
        totals: float64 [34]: number of images, loss, top-1 and top-5, then per bin the sum of confidences (15) and of
            right predictions (15). The sums of the parts of a data set add up to those of the whole.
        num_images: Images added here.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_images = 0
        # float32 is exact enough for the sums of one batch, but not for those of a data set. MPS has no float64.
        home = torch.device("cpu") if device.type == "mps" else device
        self.totals = torch.zeros(4 + 2 * _BINS, dtype=torch.float64, device=home)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, C], labels int64 [B]."""
        logits = logits.float()
        confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
        five = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        self._add(F.cross_entropy(logits, labels, reduction="sum"), confidence, predicted, five, labels)

    def add_ranked(self, ranked: Ranked, labels: Tensor) -> None:
        """Add a batch whose classes were ranked without its logits; labels int64 [B]."""
        confidence, classes = ranked.confidence.float(), ranked.classes
        self._add(ranked.losses.float().sum(), confidence, classes[:, 0], classes, labels)

    def _add(self, loss: Tensor, confidence: Tensor, predicted: Tensor, five: Tensor, labels: Tensor) -> None:
        right = predicted == labels
        # Bins are (0, 1/15], ..., (14/15, 1], as in the paper's code; NaN goes to the last one.
        bins = (confidence * _BINS).ceil().sub(1).nan_to_num(_BINS - 1).clamp(0, _BINS - 1).long()
        per_bin = F.one_hot(bins, _BINS).float()
        sums = torch.cat(
            [
                confidence.new_tensor([len(labels)]),
                loss.reshape(1),
                right.sum().reshape(1).float(),
                (five == labels[:, None]).sum().reshape(1).float(),
                (confidence[None] @ per_bin).flatten(),
                (right.float()[None] @ per_bin).flatten(),
            ]
        )
        self.totals += sums.to(self.totals.device).double()
        self.num_images += len(labels)

    def metrics(self, seconds: float) -> Metrics:
        """Compute the metrics of all images that were added.

        Raises:
            DataError: there are none.
        """
        totals = self.totals.cpu()
        num_images = int(totals[0])
        if num_images == 0:
            raise DataError("There are no images to evaluate on.")
        loss, top1, top5 = (totals[1:4] / num_images).tolist()
        confidences, rights = totals[4 : 4 + _BINS], totals[4 + _BINS :]
        ece = float((confidences - rights).abs().sum()) / num_images
        return Metrics(100 * top1, 100 * top5, loss, 100 * ece, num_images, seconds)


class Predictions:
    """The label and the predicted class of every image, collected on the device and read once at the end.

    They take 8 bytes per image; those of a million images take less memory than one batch.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, labels: Tensor, predicted: Tensor) -> None:
        """Add a batch: two int64 [B] on the same device."""
        self._batches.append(torch.stack([labels, predicted]).to(torch.int32))

    def pairs(self) -> Tensor:
        """Return every (label, predicted class) so far, int32 [2, num_images] on the CPU."""
        return torch.cat(self._batches, dim=1).cpu() if self._batches else torch.zeros(2, 0, dtype=torch.int32)


def count_confusions(pairs: NDArray[np.integer[Any]], num_classes: int, *, worst: int = WORST) -> Confusions:
    """Count what is predicted for each class.

    Args:
        pairs: (label, predicted class) of every image, integers [2, num_images].
        num_classes: C.
        worst: How many of the worst classes to keep.

    >>> found = count_confusions(np.array([[0, 0, 1, 1], [0, 0, 1, 2]]), num_classes=3)
    >>> found.images, found.right
    ((2, 2, 0), (2, 1, 0))
    >>> found.worst
    (WorstClass(label=1, taken_for=((2, 1),)),)
    """
    labels, predicted = pairs.astype(np.int64)
    wrong = labels != predicted
    images = np.bincount(labels, minlength=num_classes)
    missed = np.bincount(labels[wrong], minlength=num_classes)
    candidates = np.flatnonzero(missed)
    accuracy = (images - missed)[candidates] / images[candidates]
    chosen = candidates[np.lexsort((candidates, -images[candidates], accuracy))][:worst]
    rows = []
    for label in chosen:
        taken, counts = np.unique(predicted[wrong & (labels == label)], return_counts=True)
        most = np.lexsort((taken, -counts))[:_MOST_TAKEN_FOR]
        rows.append(WorstClass(int(label), tuple(zip(taken[most].tolist(), counts[most].tolist(), strict=True))))
    return Confusions(tuple(images.tolist()), tuple((images - missed).tolist()), tuple(rows))


def check_input_size(model: nn.Module, input_size: Sequence[int]) -> None:
    """Check that the model accepts an image size; position embeddings and deep strides may not allow it.

    Args:
        model: A model on the CPU.
        input_size: (channels, height, width).

    Raises:
        UsageError: the model does not accept it.
        ResourceError: the memory of this machine is too small for it.
    """
    _, height, width = input_size
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, *input_size))
    except (RuntimeError, AssertionError, ValueError, MemoryError) as error:  # what models raise on a wrong size
        if (problem := resource_problem(error)) is not None:
            raise ResourceError(
                f"Cannot run the model on one image of {height} x {width}: {problem.what}.",
                hint="Choose a smaller --img-size.",
            ) from error
        raise UsageError(
            f"This model does not take images of {height} x {width}: {str(error).splitlines()[0]}"
        ) from error


def resolve_device(name: str | None) -> torch.device:
    """Return the device of that name; for None or "auto" the first accelerator, or the CPU if there is none.

    Raises:
        UsageError: it is not a device, or this machine does not have it.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name is None or name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UsageError(f"There is no device {name!r} here.", hint="Try --device cpu") from error
    return device


def autocast(device: torch.device, amp: Precision) -> torch.autocast:
    """Make the autocast context of a precision; for "none" it does nothing."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the block; then restore each module's mode (a frozen batch norm stays so).

    >>> model = nn.Dropout()
    >>> with eval_mode(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _outputs(
    model: nn.Module, images: Tensor, device: torch.device, amp: Precision, channels_last: bool = False
) -> Tensor:
    images = images.to(device, non_blocking=True)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with autocast(device, amp):
        outputs: Tensor = model(images)
    return outputs


def _paired(loader: Batches, other: Batches | None) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    if other is None:
        return ((batch, batch) for batch in loader)
    return zip(loader, other, strict=True)
