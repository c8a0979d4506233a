"""Products with stored signs and levels, 1 to 4 bits each, that never hold all of them as numbers.

They are unpacked a chunk at a time, by a table with an entry per byte, into memory that stays in the cache. Where the
processor multiplies 8-bit integers fast, features are written as digits of 8 bits. Their products with signs are exact,
together as exact as a product in float32, and take about half of its time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fixify.heads.levels import SIGNS, TRIT_POWERS, TRITS_PER_BYTE, Levels

_CHUNK = 1 << 22
"""Packed signs that are unpacked at once: 16 MB in float32."""
_CACHED_FLOATS = 1 << 17
_CACHED_BYTES = 1 << 20
"""Unpacked signs that stay in the second-level cache beside the products, as floating-point numbers and integers."""
_FEWEST_SIGNS = 8
"""Signs per class from which integers are used. `torch._int_mm` is wrong where rows are of length 1 (torch 2.14)."""
_BYTE_SIGNS = 1 << 22
"""Signs up to which each is held as a byte, 4 MB."""
_BYTE_LEVELS = 1 << 24
"""Levels up to which each is held as a byte, 16 MB. A table that unpacks them takes longer at batch 1: 11 to 25 ms for
8,210 x 1,024, where `nn.Linear` takes 3.1."""
_BYTES_UP_TO = 4
"""Samples up to which `byte_product` writes features as the bytes of one integer: 4 digits, but few operations."""
_FEWEST_BYTES = 1 << 18
"""Signs or levels from which bytes are faster than numbers for so few samples: 1 MB of numbers."""
_CACHED_SUMS = 1 << 17
"""Sums of products with digits that stay in the second-level cache while they are added."""
_FLOATS_FROM = 16
_FLOATS_BELOW = 640
"""Samples from which, and signs per class below which, the digits of float32 take longer than numbers: adding their
products costs more than the products then. Signs held as bytes are then converted a chunk at a time."""
_PAIRS_UP_TO = 16
"""Samples up to which `pair_product` is faster than `table_product`."""
_LARGEST_OF_PAIRS = 42
"""Largest digit of `pair_product`: 2x - y of two digits must fit into 8 bits."""
PAIR_DIGITS = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}
TABLE_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
"""Digits per feature. Their error, at most 2^-24 of a sample's largest feature in float32, 2^-16 in float16 and 2^-13
in bfloat16, is below the rounding of each type."""


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
def _trit_table(dtype: torch.dtype, device: torch.device, width: int = TRITS_PER_BYTE) -> Tensor:
    """Build the ternary digits of every byte, the first the lowest: [256, width], zeros after the fifth."""
    with torch.inference_mode(False):
        table = torch.zeros(256, width, dtype=dtype, device=device)
        table[:, :TRITS_PER_BYTE] = _trits(torch.arange(256, device=device))
        return table


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


class PackedLinear(torch.autograd.Function):
    """The product `z @ levels.T` of z [..., d] with packed signs or levels, uint8 [C, bytes]: [..., C].

    A chunk of classes is unpacked at a time, forward and backward; the whole codebook never exists as numbers.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, packed: Tensor, kind: Levels = SIGNS) -> Tensor:
        """Multiply, a chunk of classes at a time."""
        ctx.save_for_backward(packed)
        ctx.num_signs, ctx.dtype, ctx.kind = z.shape[-1], z.dtype, kind
        parts = packed.split(max(1, _CHUNK // z.shape[-1]))
        return torch.cat([F.linear(z, unpack_levels(part, z.shape[-1], z.dtype, kind)) for part in parts], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient of z, accumulated in float32; the levels have none."""
        (packed,), (grad,) = ctx.saved_tensors, grads
        step = max(1, _CHUNK // ctx.num_signs)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(*grad.shape[:-1], ctx.num_signs, dtype=wide, device=grad.device)
        for part, of_part in zip(packed.split(step), grad.split(step, dim=-1), strict=True):
            total += of_part @ unpack_levels(part, ctx.num_signs, grad.dtype, ctx.kind)
        return total.to(ctx.dtype), None, None


def pack_pairs(packed: Tensor, num_signs: int) -> Tensor:
    """Write signs as pairs for `pair_product`, four bits a sign.

    Args:
        packed: uint8 [C, ceil(d / 8)]; bit 1 is a minus sign.
        num_signs: d.

    Returns:
        int8 [C, h], h = ceil(d / 2): the bit of sign i, and twice that of sign h + i.
    """
    c, half = len(packed), -(-num_signs // 2)
    pairs = torch.zeros(c, half, dtype=torch.int8)
    step = max(1, _CHUNK // num_signs)
    for start in range(0, c, step):
        bits = np.unpackbits(packed[start : start + step].numpy(), axis=1, count=num_signs).view(np.int8)
        target = pairs[start : start + step]
        target.copy_(torch.from_numpy(bits[:, :half]))
        target[:, : num_signs - half].add_(torch.from_numpy(bits[:, half:]), alpha=2)
    return pairs


def _digits(z: Tensor, count: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Write numbers as sums of digits between -largest and largest, `z ~ scale * sum_i weights[i] * digits[i]`.

    Returns:
        float32 [count, M, d] of integers, the weights [count], and the scale [M, 1].
    """
    scale = z.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-30).div_(largest)
    rest = z / scale
    digits = torch.empty(count, *z.shape)
    for digit in digits:
        torch.round(rest, out=digit)
        rest.sub_(digit).mul_(2 * largest)
    return digits, (2.0 * largest) ** -torch.arange(count, dtype=torch.float32), scale


def _add_digits(sums: Tensor, weights: Tensor, out: Tensor) -> None:
    """Add the products of digits: int32 [k, count x M] into float32 [M, k]."""
    (m, k), count = out.shape, len(weights)
    if m == 1:
        torch.mv(sums.float(), weights, out=out[0])
        return
    total, *others = sums.float().view(k, count, m).unbind(dim=1)
    for weight, part in zip(weights[1:].tolist(), others, strict=True):
        total.add_(part, alpha=weight)
    out.copy_(total.t())


def pair_product(z: Tensor, pairs: Tensor, num_digits: int) -> Tensor:
    """Multiply with signs held as pairs, in integers and without gradients: for few samples.

    With bits a of the first half of the signs, b of the second, p = a + 2b and features x and y of the two halves,
    twice the sum over minus signs is `2 (x @ a + y @ b) = (2x - y) @ a + y @ p`. So a single operation, `p & 1`,
    unpacks two signs, and both products are of 8-bit integers.

    Args:
        z: float32 [M, d] on the CPU.
        pairs: int8 [C, ceil(d / 2)], of `pack_pairs`.
        num_digits: Digits that a feature is written in; see `PAIR_DIGITS`.

    Returns:
        float32 [M, C].
    """
    (m, d), (c, half) = z.shape, pairs.shape
    digits, weights, scale = _digits(F.pad(z, (0, 2 * half - d)), num_digits, _LARGEST_OF_PAIRS)
    totals = torch.mv(digits.sum(dim=-1).t(), weights)
    first, second = digits[..., :half], digits[..., half:]
    of_first = (2 * first - second).to(torch.int8).view(-1, half).t()
    of_pairs = second.to(torch.int8).view(-1, half).t()
    step = min(c, max(1, _CACHED_BYTES // half))
    bits = torch.empty(step, half, dtype=torch.int8)
    sums, more = torch.empty(2, step, num_digits * m, dtype=torch.int32)
    product = torch.empty(m, c)
    for start in range(0, c, step):
        part = pairs[start : start + step]
        k = len(part)
        torch.bitwise_and(part, 1, out=bits[:k])
        torch._int_mm(bits[:k], of_first, out=sums[:k])
        torch._int_mm(part, of_pairs, out=more[:k])
        _add_digits(sums[:k].add_(more[:k]), weights, product[:, start : start + k])
    return torch.sub(totals[:, None], product, out=product).mul_(scale)


def table_product(z: Tensor, packed: Tensor, num_digits: int, kind: Levels = SIGNS) -> Tensor:
    """Multiply with signs or levels that a table unpacks, in integers and without gradients: for more samples.

    Ternary digits are unpacked to eight integers per byte, of which the last three are 0: copying whole words is faster
    than copying five bytes, by more than the products with zeros cost.

    Args:
        z: float32 [M, d] on the CPU.
        packed: uint8 [C, kind.num_bytes(d)].
        num_digits: Digits that a feature is written in; see `TABLE_DIGITS`.
        kind: The levels.

    Returns:
        float32 [M, C].
    """
    (m, d), (c, num_bytes) = z.shape, packed.shape
    planes = max(1, kind.num_planes)
    used = num_bytes // planes  # bytes of a class in one plane
    if kind.num_planes:
        wide, table = F.pad(z, (0, 8 * used - d)), _byte_table(torch.int8, packed.device)
    else:
        grouped = F.pad(z, (0, TRITS_PER_BYTE * used - d)).view(m, used, TRITS_PER_BYTE)
        wide = F.pad(grouped, (0, 8 - TRITS_PER_BYTE)).view(m, 8 * used)
        table = _trit_table(torch.int8, packed.device, 8)
    digits, weights, scale = _digits(wide, num_digits, 127)
    columns = digits.to(torch.int8).view(-1, 8 * used).t()
    words = table.view(torch.int64)[:, 0]
    step = min(c, max(1, _CACHED_BYTES // (8 * used)))
    numbers = torch.empty(step * used, dtype=torch.int32)
    planes_of = torch.empty(min(planes, 2), step * used, dtype=torch.int64)  # the sum so far, and the next plane
    sums, product = torch.empty(step, num_digits * m, dtype=torch.int32), torch.empty(m, c)
    for start in range(0, c, step):
        part = packed[start : start + step]
        k, size = len(part), len(part) * used
        levels = planes_of[0, :size].view(torch.int8)
        for i, plane in enumerate(part.tensor_split(planes, dim=1)):
            numbers[:size].view(k, used).copy_(plane)
            torch.index_select(words, 0, numbers[:size], out=planes_of[min(i, 1), :size])
            if i:
                torch.add(planes_of[1, :size].view(torch.int8), levels, alpha=2, out=levels)
        torch._int_mm(levels.view(k, -1), columns, out=sums[:k])
        _add_digits(sums[:k], weights, product[:, start : start + k])
    return product.mul_(scale)


def byte_product(z: Tensor, signs: Tensor, num_digits: int) -> Tensor:
    """Multiply with signs or levels held as 8-bit integers, in integers and without gradients: for few of them.

    Args:
        z: float32 [M, d] on the CPU.
        signs: int8 [C, d].
        num_digits: Digits that a feature is written in; see `TABLE_DIGITS`. For few samples they are four.

    Returns:
        float32 [M, C].
    """
    (m, d), c = z.shape, len(signs)
    if m <= _BYTES_UP_TO:
        return _product_of_words(z, signs)
    digits, weights, scale = _digits(z, num_digits, 127)
    digits = digits.to(torch.int8).view(-1, d)
    _, *others = weights.tolist()
    product = torch.empty(m, c)
    for start in range(0, c, step := max(32, _CACHED_SUMS // len(digits))):
        total, *rest = torch._int_mm(digits, signs[start : start + step].t()).view(num_digits, m, -1).float()
        for weight, part in zip(others, rest, strict=True):
            total.add_(part, alpha=weight)
        torch.mul(total, scale, out=product[:, start : start + step])
    return product


def _product_of_words(z: Tensor, signs: Tensor) -> Tensor:
    """Compute `byte_product` with features as integers of 32 bits, whose bytes are the digits.

    Adding 128 to each of the three lower bytes and subtracting it again, without a carry, makes them signed: the carry
    is then in the byte above.
    """
    m, d = z.shape
    largest = torch.linalg.vector_norm(z, torch.inf, dim=-1, keepdim=True).clamp_min_(1e-30)
    words = (z / largest).mul_(2.0**30).to(torch.int32).add_(0x808080).bitwise_xor_(0x808080)
    if m > 1:
        words = words.t().contiguous()
    sums = torch._int_mm(signs, words.view(torch.int8).view(d, 4 * m)).float()
    product = torch.mv(sums.view(-1, 4), _word_weights()).view(-1, m).t()
    return torch.mul(product, largest, out=torch.empty(m, len(signs)))


@lru_cache(maxsize=1)
def _word_weights() -> Tensor:
    """Build the value of each byte of a word, the lowest first, in units of 2^30."""
    order = 1 if sys.byteorder == "little" else -1
    with torch.inference_mode(False):
        return torch.tensor([2.0**-30, 2.0**-22, 2.0**-14, 2.0**-6][::order])


def _product_in_floats(z: Tensor, signs: Tensor) -> Tensor:
    """Multiply with signs or levels held as 8-bit integers, int8 [C, d], which become numbers a chunk at a time."""
    product = z.new_empty(len(z), len(signs))
    for start in range(0, len(signs), step := max(1, _CACHED_FLOATS // z.shape[1])):
        product[:, start : start + step] = F.linear(z, signs[start : start + step].to(z.dtype))
    return product


def packed_product(
    packed: Tensor, num_signs: int, dtype: torch.dtype, kind: Levels = SIGNS
) -> Callable[[Tensor], Tensor]:
    """Build the fastest product with packed signs or levels, from [M, d] to [M, C], without gradients.

    Measured with `fixify bench head`: products of integers, where the processor has them. Up to `_BYTE_SIGNS` signs are
    held as bytes. Few of them per class become numbers for many samples. More signs are held as pairs, 4 bits a sign,
    for few samples; for more samples the table that unpacks them costs less than the second product. Levels are held
    as bytes up to `_BYTE_LEVELS`; a table unpacks more.

    Args:
        packed: uint8 [C, kind.num_bytes(d)].
        num_signs: Signs or levels per class, d.
        dtype: Type of the features and of the result.
        kind: The levels.
    """
    c = len(packed)
    is_possible = packed.device.type == "cpu" and dtype in TABLE_DIGITS and num_signs >= _FEWEST_SIGNS
    if not is_possible or not has_fast_integers():
        return lambda z: chunked_product(z, packed, kind)
    held = c * num_signs <= (_BYTE_SIGNS if kind is SIGNS else _BYTE_LEVELS)
    signs = unpack_levels(packed, num_signs, torch.int8, kind) if held else None
    pairs = pack_pairs(packed, num_signs) if signs is None and kind is SIGNS else None
    is_narrow = dtype == torch.float32 and num_signs < _FLOATS_BELOW

    def multiply(z: Tensor) -> Tensor:
        z = z.float()
        if not len(z):
            product = z.new_empty(0, c)
        elif signs is not None and is_narrow and len(z) >= _FLOATS_FROM:
            product = _product_in_floats(z, signs)
        elif signs is not None:
            product = byte_product(z, signs, TABLE_DIGITS[dtype])
        elif pairs is not None and len(z) <= _PAIRS_UP_TO:
            product = pair_product(z, pairs, PAIR_DIGITS[dtype])
        else:
            product = table_product(z, packed, TABLE_DIGITS[dtype], kind)
        return product.to(dtype)

    return multiply


def table_or_bytes(table: Tensor, packed: Tensor, kind: Levels = SIGNS, *, unit: float) -> Callable[[Tensor], Tensor]:
    """Build the product with signs or levels that are held as numbers anyway, from [M, d] to [M, C], without gradients.

    For few samples, reading the numbers takes longest; so bytes are held beside them where integers are fast.

    Args:
        table: [C, d], levels times `unit`.
        packed: The levels, uint8 [C, kind.num_bytes(d)].
        kind: The levels.
        unit: What levels are multiplied with.
    """
    if table.device.type != "cpu" or table.dtype != torch.float32 or table.numel() < _FEWEST_BYTES:
        return lambda z: F.linear(z, table)
    if table.shape[1] < _FEWEST_SIGNS or not has_fast_integers():
        return lambda z: F.linear(z, table)
    levels = unpack_levels(packed, table.shape[1], torch.int8, kind)

    def multiply(z: Tensor) -> Tensor:
        if 0 < len(z) <= _BYTES_UP_TO:
            return _product_of_words(z, levels).mul_(unit)
        return F.linear(z, table)

    return multiply


def chunked_product(z: Tensor, packed: Tensor, kind: Levels = SIGNS) -> Tensor:
    """Multiply with packed signs or levels that are unpacked to z's type a chunk at a time, without gradients.

    Args:
        z: [M, d].
        packed: uint8 [C, kind.num_bytes(d)].
        kind: The levels.

    Returns:
        [M, C].
    """
    m, d = z.shape
    step = max(1, (_CACHED_FLOATS if z.device.type == "cpu" else _CHUNK) // d)
    product = z.new_empty(m, len(packed))
    for start in range(0, len(packed), step):
        product[:, start : start + step] = F.linear(z, unpack_levels(packed[start : start + step], d, z.dtype, kind))
    return product


@lru_cache(maxsize=1)
def has_fast_integers() -> bool:
    """Check whether torch multiplies 8-bit integers on this processor, fast and exactly.

    `torch._int_mm` is not a documented function, so it is tried on a small product.
    """
    is_supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if not hasattr(torch, "_int_mm") or is_supported is None or not is_supported():
        return False
    left = torch.arange(-120, 120, dtype=torch.int8).view(10, 24)
    right = left.flip(1).contiguous()
    return torch.equal(torch._int_mm(left, right.t()), left.int() @ right.int().t())
