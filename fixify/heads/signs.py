"""Products with stored signs and levels, 1 to 4 bits each, that never hold all of them as numbers.

They are unpacked a chunk at a time, by a table with an entry per byte, into memory that stays in the cache. Where the
processor multiplies 8-bit integers fast, features are written as digits of 8 bits. Their products with signs are exact,
together as exact as a product in float32, and take about half of its time. For few samples unpacking would take longer
than multiplying; signs are then held as bytes if they are few, and four to a byte if they are more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
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
_CACHED_QUADS = 1 << 19
"""Bytes of four signs that stay there beside some of their bits."""
_FEWEST_SIGNS = 8
"""Signs per class from which integers are used. `torch._int_mm` is wrong where rows are of length 1 (torch 2.14)."""
SMALL_TABLE = 1 << 19
"""Signs or levels that are held as numbers, 2 MB in float32: where integers are not fast, and in a new head."""
_BYTE_SIGNS = 1 << 21
"""Signs up to which each is held as a byte, 2 MB, for few samples; more take 2 bits each."""
_BYTE_LEVELS = 1 << 24
"""Levels up to which each is held as a byte, 16 MB. A table that unpacks them takes longer at batch 1: 11 to 25 ms for
8,210 x 1,024, where `nn.Linear` takes 3.1."""
_WORDS_UP_TO = 4
"""Samples up to which features are written as the bytes of one integer: 4 digits, but few operations."""
_CACHED_SUMS = 1 << 17
"""Sums of products with digits that stay in the second-level cache while they are added."""
_FLOATS_BELOW = 384
_SIGNS_PER_SAMPLE = 12
"""Signs per class below which float32 is faster than digits, from one sample for so many signs: adding the products of
digits costs more than the products then."""
_LEAST = 1e-28
"""What a sample's largest feature is taken to be at least: 2^30 times smaller numbers overflow nowhere."""
NUM_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
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


def pack_quads(packed: Tensor, num_signs: int) -> Tensor:
    """Write signs four to a byte for `IntegerProduct`.

    Args:
        packed: uint8 [C, ceil(d / 8)]; bit 1 is a minus sign.
        num_signs: d.

    Returns:
        int8 [C, h], h = ceil(d / 4): the bit of sign i, twice that of sign h + i, four times that of 2h + i, and so on.
    """
    c, quarter = len(packed), -(-num_signs // 4)
    quads = torch.zeros(c, quarter, dtype=torch.int8)
    step = max(1, _CHUNK // num_signs)
    for start in range(0, c, step):
        bits = np.unpackbits(packed[start : start + step].numpy(), axis=1, count=num_signs).view(np.int8)
        target = quads[start : start + step]
        for i in range(4):
            part = torch.from_numpy(bits[:, i * quarter : (i + 1) * quarter])
            target[:, : part.shape[1]].add_(part, alpha=1 << i)
    return quads


Rows = Callable[[int, int], Tensor]
"""Gives the signs or levels of the classes from one to before another as 8-bit integers, [k, width]."""


def _table_rows(packed: Tensor, kind: Levels) -> Rows:
    """Unpack signs or levels by a table, eight to a byte of a plane.

    Ternary digits are unpacked to eight integers per byte, of which the last three are 0: copying whole words is faster
    than copying five bytes, by more than the products with zeros cost. `_fill_up` makes room for them in the features.
    """
    planes = max(1, kind.num_planes)
    used = packed.shape[1] // planes  # bytes of a class in one plane
    table = _byte_table(torch.int8, packed.device) if kind.num_planes else _trit_table(torch.int8, packed.device, 8)
    words = table.view(torch.int64)[:, 0]

    def rows(start: int, stop: int) -> Tensor:
        part = packed[start:stop]
        numbers = torch.empty(len(part), used, dtype=torch.int32)
        found = torch.empty(min(planes, 2), numbers.numel(), dtype=torch.int64)  # the sum so far, and the next plane
        levels = found[0].view(torch.int8)
        for i, plane in enumerate(part.tensor_split(planes, dim=1)):
            torch.index_select(words, 0, numbers.copy_(plane).view(-1), out=found[min(i, 1)])
            if i:
                torch.add(found[1].view(torch.int8), levels, alpha=2, out=levels)
        return levels.view(len(part), 8 * used)

    return rows


def _part(rows: Tensor, start: int, stop: int) -> Tensor:
    return rows[start:stop]


def _fill_up(z: Tensor, num_bytes: int, kind: Levels) -> Tensor:
    """Insert zeros into features [M, d] where the rows of `_table_rows` have unused places."""
    if kind.num_planes:
        return F.pad(z, (0, 8 * num_bytes // kind.num_planes - z.shape[1]))
    grouped = F.pad(z, (0, TRITS_PER_BYTE * num_bytes - z.shape[1])).view(len(z), num_bytes, TRITS_PER_BYTE)
    return F.pad(grouped, (0, 8 - TRITS_PER_BYTE)).view(len(z), 8 * num_bytes)


def _product_of_digits(z: Tensor, rows: Rows, num_classes: int, num_digits: int) -> Tensor:
    """Multiply features [M, width] in integers of 8 bits: [M, C].

    Features are sums of digits between -127 and 127, `scale * sum_i 254^-i digit_i`.
    """
    m, width = z.shape
    scale = z.abs().amax(dim=-1, keepdim=True).clamp_min_(_LEAST).div_(127)
    rest, digit = z / scale, torch.empty_like(z)
    digits = torch.empty(num_digits, m, width, dtype=torch.int8)
    for each in digits:
        each.copy_(torch.round(rest, out=digit))
        rest.sub_(digit).mul_(254)
    columns = digits.view(-1, width)
    product = torch.empty(m, num_classes)
    step = max(32, min(_CACHED_SUMS // len(columns), _CACHED_BYTES // width))
    for start in range(0, num_classes, step):
        stop = min(start + step, num_classes)
        total, *others = torch._int_mm(columns, rows(start, stop).t()).view(num_digits, m, -1).float()
        for i, part in enumerate(others, 1):
            total.add_(part, alpha=254.0**-i)
        torch.mul(total, scale, out=product[:, start:stop])
    return product


def _product_of_floats(z: Tensor, rows: Rows, num_classes: int) -> Tensor:
    """Multiply features [M, width] with rows that become numbers, a chunk at a time: [M, C]."""
    product = z.new_empty(len(z), num_classes)
    for start in range(0, num_classes, step := max(1, _CACHED_FLOATS // z.shape[1])):
        stop = min(start + step, num_classes)
        torch.mm(z, rows(start, stop).to(z.dtype).t(), out=product[:, start:stop])
    return product


def _as_words(z: Tensor) -> Tensor:
    """Round numbers below 2^30, with 0x808080 added to them, to integers that are the sums of their bytes, all signed.

    Adding 128 to each of the three lower bytes and subtracting it again, without a carry, makes them signed: the carry
    is then in the byte above.
    """
    return z.to(torch.int32).bitwise_xor_(_carries()[1])


@lru_cache(maxsize=1)
def _carries() -> tuple[Tensor, Tensor]:
    """Build 0x808080 as a number and as an integer; operations with tensors start sooner than those with numbers."""
    with torch.inference_mode(False):
        return torch.tensor(float(0x808080)), torch.tensor(0x808080, dtype=torch.int32)


@lru_cache(maxsize=1)
def _byte_weights() -> Tensor:
    """Build the value of each byte of `_as_words`, in the order of memory and in units of 2^30."""
    order = 1 if sys.byteorder == "little" else -1
    with torch.inference_mode(False):
        return torch.tensor([2.0**-30, 2.0**-22, 2.0**-14, 2.0**-6][::order])


@lru_cache(maxsize=1)
def _quad_steps() -> Tensor:
    """Build the matrix [4, 4] that the four quarters of the features are multiplied with for `_sums_of_quads`.

    With bits a of the first quarter of the signs, b of the second and so on, p_2 = a + 2b, p_3 = p_2 + 4c and
    p_4 = p_3 + 8d are a quad without its upper bits. The sum over minus signs of features w, x, y, z is
    `(w - x / 2) @ a + (x / 2 - y / 4) @ p_2 + (y / 4 - z / 8) @ p_3 + (z / 8) @ p_4`.
    """
    with torch.inference_mode(False):
        of_own = torch.tensor([1.0, 0.5, 0.25, 0.125])
        return torch.diag(of_own) - torch.diag(of_own[1:], diagonal=1)


def _sums_of_quads(quads: Tensor, digits: Tensor) -> Tensor:
    """Multiply quads int8 [C, h], and them without their upper bits, with digits int8 [4, h, k]: int32 [C, k]."""
    c, quarter = quads.shape
    step = min(c, max(32, _CACHED_QUADS // quarter))
    lower = torch.empty(step, quarter, dtype=torch.int8)
    sums = torch.empty(c, digits.shape[2], dtype=torch.int32)
    for start in range(0, c, step):
        part = quads[start : start + step]
        total = torch._int_mm(part, digits[3], out=sums[start : start + step])
        for i in range(3):
            some = torch.bitwise_and(part, (2 << i) - 1, out=lower[: len(part)])
            total.add_(torch._int_mm(some, digits[i]))
    return sums


class IntegerProduct:
    """The product of features with packed signs or levels in integers of 8 bits, on a processor, without gradients.

    For few samples, features are written as words, whose bytes are multiplied with signs held as bytes or quads. For
    more samples they are written as fewer digits, and signs that are no bytes are unpacked a chunk of classes at a
    time. Samples of few signs are multiplied as numbers.

    Args:
        packed: uint8 [C, kind.num_bytes(d)].
        num_signs: Signs or levels per class, d.
        dtype: Type of the features and of the result, one of `NUM_DIGITS`.
        kind: The levels.
    """

    def __init__(self, packed: Tensor, num_signs: int, dtype: torch.dtype, kind: Levels = SIGNS) -> None:
        self._packed, self._num_signs, self._dtype, self._kind = packed, num_signs, dtype, kind
        held = len(packed) * num_signs <= (_BYTE_SIGNS if kind is SIGNS else _BYTE_LEVELS)
        self._bytes = unpack_levels(packed, num_signs, torch.int8, kind) if held else None
        self._quads = pack_quads(packed, num_signs) if self._bytes is None and kind is SIGNS else None

    def __call__(self, z: Tensor) -> Tensor:
        """Multiply features [M, d]: [M, C]."""
        z, m = z.float(), len(z)
        if not m:
            product = z.new_empty(0, len(self._packed))
        elif m <= _WORDS_UP_TO and self.knows_one:
            product = self._product_of_words(z)
        else:
            product = self._product_of_many(z)
        return product.to(self._dtype)

    @property
    def knows_one(self) -> bool:
        """Whether `of_one` can be used."""
        return self._bytes is not None or self._quads is not None

    def of_one(self, z: Tensor) -> tuple[Tensor, float]:
        """Multiply the features of one sample, float32 [d]: scores [C], and the factor that they lack."""
        parts = self._parts(z.view(1, -1))
        largest = max(parts.abs().max().item(), _LEAST)
        words = _as_words(torch.add(_carries()[0], parts, alpha=2.0**30 / largest))
        products = self._products(words)[:, 0]
        if self._quads is None:
            return products, largest
        return products.sub_(z.sum().item() / (2 * largest)), -2 * largest

    def _product_of_words(self, z: Tensor) -> Tensor:
        parts = self._parts(z)
        largest = parts.abs().amax(dim=(0, 2)).clamp_min_(_LEAST)
        words = _as_words(torch.addcmul(_carries()[0], parts, (2.0**30 / largest).unsqueeze(-1)))
        products = self._products(words).t()
        product = torch.mul(products, largest.unsqueeze(-1), out=torch.empty(products.shape))
        return product if self._quads is None else torch.sub(z.sum(dim=1, keepdim=True), product, alpha=2)

    def _parts(self, z: Tensor) -> Tensor:
        """Bring features [M, d] into the order of bytes [1, M, d] or of quads [4, M, d / 4]."""
        if self._quads is None:
            return z.unsqueeze(0)
        m, quarter = len(z), self._quads.shape[1]
        if z.shape[1] < 4 * quarter:
            z = F.pad(z, (0, 4 * quarter - z.shape[1]))
        quarters = z.view(m, 4, quarter) if m == 1 else z.view(m, 4, quarter).transpose(0, 1).contiguous()
        return torch.mm(_quad_steps(), quarters.view(4, -1)).view(4, m, quarter)

    def _products(self, words: Tensor) -> Tensor:
        """Multiply words [1 or 4, M, k] with signs as bytes or the bits of quads: float32 [C, M] in units of 2^30."""
        parts, m, k = words.shape
        if m > 1:
            words = words.transpose(1, 2).contiguous()
        digits = words.view(-1).view(torch.int8).view(parts, k, 4 * m)
        if self._quads is not None:
            sums = _sums_of_quads(self._quads, digits)
        elif self._bytes is not None:
            sums = torch._int_mm(self._bytes, digits[0])
        return torch.mv(sums.float().view(-1, 4), _byte_weights()).view(-1, m)

    def _product_of_many(self, z: Tensor) -> Tensor:
        (m, d), c = z.shape, len(self._packed)
        if self._bytes is not None:
            rows: Rows = partial(_part, self._bytes)
        else:
            z, rows = _fill_up(z, self._packed.shape[1], self._kind), _table_rows(self._packed, self._kind)
        is_narrow = self._dtype == torch.float32 and d < min(_FLOATS_BELOW, _SIGNS_PER_SAMPLE * m)
        return _product_of_floats(z, rows, c) if is_narrow else _product_of_digits(z, rows, c, NUM_DIGITS[self._dtype])


def packed_product(
    packed: Tensor, num_signs: int, dtype: torch.dtype, kind: Levels = SIGNS
) -> Callable[[Tensor], Tensor]:
    """Build the fastest product with packed signs or levels, from [M, d] to [M, C], without gradients.

    It is an `IntegerProduct` where the processor multiplies such integers fast. Elsewhere few signs are held as
    numbers, and more are unpacked a chunk at a time. Measured with `fixify bench head`.

    Args:
        packed: uint8 [C, kind.num_bytes(d)].
        num_signs: Signs or levels per class, d.
        dtype: Type of the features and of the result.
        kind: The levels.
    """
    is_possible = packed.device.type == "cpu" and dtype in NUM_DIGITS and num_signs >= _FEWEST_SIGNS
    if is_possible and has_fast_integers():
        return IntegerProduct(packed, num_signs, dtype, kind)
    if len(packed) * num_signs <= SMALL_TABLE:
        return partial(F.linear, weight=unpack_levels(packed, num_signs, dtype, kind))
    return lambda z: chunked_product(z, packed, kind)


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
