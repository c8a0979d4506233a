"""Products with stored signs and levels, 1 to 4 bits each, that never hold all of them as numbers.

They are unpacked a chunk at a time, by a table with an entry per byte, into memory that stays in the cache. Training,
devices such as CUDA, and float64 use these products; `fixify.heads.kernels` has the one for evaluation on a processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fixify.heads.codes import unpacked_levels
from fixify.heads.levels import SIGNS, TRIT_POWERS, TRITS_PER_BYTE, Levels

_CHUNK = 1 << 22
"""Packed signs that are unpacked at once: 16 MB in float32."""
_CACHED_FLOATS = 1 << 17
"""Unpacked signs that stay in the second-level cache beside the products."""
SMALL_TABLE = 1 << 19
"""Signs or levels that are held as numbers, 2 MB in float32: in a new head, and where products are not compiled."""


@lru_cache(maxsize=8)
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build the signs of every byte: [256, 8] of +1 and -1."""
    with torch.inference_mode(False):
        shifts = torch.arange(7, -1, -1, device=device)
        return (1 - 2 * ((torch.arange(256, device=device)[:, None] >> shifts) & 1)).to(dtype)


def unpack_signs(packed: Tensor, num_signs: int, dtype: torch.dtype) -> Tensor:
    """Unpack signs to numbers.

    Args:
        packed: uint8 [k, ceil(d / 8)]; bit 1 is a minus sign, highest bit first.
        num_signs: d.
        dtype: Type of the result.

    Returns:
        [k, d] of +1 and -1.

    >>> unpack_signs(torch.tensor([[0b01000000]], dtype=torch.uint8), 3, torch.float32)
    tensor([[ 1., -1.,  1.]])
    """
    if torch.compiler.is_compiling() or packed.is_meta:  # a cached table is no part of a graph
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        bits = (packed[:, :, None] >> shifts) & 1
        return 1 - 2 * bits.flatten(1)[:, :num_signs].to(dtype)
    return F.embedding(packed.int(), _byte_table(dtype, packed.device)).flatten(1)[:, :num_signs]


@lru_cache(maxsize=8)
def _trit_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build the ternary digits of every byte, the first the lowest: [256, 5]."""
    with torch.inference_mode(False):
        return _trits(torch.arange(256, device=device)).to(dtype)


def _trits(packed: Tensor) -> Tensor:
    """Split bytes, in a type that divides, into ternary digits -1, 0 and 1: [...] to [..., 5]."""
    powers = torch.tensor(TRIT_POWERS, device=packed.device)
    return packed[..., None].div(powers, rounding_mode="floor") % 3 - 1


def pack_levels(levels: np.ndarray, kind: Levels) -> np.ndarray:
    """Pack levels into bytes.

    Args:
        levels: Integers [k, d], of `kind.values`.
        kind: Which levels they are.

    Returns:
        uint8 [k, kind.num_bytes(d)]. Unused bits are 0, and so are unused ternary digits (level + 1).

    >>> from fixify.heads.levels import LEVELS
    >>> pack_levels(np.array([[-1, 0, 1]]), LEVELS[1.58]).tolist()  # 0 + 1 * 3 + 2 * 9
    [[21]]
    """
    if not kind.num_planes:
        digits = np.zeros((len(levels), kind.num_bytes(levels.shape[1]) * TRITS_PER_BYTE), dtype=np.uint8)
        digits[:, : levels.shape[1]] = levels + 1
        grouped = digits.reshape(len(levels), -1, TRITS_PER_BYTE)
        packed: np.ndarray = (grouped * np.array(TRIT_POWERS, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
        return packed
    ones = (kind.largest - levels.astype(np.int16)) // 2  # bit i of it is the minus sign of weight 2^i
    planes = [np.packbits((ones >> i & 1).astype(bool), axis=1) for i in reversed(range(kind.num_planes))]
    return np.concatenate(planes, axis=1)


def unpack_levels(packed: Tensor, count: int, dtype: torch.dtype, kind: Levels = SIGNS) -> Tensor:
    """Unpack levels to numbers.

    Args:
        packed: uint8 [k, kind.num_bytes(count)], of `pack_levels`.
        count: Levels per row, d.
        dtype: Type of the result; int8 holds all levels.
        kind: Which levels they are.

    Returns:
        [k, d] of `kind.values`.

    >>> from fixify.heads.levels import LEVELS
    >>> unpack_levels(torch.tensor([[0b01000000, 0b11000000]], dtype=torch.uint8), 3, torch.int8, LEVELS[2])
    tensor([[ 1, -3,  3]], dtype=torch.int8)
    """
    if kind.num_planes == 1:
        return unpack_signs(packed, count, dtype)
    if not kind.num_planes:
        if torch.compiler.is_compiling() or packed.is_meta:  # a cached table is no part of a graph
            return _trits(packed.int()).flatten(1)[:, :count].to(dtype)
        return F.embedding(packed.int(), _trit_table(dtype, packed.device)).flatten(1)[:, :count]
    total, *rest = packed.tensor_split(kind.num_planes, dim=1)
    levels = unpack_signs(total, count, dtype)
    for plane in rest:
        levels = 2 * levels + unpack_signs(plane, count, dtype)
    return levels


class SignPlanes(NamedTuple):
    """Levels as weighted sums of signs.

    Attributes:
        packed: uint8 [C, planes x ceil(d / 8)]; bit 1 is a minus sign.
        weights: What the signs of each plane are worth.
    """

    packed: np.ndarray
    weights: tuple[float, ...]


def sign_planes(packed: np.ndarray, count: int, kind: Levels) -> SignPlanes:
    """Write levels as weighted sums of signs; -1, 0 and 1 are halves of sums of two.

    Args:
        packed: uint8 [C, kind.num_bytes(count)].
        count: Levels per row.
        kind: Which levels they are.

    >>> from fixify.heads.levels import LEVELS
    >>> sign_planes(np.array([[21]], dtype=np.uint8), 3, LEVELS[1.58])  # of -1, 0 and 1: -- , +- and ++
    SignPlanes(packed=array([[128, 192]], dtype=uint8), weights=(0.5, 0.5))
    """
    if kind.num_planes:
        return SignPlanes(packed, tuple(2.0**i for i in reversed(range(kind.num_planes))))
    step, parts = max(1, _CHUNK // count), []
    for start in range(0, len(packed), step):
        trits = unpacked_levels(packed[start : start + step], count, kind)
        parts.append(np.concatenate((np.packbits(trits < 0, axis=1), np.packbits(trits < 1, axis=1)), axis=1))
    return SignPlanes(np.concatenate(parts), (0.5, 0.5))


class PackedLinear(torch.autograd.Function):
    """The product `z @ levels.T` of z [..., d] with packed signs or levels, uint8 [C, bytes], and d: [..., C].

    A chunk of classes is unpacked at a time, forward and backward; the whole codebook never exists as numbers.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, packed: Tensor, num_signs: int, kind: Levels = SIGNS) -> Tensor:
        """Multiply, a chunk of classes at a time."""
        ctx.save_for_backward(packed)
        ctx.num_signs, ctx.dtype, ctx.kind = num_signs, z.dtype, kind
        parts = packed.split(max(1, _CHUNK // num_signs))
        return torch.cat([F.linear(z, unpack_levels(part, num_signs, z.dtype, kind)) for part in parts], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute the gradient of z, accumulated in float32; the levels have none."""
        (packed,), (grad,) = ctx.saved_tensors, grads
        step = max(1, _CHUNK // ctx.num_signs)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(*grad.shape[:-1], ctx.num_signs, dtype=wide, device=grad.device)
        for part, of_part in zip(packed.split(step), grad.split(step, dim=-1), strict=True):
            total += of_part @ unpack_levels(part, ctx.num_signs, grad.dtype, ctx.kind)
        return total.to(ctx.dtype), None, None, None


def packed_product(
    packed: Tensor, num_signs: int, dtype: torch.dtype, kind: Levels = SIGNS
) -> Callable[[Tensor], Tensor]:
    """Build the product with packed signs or levels, from [M, d] to [M, C], of torch's operations, without gradients.

    Few of them are held as numbers, and more are unpacked a chunk at a time.

    Args:
        packed: uint8 [C, kind.num_bytes(d)].
        num_signs: Signs or levels per class, d.
        dtype: Type of the features and of the result.
        kind: The levels.
    """
    if len(packed) * num_signs <= SMALL_TABLE:
        return partial(F.linear, weight=unpack_levels(packed, num_signs, dtype, kind))
    step = max(1, (_CACHED_FLOATS if packed.device.type == "cpu" else _CHUNK) // num_signs)

    def product(z: Tensor) -> Tensor:
        found = z.new_empty(len(z), len(packed))
        for start in range(0, len(packed), step):
            codes = unpack_levels(packed[start : start + step], num_signs, dtype, kind)
            found[:, start : start + step] = F.linear(z, codes)
        return found

    return product
