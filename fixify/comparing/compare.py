"""Compare a slim checkpoint with its original, and with other ways to store the original's classifier in few bytes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fixify._values import counted
from fixify._watch import unheard
from fixify.checkpoints.open import OpenModel, open_model
from fixify.checkpoints.slim import DTYPES
from fixify.comparing.alternatives import Alternative, Moments, alternatives
from fixify.comparing.paired import Paired, paired
from fixify.comparing.result import ClassChange, Compared, Row, winners
from fixify.comparing.running import integer_classifier, memory_bytes, seconds_per_batch
from fixify.data import (
    ImageLoader,
    OpenedData,
    UnreadableImages,
    default_workers,
    draw_images,
    make_loader,
    name_the_first,
)
from fixify.errors import UsageError, resources_explained
from fixify.evaluation import open_labelled, prepare_model, refuse_other_order
from fixify.features import draw_to_calibrate, inputs_of, record_inputs
from fixify.heads import FixedClassifier
from fixify.metrics import Metrics, MetricSums, eval_mode, resolve_device
from fixify.models.classifiers import find_classifiers
from fixify.savings import count_bytes

Batch = tuple[Tensor, Tensor]
WORST = 10
"""Number of classes that are listed."""
_EVERY_IMAGE = 1 << 62
_SAME = 1e-3
"""Greatest difference between logits and what the classifier layer returned, in standard deviations of the logits."""


def compare(
    original: str | Path | OpenModel,
    slim: str | Path | OpenModel,
    data: str | Path,
    *,
    unlabelled: bool = False,
    calibrate: str | Path | None = None,
    calibrate_images: int = 512,
    split: str = "val",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    download: bool = False,
    class_map: str | Path | None = None,
    class_order: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    max_unreadable: float = 0.01,
    seed: int = 0,
    arch: str | None = None,
    ema: bool = False,
    on_start: Callable[[OpenedData], object] | None = None,
    on_images: Callable[[int], object] | None = None,
    on_warning: Callable[[str], object] | None = None,
) -> Compared:
    """Compare a slim checkpoint with its original and with integers, a truncated SVD and pruning, on the same images.

    The alternatives keep the original's backbone, and store its classifier in few bytes: see
    `fixify.comparing.alternatives`. The SVD and the pruned weights get as many bytes as the fixed head.

    Args:
        original: The ordinary checkpoint, a model name, or one that is open already.
        slim: The slim checkpoint, or one that is open already.
        data: A folder with train/ and val/, or a data name; see `fixify.data.open_data`.
        unlabelled: Take all images of `data` without labels, and count agreement with the original.
        calibrate: Images without labels, on which the alternatives are calibrated: a folder or a data name. None leaves
            the calibrated alternatives out.
        calibrate_images: How many of them are drawn.
        split: "train", "val" or "test".
        batch_size: Images per step.
        workers: Loader processes; None fits the machine.
        device: Where the models run; None takes the first accelerator, else the CPU.
        download: Whether `torch/...` data may be downloaded.
        class_map: File with the label of each class; like the next three see `fixify.data.DataOptions`.
        class_order: "natural" or "lexical".
        input_key: Image column or file extensions.
        target_key: Label column or field.
        max_unreadable: Share of the images that may be unreadable; they are left out.
        seed: Decides which images calibrate.
        arch: The architecture of the original, if the file does not show it.
        ema: Take the averaged weights of a training checkpoint.
        on_start: Called with the data before the first image.
        on_images: Called after each batch with the number of images so far.
        on_warning: Called with what is wrong or unusual about images.

    Raises:
        UsageError: `slim` is no slim checkpoint, or `original` is one; the numbers of classes differ; or the model has
            no single classifier layer that returns its logits.
        DataError: the data is missing or not the checkpoints', or too many images are unreadable.
        ResourceError, LoaderError: memory or file handles ran out, or a loader process ended.
        SourceError, ArchitectureError, FormatError: a checkpoint cannot be opened.
    """
    where = resolve_device(device)
    warn = on_warning if on_warning is not None else unheard
    before, after = _open_both(original, slim, arch=arch, ema=ema)
    layer, head_path = _classifier(before), _fixed_head(after)
    if unlabelled:
        opened = images = draw_images(str(data), count=_EVERY_IMAGE, seed=seed)
    else:
        opened = open_labelled(data, split, class_order, class_map, input_key, target_key, download=download)
        first, second = (prepare_model(each, opened, where, None, None) for each in (before, after))
        refuse_other_order(first, second)
        images = first.matched.data
    for each in (before, after):
        each.model.to(where)
    if on_start is not None:
        on_start(images)
    unreadable = UnreadableImages(len(images), max_unreadable, name_the_first(warn), warn)

    def batches(model: OpenModel, data: OpenedData, counter: UnreadableImages) -> ImageLoader:
        return make_loader(
            data,
            model.preprocessing,
            training=False,
            batch_size=batch_size,
            workers=default_workers(where) if workers is None else workers,
            device=where,
            unreadable=counter,
        )

    notes = []
    learned, fixed = before.model.get_submodule(layer), after.model.get_submodule(head_path)
    with resources_explained("compare"), contextlib.ExitStack() as loaders:
        moments, calibrated_on = None, 0
        if calibrate is None:
            notes.append("No alternative is calibrated. Give images without labels: --calibrate IMAGES.")
        else:
            drawn = draw_to_calibrate(str(calibrate), calibrate_images, seed)
            counter = UnreadableImages(len(drawn), max_unreadable, name_the_first(warn), warn)
            calibrating = loaders.enter_context(batches(before, drawn, counter))
            features = torch.cat(inputs_of(before.model, [layer], calibrating, where)[layer])
            moments, calibrated_on = Moments.of(features), len(features)
            if (summary := counter.summary()) is not None:
                warn(summary)
        fixed_bytes = count_bytes(fixed.state_dict().values())
        others = tuple(alternatives(*_weights(learned), fixed_bytes, moments))
        loader = loaders.enter_context(batches(before, images, unreadable))
        pairs: Iterable[tuple[Batch, Batch]] = ((batch, batch) for batch in loader)
        if before.preprocessing != after.preprocessing:
            pairs = zip(loader, loaders.enter_context(batches(after, images, unreadable)), strict=True)
        models = _Models(before.model, layer, others, after.model)
        answers = _answer(models, pairs, images.labelled, where, on_images)
    if (summary := unreadable.summary()) is not None:
        warn(summary)
    for name in ("SVD", "pruned"):
        if not any(other.name.startswith(name) for other in others):
            notes.append(f"{name} is left out: it cannot be stored in the {fixed_bytes:,} bytes of the fixed head.")
    origin: Any = before.model.fixify_origin
    rows = _rows(answers, after.name, others, _sizes(learned, fixed, others, DTYPES[origin.dtype]))
    return Compared(
        data=images.name,
        labelled=images.labelled,
        num_images=len(answers.labels),
        calibrated_on=calibrated_on,
        rows=rows,
        worst=_worst(answers, images.class_names if images.labelled else before.labels),
        winners=tuple(winners(rows)),
        notes=tuple(notes),
    )


# The two checkpoints.


def _open_both(
    original: str | Path | OpenModel, slim: str | Path | OpenModel, *, arch: str | None, ema: bool
) -> tuple[OpenModel, OpenModel]:
    usage = "Usage: fixify compare ORIGINAL SLIM --data DATA"
    after = slim if isinstance(slim, OpenModel) else open_model(slim)
    if not any(isinstance(module, FixedClassifier) for module in after.model.modules()):
        raise UsageError(f"{after.name} is not a slim checkpoint.", hint=usage)
    before = original if isinstance(original, OpenModel) else open_model(original, arch=arch, ema=ema)
    if before.slim is not None:
        raise UsageError(f"{before.name} has a fixed head already.", hint=usage)
    if before.num_classes != after.num_classes:
        raise UsageError(
            f"{before.name} has {counted(before.num_classes, 'class', 'classes')}, {after.name} has "
            f"{after.num_classes}: they do not answer the same question."
        )
    return before, after


def _classifier(before: OpenModel) -> str:
    """Return the path of the one Linear whose output is the logits."""
    sites = find_classifiers(before.model, before.architecture)
    if len(sites) != 1 or sites[0].channel_dim != -1:
        raise UsageError(
            f"{before.name} has {counted(len(sites), 'classifier layer')} ({', '.join(site.path for site in sites)}), "
            "and only one Linear that returns the logits can be stored in other ways.",
            hint=f"Compare the two checkpoints alone: fixify eval SLIM --against {before.name} --data DATA",
        )
    return sites[0].path


def _fixed_head(after: OpenModel) -> str:
    return next(name for name, module in after.model.named_modules() if isinstance(module, FixedClassifier))


def _weights(learned: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weights [C, N] and the bias of a classifier layer."""
    return learned.weight.detach().cpu(), None if learned.bias is None else learned.bias.detach().cpu()


# Their answers.


@dataclass(frozen=True)
class _Models:
    """The original with the path of its classifier, the alternatives to that, and the slim checkpoint's model."""

    original: nn.Module
    layer: str
    others: Sequence[Alternative]
    slim: nn.Module


@dataclass(frozen=True)
class _Answers:
    """The labels int64 [images], and of each row its most probable classes int64 [rows, images] and its metrics."""

    labels: NDArray[np.int64]
    classes: NDArray[np.int64]
    metrics: tuple[Metrics, ...]


@torch.no_grad()
def _answer(
    models: _Models,
    pairs: Iterable[tuple[Batch, Batch]],
    labelled: bool,
    device: torch.device,
    on_images: Callable[[int], object] | None,
) -> _Answers:
    sums = [MetricSums(device) for _ in range(2 + len(models.others))]
    heads = [(each.weight.to(device), None if each.bias is None else each.bias.to(device)) for each in models.others]
    all_labels, all_classes = [], []
    with eval_mode(models.original), eval_mode(models.slim):
        for (images, labels), (other_images, _) in pairs:
            with record_inputs(models.original, [models.layer]) as seen:
                logits = models.original(images.to(device)).float()
            features = _inputs_of_the_last(models, seen[models.layer], logits)
            rows = [logits, models.slim(other_images.to(device)).float()]
            rows += [F.linear(features, weight, bias) for weight, bias in heads]
            classes = torch.stack([row.argmax(dim=-1) for row in rows])
            labels = labels.to(device) if labelled else classes[0]
            for each, row in zip(sums, rows, strict=True):
                each.add(row, labels)
            all_labels.append(labels.cpu())
            all_classes.append(classes.cpu())
            if on_images is not None:
                on_images(sums[0].num_images)
    metrics = tuple(each.metrics(0.0) for each in sums)  # raises if there were no images
    return _Answers(torch.cat(all_labels).numpy(), torch.cat(all_classes, dim=1).numpy(), metrics)


def _inputs_of_the_last(models: _Models, seen: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Return what the classifier layer was given; refuse a model that changes what the layer returns."""
    if len(seen) == 1:
        features = seen[0].to(logits.device)
        returned = models.original.get_submodule(models.layer)(features).float()
        if returned.shape == logits.shape and (returned - logits).abs().max() <= _SAME * logits.std():
            return features
    raise UsageError(
        f"The logits are not what the layer {models.layer} returns, so its weights cannot be stored in other ways.",
        hint="Compare the two checkpoints alone: fixify eval SLIM --against ORIGINAL --data DATA",
    )


# The table.


@dataclass(frozen=True)
class _Size:
    head_bytes: int
    memory_bytes: int
    seconds: dict[int, float] | None


def _sizes(learned: nn.Module, fixed: nn.Module, others: Sequence[Alternative], dtype: torch.dtype) -> list[_Size]:
    """Measure the classifiers on the CPU. An alternative that PyTorch has no product for takes what float32 takes."""
    weight, bias = _weights(learned)
    dense = _linear(weight.float(), bias)
    makers = {_kind(each): each for each in others}
    modules: dict[object, nn.Module] = {"original": dense, "fixed": fixed.cpu().eval()}
    modules |= {kind: made for kind, each in makers.items() if (made := _small(each)) is not None}
    num_features = weight.shape[1]
    seconds = dict(zip(modules, seconds_per_batch(list(modules.values()), num_features), strict=True))
    memory = {kind: memory_bytes(module, num_features) for kind, module in modules.items()}
    stored = (weight.numel() + (0 if bias is None else len(bias))) * dtype.itemsize
    return [
        _Size(stored, memory["original"], seconds["original"]),
        _Size(count_bytes(fixed.state_dict().values()), memory["fixed"], seconds["fixed"]),
        *(
            _Size(each.num_bytes, memory.get(_kind(each), memory["original"]), seconds.get(_kind(each)))
            for each in others
        ),
    ]


def _kind(each: Alternative) -> tuple[int | None, int | None]:
    """Return what decides its time and memory. Two and three bits run as four; calibrating changes nothing."""
    return None if each.bits is None else max(each.bits, 4), each.rank


def _small(each: Alternative) -> nn.Module | None:
    """Make a classifier of an alternative's size as PyTorch runs it; only its time and memory count."""
    classes, features = each.weight.shape
    if each.bits is not None:
        return integer_classifier(features, classes, each.bits, each.bias is not None)
    if each.rank is not None:
        factors = nn.Linear(features, each.rank, bias=False), nn.Linear(each.rank, classes, bias=each.bias is not None)
        return nn.Sequential(*factors).eval()
    return None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made.eval()


def _rows(answers: _Answers, name: str, others: Sequence[Alternative], sizes: Sequence[_Size]) -> tuple[Row, ...]:
    right = answers.classes == answers.labels
    num_images = len(answers.labels)

    def against(row: int, other: int) -> Paired:
        return paired(int((right[row] & ~right[other]).sum()), int((right[other] & ~right[row]).sum()), num_images)

    names = ["original", name, *(each.name for each in others)]
    return tuple(
        Row(
            name=names[i],
            calibrated=others[i - 2].calibrated if i > 1 else None,
            head_bytes=sizes[i].head_bytes,
            memory_bytes=sizes[i].memory_bytes,
            seconds=sizes[i].seconds,
            metrics=answers.metrics[i],
            agreement=100 * float((answers.classes[i] == answers.classes[0]).mean()),
            against_original=against(i, 0) if i else None,
            against_fixed=against(i, 1) if i > 1 else None,
        )
        for i in range(len(names))
    )


def _worst(answers: _Answers, names: Sequence[str] | None) -> tuple[ClassChange, ...]:
    """List the classes that lose most images from the original to the fixed head, and more than they gain."""
    right = answers.classes[:2] == answers.labels
    count = functools.partial(np.bincount, minlength=int(answers.labels.max()) + 1)
    images, original, fixed = (count(answers.labels[mask]) for mask in (slice(None), right[0], right[1]))
    order = np.lexsort((np.arange(len(images)), fixed - original))
    return tuple(
        ClassChange(str(label) if names is None else names[label], *(int(n[label]) for n in (images, original, fixed)))
        for label in order[:WORST]
        if fixed[label] < original[label]
    )
