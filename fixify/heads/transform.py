"""The product of features with all codes, without the codebook: H_N = H_a (x) H_b makes it two small products.

With x reshaped to X [a, b], H_N x = H_a X H_b^T (the standard identity for Kronecker products), which costs
N (a + b) multiplications for N scores instead of N^2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import HeadSpecError
from fixify.heads import binary, dense
from fixify.heads.blocks import block_bits, construction_of
from fixify.heads.codebooks import checked_codes, sign_codes
from fixify.heads.matrices import Construction, elementary, order_of, rows
from fixify.heads.packed import PackedLinear
from fixify.heads.spec import HeadSpec

_TABLES = ("left", "right", "block_signs", "index", "class_signs", "table", "packed")
_MAX_UNPACKED = 1 << 24
"""Signs of a binary head that are held as numbers (64 MB in float32); more are held packed and unpacked in chunks."""


def balanced_split(construction: Construction) -> tuple[Construction, Construction]:
    """Cut the Kronecker product in two so that the orders a and b of the parts have the smallest sum a + b."""
    factors = elementary(construction)
    cuts = [(factors[:i], factors[i:]) for i in range(len(factors) + 1)]
    return min(cuts, key=lambda cut: order_of(cut[0]) + order_of(cut[1]))


def factor_tables(construction: Construction) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of `balanced_split` as matrices: float32 of +-1, [a, a] and [b, b]."""
    left, right = (rows(part, np.arange(order_of(part))).astype(np.float32) for part in balanced_split(construction))
    return left, right


def fast_product(z: Tensor, left: Tensor | None, right: Tensor) -> Tensor:
    """H z for H = left (x) right: [..., n] -> [..., n]. `left` None stands for [[1]]."""
    b = right.shape[0]
    a = z.shape[-1] // b
    scores = F.linear(z.reshape(*z.shape[:-1], a, b), right)
    if left is not None:
        scores = torch.matmul(left, scores)
    return scores.reshape(z.shape)


def prefers_dense(num_classes: int, num_blocks: int, left: int, right: int) -> bool:
    """Whether one product with all codes is faster than the fast product with so many blocks.

    Multiplications per feature: C against K (a + b), where small products run at about half the rate of a large one;
    and below 2^16 entries the whole codebook costs less than starting a second product.
    """
    return num_classes < 2 * num_blocks * (left + right) or num_classes * left * right < 1 << 16


class CodeProduct(nn.Module):
    """Q z / prescale for the codebook Q [C, N] of a head: [..., N] -> [..., C].

    Everything it holds is rebuilt from the spec (and the codes, if matched), so nothing of it is in a state dict. Signs
    are held as +-2^-k, k near log2 sqrt(N): exact in every floating-point type, and no half-precision sum overflows.
    The rest of the factor 1/sqrt(N), `prescale`, is left to the caller, who multiplies by a scale anyway.

    Args:
        spec: A resolved head spec.
        codes: What the head stores, if anything (see `HeadSpec.resolve`); None until it is known.
    """

    left: Tensor | None  # H_a; None if a = 1
    right: Tensor | None  # H_b
    block_signs: Tensor | None  # [K, N]; None if only the plain block 0 is used
    index: Tensor | None  # matched: position of each class among the K N scores, [C]
    class_signs: Tensor | None  # matched: sign of each class, [C]
    table: Tensor | None  # the codebook [C, N] instead of all these; of a binary head the signs [C, d]
    packed: Tensor | None  # a binary head's signs, uint8 [C, ceil(d / 8)], where they are too many for a table

    def __init__(
        self,
        spec: HeadSpec,
        codes: np.ndarray | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.ready = False
        self.prescale = 1.0
        for name in _TABLES:
            self.register_buffer(name, None, persistent=False)
        self.rebuild(codes, device=device, dtype=dtype)

    def rebuild(
        self,
        codes: np.ndarray | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Fill the tables again, on a device and in a floating-point type.

        Args:
            codes: Code indices of a matched head, signs of a binary one; None: not known yet, `forward` will refuse.
        """
        self.codes = codes
        self.ready = codes is not None or not self.spec.stores_codes
        spec = self.spec
        tables: dict[str, np.ndarray] = {}
        if spec.kind == "hadamard":
            exponent = round(np.log2(spec.num_features) / 2)
            self.prescale = 2.0**exponent / spec.num_features**0.5
            if self.ready:
                tables = self._hadamard_tables(np.float32(2.0**-exponent))
        elif spec.kind == "binary":
            tables = self._binary_tables() if self.ready else {}
        else:
            tables = {"table": dense.codes(spec.kind, spec.num_features, spec.num_classes, spec.seed)}
        device = torch.get_default_device() if device is None else torch.device(device)
        for name in _TABLES:
            table = None
            if name in tables:
                kind = {"index": torch.int64, "packed": torch.uint8}.get(name, dtype or torch.get_default_dtype())
                # asarray would share memory with the cached, read-only codes
                table = torch.tensor(tables[name], device="cpu" if device.type == "meta" else device, dtype=kind)
                table = table.to(device)
            setattr(self, name, table)

    def _hadamard_tables(self, unit: np.float32) -> dict[str, np.ndarray]:
        spec, n = self.spec, self.spec.num_features
        if spec.truncated:
            return {"table": sign_codes(spec) * unit}
        codes = checked_codes(spec, self.codes)
        blocks, block = np.unique(codes // (2 * n), return_inverse=True)
        left, right = factor_tables(construction_of(spec))
        if prefers_dense(spec.num_classes, len(blocks), len(left), len(right)):
            return {"table": sign_codes(spec, self.codes) * unit}
        tables = {"right": right * unit}
        if len(left) > 1:
            tables["left"] = left
        if blocks.any():
            tables["block_signs"] = 1.0 - 2.0 * block_bits(spec, blocks).astype(np.float32)
        if spec.matched:
            tables["index"] = block * n + codes % n
            tables["class_signs"] = 1.0 - 2.0 * (codes // n % 2).astype(np.float32)
        return tables

    def _binary_tables(self) -> dict[str, np.ndarray]:
        spec, n, d = self.spec, self.spec.num_features, self.spec.bits_per_class or self.spec.num_features
        exponent = round(np.log2(d) / 2)
        self.prescale = 2.0**exponent / d**0.5
        unit = np.float32(2.0**-exponent)
        if spec.num_classes * d > _MAX_UNPACKED:
            tables = {"packed": binary.checked_signs(spec, self.codes)}
            self.prescale *= unit  # the packed signs are +-1
        else:
            tables = {"table": binary.sign_rows(spec, self.codes) * unit}
        if spec.needs_matrix:
            exponent = round(np.log2(n) / 2)
            self.prescale *= 2.0**exponent / n**0.5
            left, right = factor_tables(construction_of(spec))
            tables |= {"right": right * np.float32(2.0**-exponent), "block_signs": binary.rotation_signs(spec)}
            if len(left) > 1:
                tables["left"] = left
        return tables

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeProduct:
        tables = [table for table in self._buffers.values() if table is not None]
        was_meta = any(table.is_meta for table in tables)
        super()._apply(fn, recurse)
        tables = [table for table in self._buffers.values() if table is not None]
        if was_meta and not any(table.is_meta for table in tables):  # `to_empty`: memory without the values
            dtype = next((table.dtype for table in tables if table.is_floating_point()), None)
            self.rebuild(self.codes, device=tables[0].device, dtype=dtype)
        return self

    def forward(self, z: Tensor) -> Tensor:
        if not self.ready:
            raise HeadSpecError("The codes of this fixed classifier are stored, and have not been loaded yet.")
        if self.spec.kind == "binary" and self.right is not None and self.block_signs is not None:
            z = fast_product(z * self.block_signs.to(z.dtype), self.left, self.right)[..., : self.spec.bits_per_class]
        if self.packed is not None:
            product: Tensor = PackedLinear.apply(z, self.packed)
            return product
        if self.table is not None:
            return F.linear(z, self.table)
        n, c = self.spec.num_features, self.spec.num_classes
        k = 1 if self.block_signs is None else self.block_signs.shape[0]
        lead = z.shape[:-1]
        if self.block_signs is not None:
            z = z.unsqueeze(-2) * self.block_signs.to(z.dtype)
        right: Tensor = self.right  # type: ignore[assignment]  # ready, and no table: these are there
        scores = fast_product(z, self.left, right)  # [..., N] or [..., K, N]
        if self.index is not None and self.class_signs is not None:
            return scores.reshape(*lead, k * n).index_select(-1, self.index) * self.class_signs.to(scores.dtype)
        if c > n:
            scores = scores.reshape(*lead, k, 1, n)
            return torch.cat((scores, -scores), dim=-2).reshape(*lead, k * 2 * n)[..., :c]
        first = 1 if c < n else 0
        return scores[..., first : first + c]
