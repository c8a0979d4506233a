"""A head in compiled code: one call for a batch, on a processor, in float32.

`kernels.c` is compiled when fixify is installed, once per instruction set (`.ci/compile_kernels.py`). Where no compiler
was at hand, `library` returns None and `fixify.heads.prepared` composes the same of torch's operations.

Scores of stored signs are sums of tabulated sums: of every four features all 16 signed sums are computed, and the signs
of a class for these four features, half a byte, pick one of them. That takes a quarter of the additions of a dense
product and a thirty-second of its memory. From 17 samples on, a table entry holds the sums of up to 64 samples. For
fewer, a vector holds the table of one sample, from which the half bytes of 16 classes pick at once.
"""

from __future__ import annotations

import copy
import ctypes
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fixify.heads.normalisation import NORM_EPSILON

_INTERFACE = 1
"""Number of the interface, the same in kernels.c; a library of another one is not used."""
_LANES = 16
"""Numbers in a vector, the same in kernels.c."""
_LEAST_WORK = 40_000
"""Estimated clock cycles from which torch's threads share the work: about 15 us."""


class _Head(ctypes.Structure):
    """Mirrors `head_t` in kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_features", "num_classes")),
        *((name, ctypes.c_void_p) for name in ("center", "inverse_std", "left", "right", "signs")),
        *((name, ctypes.c_int64) for name in ("a", "b", "width", "num_blocks", "num_rows")),
        ("packed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_signs", "row_bytes", "planes")),
        *((name, ctypes.c_void_p) for name in ("index", "rows", "bias")),
        ("first", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "least_norm")),
        ("plane_weights", ctypes.c_float * 4),
        ("normalize", ctypes.c_int32),
    )


def instruction_set() -> str:
    """Name the instruction set that torch uses, of those that kernels.c is compiled for."""
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "base")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Load the compiled library for this processor; None if it was not compiled, or, with a warning, is another one."""
    file = Path(__file__).parent / f"kernels-{instruction_set()}.bin"
    if not file.is_file():
        return None
    found = ctypes.CDLL(str(file))
    if found.fixify_interface() != _INTERFACE or found.fixify_size_of_head() != ctypes.sizeof(_Head):
        warnings.warn(f"{file} is not of this version of fixify, and is not used. Install fixify again.", stacklevel=2)
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    found.fixify_logits.argtypes = (address, address, number, address, number, address)
    found.fixify_gradients.argtypes = (*[address] * 5, number, address, address, number, address)
    return found


def is_compiled() -> bool:
    """Check whether the compiled code is there for this processor."""
    return library() is not None


@lru_cache(maxsize=1)
def _parallel() -> int | None:
    """Find the function by which torch's own threads do some work; None if they are not those of GNU OpenMP."""
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value


@dataclass(frozen=True)
class HeadTables:
    """What the compiled forward pass of a head is made of; tensors are float32 on a processor unless said otherwise.

    Attributes:
        num_features: N.
        num_classes: C.
        scale: What scores are multiplied with.
        normalize: Whether features are divided by their norm.
        center: Mean of the features, [N].
        inverse_std: Their reciprocal std, [N].
        left: H_a, [a, a]: the features are multiplied with H_a (x) H_b. Without `packed` it is always there.
        right: H_b, [b, b]; with `left`, or neither.
        signs: What they are multiplied with first, for each block, [K, N].
        packed: Stored signs, uint8 [C, bytes], plane by plane; None: the scores are those of the rows of the blocks.
        plane_weights: What the signs of each plane are worth.
        num_signs: Stored signs per class and plane.
        index: Score of each class among the K N scores, int64 [C]; None: in order.
        rows: What the score of each class is multiplied with, [C].
        bias: [C].
        first: Score of the first class.
    """

    num_features: int
    num_classes: int
    scale: float = 1.0
    normalize: bool = False
    center: Tensor | None = None
    inverse_std: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    signs: Tensor | None = None
    packed: Tensor | None = None
    plane_weights: tuple[float, ...] = ()
    num_signs: int = 0
    index: Tensor | None = None
    rows: Tensor | None = None
    bias: Tensor | None = None
    first: int = 0


class CompiledHead:
    """The function from features, float32 [..., N] on a processor, to logits [M, C].

    Args:
        tables: What it is made of.

    Raises:
        RuntimeError: The code was not compiled; see `is_compiled`.
    """

    def __init__(self, tables: HeadTables) -> None:
        self._library, self._parallel = _compiled(), _parallel()
        self._n, self._c = tables.num_features, tables.num_classes
        packed = None if tables.packed is None else _interleaved(tables.packed)
        right, width, a, b = None, 0, 0, 0
        if tables.left is not None and tables.right is not None:
            a, b = len(tables.left), len(tables.right)
            right = _padded(tables.right.t())
            width = right.shape[1]
        index = None if tables.index is None else tables.index // b * width + tables.index % b
        self._held = {
            name: None if table is None else table.contiguous()
            for name, table in {
                "center": tables.center,
                "inverse_std": tables.inverse_std,
                "left": tables.left,
                "right": right,
                "signs": tables.signs,
                "packed": packed,
                "index": index,
                "rows": tables.rows,
                "bias": tables.bias,
            }.items()
        }
        planes = len(tables.plane_weights)
        self._head = _Head(
            **{name: None if table is None else table.data_ptr() for name, table in self._held.items()},
            num_features=self._n,
            num_classes=self._c,
            a=a,
            b=b,
            width=width,
            num_blocks=1 if tables.signs is None else tables.signs.numel() // self._n,
            num_rows=a if packed is None or not b else -(-tables.num_signs // b),
            num_signs=tables.num_signs,
            row_bytes=0 if packed is None else packed.shape[1] // planes,
            planes=planes,
            plane_weights=tables.plane_weights,
            first=tables.first,
            scale=tables.scale,
            least_norm=NORM_EPSILON,
            normalize=tables.normalize,
        )
        blocks, depth = self._head.num_blocks, 8 * self._head.row_bytes * planes
        self._work = blocks * self._n * (a + b) / 24 + self._c * (depth / 64 + 0.5)  # clock cycles per sample
        self._address = ctypes.addressof(self._head)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute logits."""
        if not x.is_contiguous():
            x = x.contiguous()
        m, c = x.numel() // self._n, self._c
        logits = torch.empty((m, c), dtype=torch.float32, device="cpu")
        if self._library.fixify_logits(
            self._address, x.data_ptr(), m, logits.data_ptr(), self._threads(m), self._parallel
        ):
            raise MemoryError
        return logits

    def _threads(self, num_samples: int) -> int:
        return torch.get_num_threads() if self._work * num_samples >= _LEAST_WORK and self._parallel else 1


class CompiledStep(CompiledHead):
    """A `CompiledHead` of one Hadamard block for training: scale, bias and statistics are those of each step.

    Args:
        tables: What it is made of; without the former, and without stored signs.
    """

    def __init__(self, tables: HeadTables) -> None:
        super().__init__(tables)
        left, right = tables.left, tables.right
        if left is None or right is None:
            raise RuntimeError("a step needs the two parts of a Hadamard matrix")
        self._left_t, self._right = left.t().contiguous(), _padded(right)

    def at(self, scale: float, bias: Tensor | None, center: Tensor | None, inverse_std: Tensor | None) -> CompiledStep:
        """Return the step for a scale, a bias [C], and the statistics of features [N]."""
        step = copy.copy(self)
        given = {"bias": bias, "center": center, "inverse_std": inverse_std}
        step._held = {**self._held, **given}
        step._head = _Head.from_buffer_copy(self._head)
        step._head.scale = scale
        for name, table in given.items():
            setattr(step._head, name, None if table is None else table.data_ptr())
        step._address = ctypes.addressof(step._head)
        return step

    def gradients(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of features and scale.

        Args:
            x: float32 [M, N], contiguous.
            grad: Gradient of the logits, float32 [M, C], contiguous.

        Returns:
            [M, N], and the share of each sample in that of the scale, [M].
        """
        m = len(x)
        of_x, of_scale = torch.empty_like(x), torch.empty(m, dtype=torch.float32, device="cpu")
        tables = (self._address, self._left_t.data_ptr(), self._right.data_ptr())
        arrays = (x.data_ptr(), grad.data_ptr(), m, of_x.data_ptr(), of_scale.data_ptr())
        if self._library.fixify_gradients(*tables, *arrays, self._threads(m), self._parallel):
            raise MemoryError
        return of_x, of_scale


def _compiled() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("fixify's kernels were not compiled.")
    return found


def _padded(matrix: Tensor) -> Tensor:
    """Fill the rows of a matrix up with zeros to whole vectors."""
    return F.pad(matrix, (0, -matrix.shape[1] % _LANES)).contiguous()


def _interleaved(packed: Tensor) -> Tensor:
    """Bring the bytes of 16 classes side by side: [C, bytes] to [C / 16, bytes, 16]."""
    full = F.pad(packed, (0, 0, 0, -len(packed) % _LANES))
    return full.view(-1, _LANES, packed.shape[1]).transpose(1, 2).contiguous()
