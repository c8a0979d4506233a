"""Read a classifier that comes without a network: a matrix of class vectors, with or without biases.

Text embeddings of class names are such matrices (the zero-shot classifiers of CLIP), and so are the last layers of
networks of other frameworks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fixify._files import sha256_of, unchanged
from fixify._values import counted, shorten
from fixify.checkpoints.arrays import SUFFIXES, StoredArray, stored_arrays
from fixify.checkpoints.header import LANGUAGE_KEY, SLIM_KEY, has_metadata, read_metadata
from fixify.checkpoints.labels import find_label_lists, read_class_map, read_labels
from fixify.checkpoints.source import check_finite
from fixify.errors import FormatError, SourceError, UsageError, resources_explained
from fixify.heads.base_kind import MAX_SIGNS
from fixify.heads.spec import MAX_CLASSES, MAX_FEATURES

Rows = Literal["classes", "features"]
"""What a row of a stored matrix is."""

_LAST_WORDS = ("bias", "biases", "b")
_MATRIX_WORDS = {"weight": "bias", "kernel": "bias", "W": "b", "w": "b"}
_MOST_BESIDE = 3  # tensors beside the only matrix of a file that is not a network
_WIDTH_STEP, _LARGEST_WIDTH = 64, 8192  # widths of features are multiples of 64 up to this, nearly always
_UNIT = 1e-2
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class MatrixOptions:
    """How a file of a classifier is read.

    Attributes:
        keys: Name of the matrix, and of the bias if that is not found by itself; empty if there is one matrix.
        rows: What a row of the matrix is; None: decided by the labels, the bias and the widths.
        labels: A file of class names, or "imagenet"; None: those in the file's own metadata.
        widths: Widths of features that are possible; empty for any.
        widths_in_words: What makes features of these widths, for messages.
        logit_scale: Whether logits are this times the cosine, so that only directions count; None: they are `W x + b`.
    """

    keys: Sequence[str] = ()
    rows: Rows | None = None
    labels: str | None = None
    widths: Collection[int] = ()
    widths_in_words: str = ""
    logit_scale: float | None = None


@dataclass(frozen=True)
class Matrix:
    """A classifier without a network.

    Attributes:
        name: Name of its file.
        weight: One row per class, float32 [C, N].
        bias: float32 [C], or None.
        labels: Class names, or None.
        sha256: SHA-256 of the file.
        num_bytes: Size of the file.
        stored_bytes: Size of weight and bias as they are stored.
        keys: Names of weight and bias in the file.
        transposed: Whether the file holds the weight as [N, C].
        notes: What was decided and left out, for the user.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    labels: list[str] | None
    sha256: str
    num_bytes: int
    stored_bytes: int
    keys: tuple[str, ...]
    transposed: bool
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.weight)

    @property
    def num_features(self) -> int:
        """Number of features N."""
        return self.weight.shape[1]

    def record(self) -> dict[str, Any]:
        """Say which file it is, for the header of a slim checkpoint."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "bytes": self.num_bytes,
            "keys": list(self.keys),
            "rows": "features" if self.transposed else "classes",
        }


def is_matrix(path: Path | str) -> bool:
    """Check whether a file holds a classifier alone; only its header is read.

    That is an array of NumPy, and a .safetensors file with a single matrix and little else.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    if path.suffix != ".safetensors":
        return True
    if has_metadata(path, SLIM_KEY) or has_metadata(path, LANGUAGE_KEY):
        return False
    try:
        arrays = stored_arrays(path)
    except SourceError:  # whoever opens it as a checkpoint says what is wrong
        return False
    shapes = [array.shape for array in arrays.values()]
    return len(_matrices(arrays)) == 1 and len(shapes) <= 1 + _MOST_BESIDE and max(map(len, shapes)) == 2


def read_matrix(path: Path | str, options: MatrixOptions | None = None) -> Matrix:
    """Read a classifier from a .npy, .npz or .safetensors file.

    Args:
        path: The file.
        options: How to read it.

    Raises:
        SourceError: The file cannot be read, has no such matrix, or holds NaN or infinity; or its sizes contradict the
            labels or the widths.
        UsageError: It is left open which tensor is meant, or whether the matrix is C x N or N x C.
    """
    path, options = Path(path), options or MatrixOptions()
    if path.suffix not in SUFFIXES:
        raise SourceError(
            f"{path} is not a file of {', '.join(SUFFIXES)}, from which a classifier without a network is read.",
            hint="Save it as one: safetensors.torch.save_file({'weight': weight}, 'classifier.safetensors')",
        )
    with unchanged(path, SourceError), resources_explained("read the classifier"):
        arrays = stored_arrays(path)
        names, notes = _chosen(path, arrays, options)
        array = arrays[names[0]]
        _check_size(path, array.shape)
        bias = arrays[names[1]].read() if len(names) > 1 else None
        weight = array.read()
        check_finite({names[0] or "the matrix": weight} | ({} if bias is None else {names[1]: bias}))
        transposed, why = _orientation(path, weight, None if bias is None else len(bias), options)
        sha256 = sha256_of(path)
        num_bytes = path.stat().st_size
    if why is not None:
        notes.append(why)
    if transposed:
        weight = weight.T.contiguous()
    if bias is not None and len(bias) != len(weight):
        raise SourceError(
            f"{path}: {names[1]} has {counted(len(bias), 'value')}, and there are "
            f"{counted(len(weight), 'class', 'classes')}.",
            hint="Name the matrix alone (--key) to leave the bias out.",
        )
    return Matrix(
        name=path.name,
        weight=weight,
        bias=bias,
        labels=_labels(path, options.labels, len(weight)),
        sha256=sha256,
        num_bytes=num_bytes,
        stored_bytes=sum(arrays[name].num_bytes for name in names),
        keys=names,
        transposed=transposed,
        notes=tuple(notes),
    )


def unit_sides(weight: Tensor) -> tuple[bool, bool]:
    """Check whether all rows, and all columns, of a matrix have length 1, as text embeddings have."""
    rows, squares = True, torch.zeros(weight.shape[1])
    for part in weight.split(max(1, _AT_ONCE // weight.shape[1])):
        square = part.square()
        rows = rows and bool(((square.sum(dim=1).sqrt() - 1).abs() < _UNIT).all())
        squares += square.sum(dim=0)
    return rows, bool(((squares.sqrt() - 1).abs() < _UNIT).all())


def class_mean(weight: Tensor, *, directions: bool) -> Tensor:
    """Compute the mean over classes of the class vectors, or of their directions: float32 [N]."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for part in weight.split(max(1, _AT_ONCE // weight.shape[1])):
        total += (torch.nn.functional.normalize(part, dim=1) if directions else part).sum(dim=0, dtype=torch.float64)
    return (total / len(weight)).float()


def _matrices(arrays: Mapping[str, StoredArray]) -> list[str]:
    return [name for name, array in arrays.items() if array.is_float and len(array.shape) == 2 and min(array.shape) > 0]


def _chosen(path: Path, arrays: Mapping[str, StoredArray], options: MatrixOptions) -> tuple[tuple[str, ...], list[str]]:
    """Choose the matrix and its bias, and say what is left out.

    Raises:
        SourceError: There is no such tensor, or no matrix.
        UsageError: Several could be meant, or one that is not named could change the answers.
    """
    matrices = _matrices(arrays)
    if options.keys:
        names = _named(path, arrays, options.keys)
    elif len(matrices) == 1:
        names = (matrices[0], *_bias_of(matrices[0], arrays))
    elif matrices:
        raise UsageError(
            f"{path} holds {len(matrices)} matrices: {shorten(_described(arrays, matrices))}.",
            hint=f"Name one of them: --key {matrices[0]}",
        )
    else:
        raise SourceError(
            f"{path} holds no matrix of floating-point numbers: "
            f"{shorten(_described(arrays, list(arrays))) or 'nothing'}.",
            hint="A classifier is a matrix of one row per class, in float16, bfloat16, float32 or float64.",
        )
    beside = [name for name in arrays if name not in names]
    if not options.keys:
        _refuse_beside(path, arrays, names, beside, options)
    shown = shorten(_described(arrays, beside))
    return names, [f"{path.name}: left out {shown}."] if beside else []


def _named(path: Path, arrays: Mapping[str, StoredArray], keys: Sequence[str]) -> tuple[str, ...]:
    resolved = [
        next((name for name in (key, f"{key}.weight", f"{key}/kernel") if name in arrays), None) for key in keys
    ]
    for key, name in zip(keys, resolved, strict=True):
        if name is None:
            raise SourceError(
                f"{path} has no tensor {key!r}.", hint=f"It has {shorten(_described(arrays, list(arrays)))}."
            )
    found = [name for name in resolved if name is not None]
    matrices = [name for name in found if name in _matrices(arrays)]
    vectors = [name for name in found if arrays[name].is_float and len(arrays[name].shape) == 1]
    if len(matrices) != 1 or len(vectors) > 1 or len(matrices) + len(vectors) != len(found):
        raise UsageError(
            f"--key names a matrix and perhaps a bias, got {', '.join(_described(arrays, found))}.",
            hint="For example: --key head.weight --key head.bias",
        )
    return (matrices[0], *(vectors or (_bias_of(matrices[0], arrays) if len(keys) == 1 else ())))


def _bias_of(name: str, arrays: Mapping[str, StoredArray]) -> tuple[str, ...]:
    """Find the bias beside a matrix: head.bias beside head.weight, or a lone "bias" with the length of a side."""
    for word, other in _MATRIX_WORDS.items():
        if name == word or name.endswith((f".{word}", f"/{word}")):
            beside = name.removesuffix(word) + other
            if beside in arrays and _is_bias(arrays[beside], arrays[name]):
                return (beside,)
    lone = [
        other
        for other, array in arrays.items()
        if other.replace("/", ".").rpartition(".")[2] in _LAST_WORDS and _is_bias(array, arrays[name])
    ]
    return tuple(lone) if len(lone) == 1 and len(_matrices(arrays)) == 1 else ()


def _is_bias(array: StoredArray, matrix: StoredArray) -> bool:
    return array.is_float and len(array.shape) == 1 and array.shape[0] in matrix.shape


def _refuse_beside(
    path: Path, arrays: Mapping[str, StoredArray], names: Sequence[str], beside: Sequence[str], options: MatrixOptions
) -> None:
    """Refuse to leave out in silence what could change the answers: a scale, or a vector with an entry per class."""
    only = f"--key {names[0]}" if names[0] else ""
    for name in beside:
        array = arrays[name]
        if not array.is_float:
            continue
        if array.shape in ((), (1,)) and "scale" in name and options.logit_scale is None:
            stored = float(array.read().reshape(()))
            value = torch.tensor(stored).exp() if stored < 10 else torch.tensor(stored)  # CLIP stores the logarithm
            raise UsageError(
                f"{path} holds {name} = {stored:g} beside the matrix, so its logits are cosines times a scale.",
                hint=f"Take it: --logit-scale {float(value):g}. Or leave it out: {only}",
            )
        if _is_bias(array, arrays[names[0]]):
            raise UsageError(
                f"{path} holds {name} {list(array.shape)} beside the matrix, and it is not clear what that is.",
                hint=f"If it is the bias: {only} --key {name}. If it does not matter: {only}",
            )


def _described(arrays: Mapping[str, StoredArray], names: Sequence[str]) -> list[str]:
    return [f"{name or 'an array'} {list(arrays[name].shape)}" for name in names]


def _check_size(path: Path, shape: tuple[int, ...]) -> None:
    large, small = max(shape), min(shape)
    if large > MAX_CLASSES or small > MAX_FEATURES or large * small > MAX_SIGNS:
        raise SourceError(
            f"{path} holds a matrix of {shape[0]:,} x {shape[1]:,}; fixify takes up to {MAX_CLASSES:,} classes and "
            f"{MAX_FEATURES:,} features."
        )


def _orientation(path: Path, weight: Tensor, num_biases: int | None, options: MatrixOptions) -> tuple[bool, str | None]:
    """Decide whether a stored matrix is N x C instead of C x N, and say why unless that was said.

    Raises:
        SourceError: Neither fits the labels, the bias and the widths.
        UsageError: Both could be meant.
    """
    if options.rows is not None:
        return options.rows == "features", None
    first, second = weight.shape
    num_labels = None if options.labels in (None, "imagenet") else len(read_class_map(Path(str(options.labels))))
    known = {"labels": num_labels, "biases": num_biases}

    def fits(classes: int, features: int) -> bool:
        return all(size in (None, classes) for size in known.values()) and (
            not options.widths or features in options.widths
        )

    as_classes, as_features = fits(first, second), fits(second, first)
    if as_classes != as_features:
        return as_features, f"{path.name}: read as N x C, {second} classes." if as_features else None
    if not as_classes:
        facts = [f"{size} {name}" for name, size in known.items() if size is not None]
        facts += [f"features of {options.widths_in_words}"] if options.widths else []
        raise SourceError(f"{path} holds a matrix of {first} x {second}, which does not fit {', nor '.join(facts)}.")
    unit_rows, unit_columns = unit_sides(weight)
    if unit_rows != unit_columns:
        return unit_columns, f"{path.name}: read as N x C, its columns have length 1." if unit_columns else None
    could_be_width = first % _WIDTH_STEP == 0 and first <= _LARGEST_WIDTH
    if not could_be_width or (known["labels"] is not None and first != second):
        return False, None
    raise UsageError(
        f"{path} holds a matrix of {first} x {second}: that is {first} classes of {second} features, or {first} "
        f"features of {second} classes (N x C, as Keras stores it).",
        hint="Say which: --rows classes, or --rows features. A file of --labels decides it too.",
    )


def _labels(path: Path, given: str | None, num_classes: int) -> list[str] | None:
    if given is not None:
        return read_labels(given, num_classes)
    if path.suffix != ".safetensors":
        return None
    try:
        lists = find_label_lists(read_metadata(path))[0]
    except FormatError:
        return None
    return next((names for names in lists.values() if len(names) == num_classes), None)
