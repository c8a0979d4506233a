"""Choose the codes of new classes of a slim checkpoint: by a few images of each, or by their class vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify._values import counted
from fixify.bare_conversion import ClassVectors
from fixify.checkpoints.matrix import MatrixOptions, read_matrix
from fixify.checkpoints.slim import Contents, SlimInfo, load_contents
from fixify.data import UnreadableImages, draw_images, make_loader, name_the_first
from fixify.errors import DataError, SourceError, UsageError, resources_explained
from fixify.features import inputs_of, samples_of
from fixify.heads import FixedClassifier
from fixify.heads.editing import add_classes
from fixify.heads.statistics import floor_std
from fixify.metrics import resolve_device

_MARGIN = 3.0
"""By how much the logit of a new class exceeds the largest old one on its own images, on average: softmax is 0.95."""
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
        with loader, resources_explained("run the images"):
            seen = inputs_of(model, dims, loader, where, lambda path, x: samples_of(x, dims[path]))
        for path, parts in seen.items():
            features[path][label] = torch.cat(parts) if parts else torch.empty(0, widths[path])
    return ClassFeatures(tuple(labels), features, tuple(notes))


def by_images(
    contents: Contents,
    path: Path,
    heads: Mapping[str, FixedClassifier],
    new: Sequence[str],
    folder: Path,
    device: str | None,
) -> tuple[dict[str, FixedClassifier], tuple[str, ...]]:
    """Add classes whose codes are chosen by the mean features of some images, and biases by their logits.

    Args:
        contents: The slim checkpoint.
        path: Its file.
        heads: Its heads by path.
        new: Names of the new classes.
        folder: A folder with a folder of images per class; those called like old classes show what new ones are not.
        device: See `observe`.

    Returns:
        The heads with the new classes, and what is unusual about the images.

    Raises:
        UsageError: There is no network, or nothing shows what sets a class apart.
        DataError: See `observe`.
        HeadSpecError: See `fixify.heads.editing.add_classes`.
    """
    info = contents.info
    if info.is_bare:
        raise UsageError(
            f"{path.name} is a classifier without a network, and cannot see images.", hint="Give --embeddings."
        )
    old = [name for name in info.labels or [] if (folder / name).is_dir()]
    seen = observe(load_contents(contents, path), info, folder, [*new, *old], device)
    made = {place: _matched(head, seen, place, len(new), path.name) for place, head in heads.items()}
    return made, seen.notes


def _matched(head: FixedClassifier, seen: ClassFeatures, path: str, count: int, name: str) -> FixedClassifier:
    features = [seen.features[path][label] for label in seen.labels]
    if any(not len(each) for each in features):  # an auxiliary classifier, which does not run
        return add_classes(head, count)
    means = torch.stack([each.mean(dim=0) for each in features])
    if head.mean is not None and head.num_batches_tracked is not None and int(head.num_batches_tracked):
        center = head.mean
    elif len(means) > 1:
        center = means.mean(dim=0)
    else:
        raise UsageError(
            f"{name} stores no mean of its features, so one class alone does not show what sets it apart.",
            hint="Put images of old classes beside it, in folders called like them, or calibrate when converting.",
        )
    vectors = means[:count] - center
    if head.std is not None:
        vectors = vectors / floor_std(head.std)
    made = add_classes(head, count, vectors, biases=torch.zeros(count) if head.bias is not None else None)
    if made.bias is not None:
        with torch.no_grad():
            for i, each in enumerate(features[:count]):
                logits = made(each)
                number = head.out_features + i
                ahead = logits[:, : head.out_features].amax(dim=1).mean() - logits[:, number].mean()
                made.bias[number] = ahead + _MARGIN
    return made


def by_embeddings(
    info: SlimInfo,
    path: Path,
    heads: Mapping[str, FixedClassifier],
    new: Sequence[str],
    embeddings: Path,
    keys: Sequence[str],
) -> dict[str, FixedClassifier]:
    """Add classes whose codes are chosen by class vectors of the kind that the classifier was made from.

    Args:
        info: What the slim checkpoint says about itself.
        path: Its file.
        heads: Its heads by path.
        new: Names of the new classes.
        embeddings: The file of class vectors, one row per new class.
        keys: See `fixify.checkpoints.matrix.MatrixOptions`.

    Raises:
        UsageError: The classifier was not made from class vectors, or there are not as many as names.
        SourceError: The class vectors have another width, or cannot be read.
        FormatError: The header of the checkpoint is damaged.
        HeadSpecError: See `fixify.heads.editing.add_classes`.
    """
    known = None
    if len(heads) == 1:
        ((place, head),) = heads.items()
        known = ClassVectors.recorded(info, head.in_features)
    if known is None:
        raise UsageError(
            f"{path.name} was not made from class vectors that are known, so others cannot be compared with them.",
            hint="Give --images of the new classes.",
        )
    if head.spec.planes is not None:
        raise UsageError(
            f"{path.name} has a stored projection of its features, and where class vectors lie in it is not known.",
            hint="Give --images of the new classes, or convert the original with them again.",
        )
    scale = known.logit_scale
    matrix = read_matrix(embeddings, MatrixOptions(keys=keys, rows="classes", logit_scale=scale or 1.0))
    if matrix.num_features != head.in_features:
        raise SourceError(
            f"{embeddings} has class vectors of {matrix.num_features} values, and {path.name} of {head.in_features}."
        )
    if len(matrix.weight) != len(new):
        raise UsageError(
            f"{embeddings} has {counted(len(matrix.weight), 'class vector')} for {len(new)} new ones; one row is one "
            "class."
        )
    vectors = matrix.weight if scale is None else F.normalize(matrix.weight, dim=1)
    vectors = (vectors - known.mean) * (scale or 1.0)
    if head.std is not None:
        vectors = vectors * floor_std(head.std)
    as_converted = info.training is None and info.calibration is None
    return {place: add_classes(head, len(new), vectors, lengths=as_converted, biases=matrix.bias)}
