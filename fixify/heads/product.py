"""The product of features with all codes, without building the codebook where that is avoidable.

H_N = H_a (x) H_b makes it two small products: with x reshaped to X [a, b], H_N x = H_a X H_b^T (the standard identity
for Kronecker products). That costs N (a + b) multiplications for N scores instead of N^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import HeadSpecError
from fixify.heads.base_kind import SpecFields
from fixify.heads.codes import Codes, FeatureRows, HadamardRows, Rotation, SignRows, StoredLevels, StoredSigns
from fixify.heads.constructions import Construction, elementary, order_of
from fixify.heads.kernels import CompiledStep, HeadTables, is_compiled
from fixify.heads.kinds import default_codes, kind_of
from fixify.heads.levels import SIGNS, Levels
from fixify.heads.matrices import block_signs, rows
from fixify.heads.projection import Projection
from fixify.heads.signs import SMALL_TABLE, PackedLinear, unpack_levels

_TABLES = ("left", "right", "rotation_signs", "directions", "block_signs", "index", "class_signs", "table", "packed")
_TRAINING_TABLE = 1 << 24
"""Stored signs or levels held as numbers in training (64 MB in float32); more are unpacked in chunks."""


def balanced_split(construction: Construction) -> tuple[Construction, Construction]:
    """Cut the Kronecker product in two so that the orders a and b of the parts have the smallest sum a + b."""
    factors = elementary(construction)
    cuts = [(factors[:i], factors[i:]) for i in range(len(factors) + 1)]
    return min(cuts, key=lambda cut: order_of(cut[0]) + order_of(cut[1]))


def factor_tables(construction: Construction) -> tuple[np.ndarray, np.ndarray]:
    """Build the two parts of `balanced_split` as matrices: float32 of +-1, [a, a] and [b, b]."""
    left, right = (rows(part, np.arange(order_of(part))).astype(np.float32) for part in balanced_split(construction))
    return left, right


def fast_product(z: Tensor, left: Tensor | None, right: Tensor) -> Tensor:
    """Multiply with H = left (x) right: [..., N] -> [..., N].

    Args:
        z: [..., N].
        left: [a, a]; None stands for [[1]].
        right: [b, b], a b = N.

    >>> fast_product(torch.tensor([1.0, 2.0]), None, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    tensor([ 3., -1.])
    """
    b = right.shape[0]
    a = z.shape[-1] // b
    scores = F.linear(z.reshape(*z.shape[:-1], a, b), right)
    if left is not None:
        scores = torch.matmul(left, scores)
    return scores.reshape(z.shape)


def prefers_dense(num_classes: int, num_blocks: int, left: int, right: int) -> bool:
    """Check whether one product with all codes is faster than the fast product with so many blocks.

    Multiplications per feature: C against K (a + b), where small products run at about half the rate of a large one.
    Below 2^16 entries the whole codebook costs less than starting a second product.

    Args:
        num_classes: C.
        num_blocks: Number of blocks K that the codes use.
        left: Order a.
        right: Order b.
    """
    return num_classes < 2 * num_blocks * (left + right) or num_classes * left * right < 1 << 16


@dataclass(frozen=True)
class CodeBlock:
    """Some of the classes of a product, whose scores can be computed without those of the others.

    Attributes:
        classes: The classes: a slice, or class numbers int64 [k] where they are not neighbours.
        num_classes: k.
        first_block: First Hadamard block of their codes.
        end_block: The Hadamard block after the last; 0 where codes are not Hadamard rows.
    """

    classes: slice | Tensor
    num_classes: int
    first_block: int = 0
    end_block: int = 0


@dataclass(frozen=True)
class OneBlock:
    """Codes that are rows of one Hadamard matrix, or their negatives.

    Attributes:
        left: H_a, [a, a].
        right: H_b, [b, b].
        signs: What the features are multiplied with first, +-1 [N]; None for all plus.
        num_classes: C.
        columns: Scores of the classes among the N, if they are neighbours in class order.
        picked: Else the score of each class, int64 [C], and what it is multiplied with, +-1 [C].
    """

    left: Tensor
    right: Tensor
    signs: Tensor | None
    num_classes: int
    columns: slice
    picked: tuple[Tensor, Tensor] | None

    @cached_property
    def step(self) -> CompiledStep | None:
        """Forward and backward pass in compiled code, for float32 on a processor; None for others, or without it."""
        if self.left.device.type != "cpu" or self.left.dtype != torch.float32 or not is_compiled():
            return None
        index, rows = self.picked or (None, None)
        tables = HeadTables(
            len(self.left) * len(self.right),
            self.num_classes,
            normalize=True,
            left=self.left,
            right=self.right,
            signs=self.signs,
            index=index,
            rows=rows,
            first=self.columns.start,
        )
        return CompiledStep(tables)


class CodeProduct(nn.Module):
    """The product Q z / prescale for the codebook Q [C, N] of a head: [..., N] -> [..., C].

    All its tables are rebuilt from the spec (and the stored codes), so none is in a state dict. Signs are held as
    +-2^-k, k near log2 sqrt(N): exact in every floating-point type, and no half-precision sum overflows. The rest of
    the factor 1/sqrt(N), `prescale`, is left to the caller, who multiplies by a scale anyway.

    Args:
        spec: A resolved head spec.
        stored: What the head stores in `codes`, if anything (see `HeadSpec.resolve`); None until it is known.
        projection: The projection that the head stores, if any; None until it is known.
        device: Device of the tables; None: torch's default.
        dtype: Floating-point type of the tables; None: torch's default.
    """

    left: Tensor | None  # H_a; None if a = 1
    right: Tensor | None  # H_b
    rotation_signs: Tensor | None  # [N]; if features are rotated by the Hadamard matrix before the table
    directions: Tensor | None  # [d, N]; what features are projected to before the table: a row per stored sign
    block_signs: Tensor | None  # [K, N]; None if only block 0 is used, whose signs are all plus
    index: Tensor | None  # position of each class among the K N scores, [C]; None if codes are in class order
    class_signs: Tensor | None  # sign of each class, [C]
    table: Tensor | None  # the codebook [C, N], or stored signs or levels [C, d] while they are held as numbers
    packed: Tensor | None  # stored signs or levels, uint8 [C, bytes]

    _one_block: tuple[int, OneBlock] | None = None  # what `one_block` returned, and the revision it is of

    revision: int = 0
    """Counts the changes of the tables, for what is prepared from them."""

    def __init__(
        self,
        spec: SpecFields,
        stored: np.ndarray | None = None,
        projection: Projection | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.stored: np.ndarray | None = None
        self.projection: Projection | None = None
        self.is_ready = False
        self.prescale = 1.0
        self.num_kept = spec.num_features
        self.levels: Levels = SIGNS
        self.unit = 1.0  # what stored signs or levels are multiplied with in a table
        self._holds_numbers: bool | None = None  # None until `hold_numbers`
        for name in _TABLES:
            self.register_buffer(name, None, persistent=False)
        self.rebuild(stored, projection, device=device, dtype=dtype)

    def rebuild(
        self,
        stored: np.ndarray | None,
        projection: Projection | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Fill the tables again.

        Args:
            stored: Code indices of a matched head, signs or levels of a binary one; None if not known yet: `forward`
                will raise.
            projection: The projection that the head stores, if any.
            device: Device of the tables; None: torch's default.
            dtype: Floating-point type of the tables; None: torch's default.
        """
        self.revision += 1
        kind = kind_of(self.spec)
        self.stored, self.projection = stored, projection
        self.is_ready = stored is not None or kind.stored_codes(self.spec) is None
        tables: dict[str, np.ndarray] = {}
        if self.is_ready:
            codes = kind.codes(self.spec, stored, projection)
            tables, self.prescale = _tables(codes)
            self.num_kept = codes.num_signs if isinstance(codes, StoredSigns) else self.spec.num_features
            self.levels = codes.levels if isinstance(codes, StoredLevels) else SIGNS
            self.unit = float(_unit(self.num_kept * self.levels.mean_square)[0])
        device = torch.get_default_device() if device is None else torch.device(device)
        for name in _TABLES:
            table = None
            if name in tables:
                wanted = {"index": torch.int64, "packed": torch.uint8}.get(name, dtype or torch.get_default_dtype())
                # `asarray` would share memory with the cached, read-only codes
                table = torch.tensor(tables[name], device="cpu" if device.type == "meta" else device, dtype=wanted)
                table = table.to(device)
            setattr(self, name, table)
        self._fill_table(dtype or torch.get_default_dtype())

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is rebuilt on demand out of copies and pickles."""
        return {**self.__dict__, "_one_block": None}

    def hold_numbers(self, hold: bool, dtype: torch.dtype) -> None:
        """Hold packed signs as numbers too, for training, unless they are too many; or drop these numbers again.

        Args:
            hold: Whether to hold them.
            dtype: Their floating-point type.
        """
        self._holds_numbers = hold
        self._fill_table(dtype)

    def _fill_table(self, dtype: torch.dtype) -> None:
        if self.packed is None or self.packed.is_meta:
            return
        size = len(self.packed) * self.num_kept
        hold = size <= SMALL_TABLE if self._holds_numbers is None else self._holds_numbers
        if hold == (self.table is not None):
            return
        self.revision += 1
        if not hold:
            self.table = None
            self.prescale *= self.unit
        elif size <= _TRAINING_TABLE:
            self.table = unpack_levels(self.packed, self.num_kept, dtype, self.levels) * self.unit
            self.prescale /= self.unit

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeProduct:
        tables = [table for table in self._buffers.values() if table is not None]
        self.revision += 1
        was_meta = any(table.is_meta for table in tables)
        super()._apply(fn, recurse)
        tables = [table for table in self._buffers.values() if table is not None]
        if was_meta and not any(table.is_meta for table in tables):  # `to_empty` gives memory without the values
            dtype = next((table.dtype for table in tables if table.is_floating_point()), None)
            self.rebuild(self.stored, self.projection, device=tables[0].device, dtype=dtype)
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Multiply features with all codes.

        Args:
            z: [..., N].

        Returns:
            [..., C], in the type that `F.linear` would return.

        Raises:
            HeadSpecError: The stored codes have not been loaded.
        """
        self._refuse_unknown_codes()
        z = self.rotate(z)
        if self.table is not None:
            return F.linear(z, self.table)
        if self.packed is not None:
            product: Tensor = PackedLinear.apply(z, self.packed, self.num_kept, self.levels)
            return product
        if self.right is None:
            return _as_linear(z)[..., : self.spec.num_classes]
        return self._hadamard_scores(z, self.right)

    def rotate(self, z: Tensor) -> Tensor:
        """Compute the coordinates in which the codes are held: of rotated or projected features, or z itself.

        Args:
            z: [..., N].

        Returns:
            [..., d]; d = N for all but binary heads of fewer bits.
        """
        if self.directions is not None:
            return F.linear(z, self.directions)
        if self.rotation_signs is None or self.right is None:
            return z
        return fast_product(z * self.rotation_signs.to(z.dtype), self.left, self.right)[..., : self.num_kept]

    def blocks(self, size: int) -> list[CodeBlock]:
        """Divide the classes into blocks for `block_product`; together they hold each class once.

        Args:
            size: Most scores per sample that a block may compute; a Hadamard block of N rows is never divided.
        """
        self._refuse_unknown_codes()
        n, c = self.spec.num_features, self.spec.num_classes
        if self.right is None or self.table is not None or self.packed is not None:
            starts = range(0, c, max(1, size))
            return [CodeBlock(slice(i, min(i + size, c)), min(i + size, c) - i) for i in starts]
        k = 1 if self.block_signs is None else self.block_signs.shape[0]
        if self.index is None:
            at_once = max(1, size // (2 * n))
            parts = [(i, min(i + at_once, k)) for i in range(0, k, at_once)]
            ends = [(first * 2 * n, min(end * 2 * n, c)) for first, end in parts]
            return [CodeBlock(slice(*end), end[1] - end[0], *part) for end, part in zip(ends, parts, strict=True)]
        at_once = max(1, size // n)
        order = torch.argsort(self.index // n, stable=True)
        counts = torch.bincount(self.index // (n * at_once), minlength=-(-k // at_once)).tolist()
        return [
            CodeBlock(classes, count, i * at_once, min((i + 1) * at_once, k))
            for i, (classes, count) in enumerate(zip(order.split(counts), counts, strict=True))
            if count
        ]

    def block_product(self, z: Tensor, block: CodeBlock) -> Tensor:
        """Multiply features with the codes of some classes.

        Args:
            z: [..., d], as `rotate` returns it.
            block: One of `blocks`.

        Returns:
            [..., k], in the order of `block.classes`; differentiable.
        """
        if self.table is not None:
            return F.linear(z, self.table[block.classes])
        if self.packed is not None:
            product: Tensor = PackedLinear.apply(z, self.packed[block.classes], self.num_kept, self.levels)
            return product
        if self.right is None:
            return _as_linear(z)[..., block.classes]
        signs = self._signs_of(block)
        if self.index is None or self.class_signs is None:
            return self._scores_in_order(z, self.right, signs, block.num_classes)
        n = self.spec.num_features
        index = self.index[block.classes] - block.first_block * n
        return _picked(_block_scores(z, self.left, self.right, signs), index, self.class_signs[block.classes])

    @property
    def first_row(self) -> int:
        """The row of the first class where codes are rows of one matrix in order; see `default_codes`."""
        return 1 if self.spec.num_classes < self.spec.num_features else 0

    def one_block(self) -> OneBlock | None:
        """Return the codes if they are rows of one Hadamard matrix in two parts; else None."""
        n, c, signs = self.spec.num_features, self.spec.num_classes, self.block_signs
        if self.left is None or self.right is None or self.table is not None or self.packed is not None or c > n:
            return None
        if signs is not None and len(signs) > 1:
            return None
        known = self._one_block
        if known is not None and known[0] == self.revision and known[1].left is self.left:
            return known[1]
        first = self.first_row
        signs = None if signs is None else signs[0]
        picked = None if self.index is None or self.class_signs is None else (self.index, self.class_signs)
        block = OneBlock(self.left, self.right, signs, c, slice(first, first + c), picked)
        self._one_block = self.revision, block
        return block

    @property
    def has_pairs(self) -> bool:
        """Whether the codes are the rows of Hadamard blocks and then their negatives, in class order."""
        uses_rows = self.right is not None and self.table is None and self.packed is None and self.index is None
        return uses_rows and self.spec.num_classes > self.spec.num_features

    def pair_scores(self, z: Tensor, block: CodeBlock, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply features with the rows of a block, and not with their negatives, without gradients.

        Args:
            z: [B, N], in the type of the tables.
            block: One of `blocks` of a product that `has_pairs`: k Hadamard blocks.
            memory: At least 2 B k N numbers that are overwritten; new memory for each block would cost page faults.

        Returns:
            The scores and a tensor of undefined numbers, both [B, k, N] in `memory`.
        """
        right, signs = _given(self.right), self._signs_of(block)
        shape = (len(z), block.end_block - block.first_block, z.shape[1])
        found, spare = (part.view(shape) for part in memory[: 2 * math.prod(shape)].chunk(2))
        b = right.shape[0]
        if signs is None:
            spare.copy_(z.unsqueeze(1))
        else:
            torch.mul(z.unsqueeze(1), signs, out=spare)
        torch.mm(spare.view(-1, b), right.t(), out=found.view(-1, b))
        if self.left is None:
            return found, spare
        _multiply_left(self.left, found, spare, b)
        return spare, found

    def pair_gradient(self, grad: Tensor, spare: Tensor, block: CodeBlock) -> Tensor:
        """Compute the gradient of `pair_scores`: [B, k, N] to [B, N].

        Args:
            grad: [B, k, N]; overwritten.
            spare: [B, k, N]; overwritten.
            block: One of `blocks` of a product that `has_pairs`.
        """
        right, signs = _given(self.right), self._signs_of(block)
        b = right.shape[0]
        if self.left is not None:
            _multiply_left(self.left.t(), grad, spare, b)
            grad, spare = spare, grad
        torch.mm(grad.view(-1, b), right, out=spare.view(-1, b))
        return spare[:, 0] if signs is None else spare.mul_(signs).sum(dim=1)

    def _signs_of(self, block: CodeBlock) -> Tensor | None:
        return None if self.block_signs is None else self.block_signs[block.first_block : block.end_block]

    def _refuse_unknown_codes(self) -> None:
        if not self.is_ready:
            raise HeadSpecError("The codes of this fixed classifier are stored, and have not been loaded yet.")

    def _hadamard_scores(self, z: Tensor, right: Tensor) -> Tensor:
        """Multiply with the blocks of a Hadamard matrix and pick the score of each class."""
        if self.index is not None and self.class_signs is not None:
            return _picked(_block_scores(z, self.left, right, self.block_signs), self.index, self.class_signs)
        return self._scores_in_order(z, right, self.block_signs, self.spec.num_classes)

    def _scores_in_order(self, z: Tensor, right: Tensor, block_signs: Tensor | None, count: int) -> Tensor:
        """Compute the scores of the first `count` codes of some blocks, in the order of code indices."""
        scores = _block_scores(z, self.left, right, block_signs)
        if self.spec.num_classes > self.spec.num_features:
            return torch.cat((scores, -scores), dim=-1).flatten(-2)[..., :count]
        first = self.first_row
        return scores.flatten(-2)[..., first : first + count]


def _multiply_left(left: Tensor, z: Tensor, out: Tensor, b: int) -> None:
    """Multiply each [a, b] of z with `left` [a, a]."""
    a = len(left)
    z = z.view(-1, a, b)
    torch.bmm(left.expand(len(z), a, a), z, out=out.view(-1, a, b))


def _given(table: Tensor | None) -> Tensor:
    if table is None:
        raise HeadSpecError("This product has no Hadamard matrix.")
    return table


def _block_scores(z: Tensor, left: Tensor | None, right: Tensor, block_signs: Tensor | None) -> Tensor:
    """Multiply with blocks of a Hadamard matrix: [..., N] to [..., K, N]; K = 1 without block signs."""
    if block_signs is None:
        return fast_product(z, left, right).unsqueeze(-2)
    return fast_product(z.unsqueeze(-2) * block_signs.to(z.dtype), left, right)


def _picked(scores: Tensor, index: Tensor, class_signs: Tensor) -> Tensor:
    """Pick the score of each class from [..., K, N] and apply its sign: [..., C]."""
    return scores.flatten(-2).index_select(-1, index) * class_signs.to(scores.dtype)


def _tables(codes: Codes) -> tuple[dict[str, np.ndarray], float]:
    """Build the tables for some codes, by name, and the prescale."""
    match codes:
        case HadamardRows():
            return _hadamard_tables(codes)
        case SignRows():
            unit, prescale = _unit(codes.shape[1])
            return {"table": codes.signs() * unit}, prescale
        case StoredSigns():
            return _stored_tables(codes.packed, codes.num_signs, codes.rotation)
        case StoredLevels():
            return _stored_tables(codes.packed, codes.num_features * codes.levels.mean_square, codes.rotation)
        case FeatureRows():
            return {}, 1.0
        case _:
            return {"table": codes.table()}, 1.0


def _unit(length: float) -> tuple[np.float32, float]:
    """Split 1/sqrt(length) into a power of two, at which signs or levels are held, and the rest, the prescale."""
    exponent = round(np.log2(length) / 2)
    return np.float32(2.0**-exponent), 2.0**exponent / length**0.5


def _hadamard_tables(codes: HadamardRows) -> tuple[dict[str, np.ndarray], float]:
    c, n = codes.shape
    unit, prescale = _unit(n)
    blocks, block = np.unique(codes.block, return_inverse=True)
    left, right = factor_tables(codes.construction)
    if prefers_dense(c, len(blocks), len(left), len(right)):
        return {"table": codes.signs() * unit}, prescale
    tables = _pair(left, right, unit)
    if blocks.any():
        tables["block_signs"] = block_signs(codes.construction, codes.seed, blocks)
    if not np.array_equal(codes.indices, default_codes(n, c)):
        tables["index"] = block * n + codes.row
        tables["class_signs"] = 1.0 - 2.0 * codes.is_negative.astype(np.float32)
    return tables, prescale


def _stored_tables(
    packed: np.ndarray, squares: float, rotation: Rotation | Projection | None
) -> tuple[dict[str, np.ndarray], float]:
    """Build the tables of stored signs or levels.

    Args:
        packed: As they are stored, uint8 [C, bytes].
        squares: What the square root of divides numbers to make codes: d, for signs.
        rotation: Applied to the features first, if any.
    """
    tables, prescale = {"packed": packed}, squares**-0.5
    if isinstance(rotation, Projection):
        return tables | {"directions": np.ascontiguousarray(rotation.basis().T)}, prescale
    if rotation is not None:
        unit, rotation_prescale = _unit(order_of(rotation.construction))
        prescale *= rotation_prescale
        tables |= _pair(*factor_tables(rotation.construction), unit)
        tables["rotation_signs"] = rotation.signs()
    return tables, prescale


def _pair(left: np.ndarray, right: np.ndarray, unit: np.float32) -> dict[str, np.ndarray]:
    tables = {"right": right * unit}
    if len(left) > 1:
        tables["left"] = left
    return tables


def _as_linear(z: Tensor) -> Tensor:
    """Cast as autocast would for `F.linear`, so that heads without a product return the same type as others."""
    kind = z.device.type
    if z.is_meta or not torch.is_autocast_enabled(kind) or z.dtype == torch.float64:  # autocast leaves these alone
        return z
    return z.to(torch.get_autocast_dtype(kind))
