"""Which classes a model confuses, without a matrix of C x C: it works for 10 classes and for 10,000."""

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
from torch import Tensor, nn

from fixify.errors import DataError, UsageError

WORST = 20
_MOST_TAKEN_FOR = 3


@dataclass(frozen=True)
class WorstClass:
    """A class that a model gets wrong.

    Attributes:
        label: Its number.
        taken_for: The (number, images) of the classes that its images were taken for most often, most often first.
    """

    label: int
    taken_for: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Confusions:
    """What a model answered on a data set, class by class.

    Attributes:
        images: Images of each class, C numbers.
        right: Those that the model got right, C numbers.
        worst: The classes with the smallest share of right answers, smallest first, at most 20; of equal shares the
            class with more images. Classes without a wrong answer are not among them.
    """

    images: tuple[int, ...]
    right: tuple[int, ...]
    worst: tuple[WorstClass, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confusions:
        """Read back what `to_dict` wrote; raises ValueError, KeyError or TypeError if it is something else."""
        images, right = (tuple(int(count) for count in values[name]) for name in ("images", "right"))
        if len(images) != len(right):
            raise ValueError("as many classes with images as with answers are expected")
        worst = tuple(
            WorstClass(int(row["label"]), tuple((int(label), int(count)) for label, count in row["taken_for"]))
            for row in values["worst"]
        )
        named = {row.label for row in worst} | {label for row in worst for label, _ in row.taken_for}
        if not all(0 <= label < len(images) for label in named):
            raise ValueError(f"a class beyond the {len(images)} is named")
        return cls(images, right, worst)


class Predictions:
    """The label and the answer of every image, collected on the device and read once at the end.

    Eight bytes an image: of a million images less than one batch takes.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, labels: Tensor, guesses: Tensor) -> None:
        """Add a batch: int64 [B] and [B], on the same device."""
        self._batches.append(torch.stack([labels, guesses]).to(torch.int32))

    def pairs(self) -> Tensor:
        """Every (label, answer) so far, int32 [2, images], on the CPU."""
        return torch.cat(self._batches, dim=1).cpu() if self._batches else torch.zeros(2, 0, dtype=torch.int32)


def confusions(pairs: np.ndarray, num_classes: int, *, worst: int = WORST) -> Confusions:
    """Count the answers to each class.

    Args:
        pairs: (label, answer) of every image, integers [2, images].
        num_classes: C.
        worst: For how many classes what they were taken for is kept.
    """
    labels, guesses = pairs.astype(np.int64)
    wrong = labels != guesses
    images = np.bincount(labels, minlength=num_classes)
    missed = np.bincount(labels[wrong], minlength=num_classes)
    candidates = np.flatnonzero(missed)
    share = (images - missed)[candidates] / images[candidates]
    chosen = candidates[np.lexsort((candidates, -images[candidates], share))][:worst]
    rows = []
    for label in chosen:
        taken, counts = np.unique(guesses[wrong & (labels == label)], return_counts=True)
        most = np.lexsort((taken, -counts))[:_MOST_TAKEN_FOR]
        rows.append(WorstClass(int(label), tuple(zip(taken[most].tolist(), counts[most].tolist(), strict=True))))
    return Confusions(tuple(images.tolist()), tuple((images - missed).tolist()), tuple(rows))


# Metrics over a whole data set: sums over images, never means of batch means.


Precision = Literal["none", "bf16", "fp16"]
_BINS = 15
_CONFIDENT = 0.5


@dataclass(frozen=True)
class Metrics:
    """What a model gets right.

    Attributes:
        top1: Percent of images whose most probable class is the label.
        top5: Percent of images whose label is among the 5 most probable classes (100 with 5 classes or fewer).
        loss: Mean cross-entropy, nats.
        ece: Expected calibration error, percent, over 15 equally wide bins of confidence (Guo et al., 2017).
        num_images: Images counted.
        seconds: Time taken, loading included.
    """

    top1: float
    top5: float
    loss: float
    ece: float
    num_images: int
    seconds: float

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON knows it: a loss that is not finite becomes None."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Agreement:
    """How often two models name the same class.

    Attributes:
        same: Percent of images to which both give the same most probable class.
        confident_same: The same among the images on which the first model is more than 50 % sure; None without any.
        confident_images: Number of those.
        only_first_right: Images that the first model gets right and the second wrong.
        only_second_right: Images that the second model gets right and the first wrong.
    """

    same: float
    confident_same: float | None
    confident_images: int
    only_first_right: int
    only_second_right: int


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    first: Metrics
    second: Metrics
    agreement: Agreement


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: Precision = "none",
    channels_last: bool = False,
    on_batch: Callable[[int], object] | None = None,
    answers: Predictions | None = None,
) -> Metrics:
    """Metrics of a classifier over every image of a loader.

    Args:
        model: Maps images [B, channels, height, width] to logits [B, C]. Runs in eval mode; its modes are restored.
        loader: Batches of (images, labels int64 [B]).
        device: Where the model is.
        amp: Autocast precision of the forward pass; the metrics themselves are computed in float32 and float64.
        channels_last: Whether the model is in that memory format.
        on_batch: Called after each batch with the number of images so far.
        answers: Is given the label and the answer of every image.

    Raises:
        DataError: there are no images.
    """
    started = time.perf_counter()
    sums = add_up(
        model, loader, device=device, amp=amp, channels_last=channels_last, on_batch=on_batch, answers=answers
    )
    return sums.metrics(time.perf_counter() - started)


def add_up(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: Precision = "none",
    channels_last: bool = False,
    on_batch: Callable[[int], object] | None = None,
    answers: Predictions | None = None,
) -> MetricSums:
    """What `evaluate` makes its metrics of, for a part of the images; there may be none."""
    sums = MetricSums(device)
    with eval_mode(model), torch.no_grad():
        for images, labels in loader:
            logits = _logits(model, images, device, amp, channels_last)
            labels = labels.to(device, non_blocking=True)
            sums.add(logits, labels)
            if answers is not None:
                answers.add(labels, logits.argmax(dim=-1))
            if on_batch is not None:
                on_batch(sums.num_images)
    return sums


def compare(
    first: nn.Module,
    second: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    second_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    device: torch.device,
    amp: Precision = "none",
    on_batch: Callable[[int], object] | None = None,
) -> Comparison:
    """Metrics of two models, and how often they agree.

    Args:
        first: The reference, for example the original; both models have the same classes in the same order.
        second: The other, for example the converted model.
        loader: Batches of (images, labels) for the first model.
        second_loader: The same images in the same batches, preprocessed for the second model; None if alike.
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
            logits = _logits(first, images, device, amp)
            other_logits = _logits(second, other_images, device, amp)
            if logits.shape != other_logits.shape:
                raise DataError(f"The models have {logits.shape[-1]} and {other_logits.shape[-1]} classes.")
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


def agreement(
    model_a: nn.Module, model_b: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device
) -> Agreement:
    """How often two models that take the same images name the same class; `compare` gives their metrics as well."""
    return compare(model_a, model_b, loader, device=device).agreement


def check_input_size(model: nn.Module, input_size: Sequence[int]) -> None:
    """Refuse an image size that the model cannot take (transformers with position embeddings, deep strides).

    Args:
        model: On the CPU.
        input_size: (channels, height, width).

    Raises:
        UsageError: it cannot.
    """
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, *input_size))
    except (RuntimeError, AssertionError, ValueError) as error:  # what models raise on a wrong size
        _, height, width = input_size
        raise UsageError(
            f"This model does not take images of {height} x {width}: {str(error).splitlines()[0]}"
        ) from error


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; for None or "auto" the first accelerator there is, else the CPU.

    Raises:
        UsageError: not a device, or not on this machine.
    """
    if name is None or name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError(f"There is no device {name!r} here.", hint="Try --device cpu") from error
    return device


def autocast(device: torch.device, amp: Precision) -> torch.autocast:
    """The autocast context of a precision; does nothing for "none"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; then each module in its own mode again (a frozen batch norm stays frozen)."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class MetricSums:
    """Running sums on the device, read once at the end: reading them every batch would make the device wait.

    Attributes:
        totals: float64 [34]: images, loss, top-1, top-5, and for each of 15 bins confidence and top-1. The sums of
            parts of a data set add up to those of the whole.
        num_images: Images added here.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_images = 0
        # Sums of one batch fit float32 exactly enough; those of a data set do not. MPS has no float64.
        home = torch.device("cpu") if device.type == "mps" else device
        self.totals = torch.zeros(4 + 2 * _BINS, dtype=torch.float64, device=home)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, C], labels int64 [B]."""
        logits = logits.float()
        confidence, guess = logits.softmax(dim=-1).max(dim=-1)
        right = guess == labels
        five = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        # Bins are (0, 1/15], ..., (14/15, 1], as in the paper's code; NaN goes to the last one.
        bins = (confidence * _BINS).ceil().sub(1).nan_to_num(_BINS - 1).clamp(0, _BINS - 1).long()
        per_bin = F.one_hot(bins, _BINS).float()
        here = torch.cat(
            [
                logits.new_tensor([len(labels)]),
                F.cross_entropy(logits, labels, reduction="sum").reshape(1),
                right.sum().reshape(1).float(),
                (five == labels[:, None]).sum().reshape(1).float(),
                (confidence[None] @ per_bin).flatten(),
                (right.float()[None] @ per_bin).flatten(),
            ]
        )
        self.totals += here.to(self.totals.device).double()
        self.num_images += len(labels)

    def metrics(self, seconds: float) -> Metrics:
        """The metrics of all that was added; raises `DataError` if that is nothing."""
        totals = self.totals.cpu()
        num_images = int(totals[0])
        if num_images == 0:
            raise DataError("There are no images to evaluate on.")
        loss, top1, top5 = (totals[1:4] / num_images).tolist()
        confidences, rights = totals[4 : 4 + _BINS], totals[4 + _BINS :]
        ece = float((confidences - rights).abs().sum()) / num_images
        return Metrics(100 * top1, 100 * top5, loss, 100 * ece, num_images, seconds)


def _logits(
    model: nn.Module, images: Tensor, device: torch.device, amp: Precision, channels_last: bool = False
) -> Tensor:
    images = images.to(device, non_blocking=True)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with autocast(device, amp):
        logits: Tensor = model(images)
    return logits.float()


def _paired(
    loader: Iterable[tuple[Tensor, Tensor]], other: Iterable[tuple[Tensor, Tensor]] | None
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    if other is None:
        return ((batch, batch) for batch in loader)
    return zip(loader, other, strict=True)
