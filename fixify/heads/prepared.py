"""The forward pass of a head in evaluation, with all that does not depend on the input prepared beforehand.

The formula of `fixify.heads.layer.FixedClassifier` takes about 15 small operations, which at batch 1 take ten times as
long as the arithmetic. On a processor all of it is one call of compiled code (`fixify.heads.kernels`). Elsewhere, in
float64, and where that code was not compiled, it is composed of torch's operations: each sample is multiplied first and
divided by its norm afterwards, in the same operation that adds the bias. In half precision it is divided first, since
sums of features that are not normalised overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fixify.heads.base_kind import GAIN_STEPS, SpecFields
from fixify.heads.kernels import CompiledHead, HeadTables, is_compiled
from fixify.heads.normalisation import NORM_EPSILON
from fixify.heads.product import CodeProduct
from fixify.heads.signs import packed_product, sign_planes
from fixify.heads.statistics import floor_std

_SOURCES = ("scale", "bias", "center", "spread", "gains")
_DEVICES = ("cpu", "cuda")
_CACHED_SCORES = 1 << 18
"""Scores of several blocks that are computed at once on a processor: 1 MB in float32, within the second-level cache."""
_FEW_SCORES = 1 << 13
"""Scores up to which building the negatives takes less time than the operations that avoid it."""
_LEVELS = torch.autograd.forward_ad
# Looked up once: these are asked in every call.
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_tracing = torch._C._is_tracing  # `torch.jit.is_tracing` outside of scripts


class Head(Protocol):
    """What is prepared of a `fixify.heads.layer.FixedClassifier`."""

    in_features: int
    out_features: int
    scale: Tensor
    bias: Tensor | None
    center: Tensor | None
    spread: Tensor | None
    gains: Tensor | None
    product: CodeProduct
    _parameters: dict[str, Any]
    _buffers: dict[str, Tensor | None]

    @property
    def spec(self) -> SpecFields:
        """The head spec."""


def is_traced(x: Tensor) -> bool:
    """Check whether operations on a tensor are recorded or transformed, so that none may be prepared beforehand.

    That is the case under `torch.jit.trace`, dispatch modes (fake tensors, `make_fx`), the transforms of `torch.func`,
    forward-mode differentiation, and for meta tensors and subclasses such as DTensor. Ask
    `torch.compiler.is_compiling` before.
    """
    return (
        x.is_meta
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or _num_dispatch_modes() > 0
        or _is_wrapped(x)
        or _LEVELS._current_level >= 0
        or _is_tracing()
    )


class PreparedHead:
    """The forward pass of one head, on one device and for inputs of one type.

    It holds references to the tensors that it was prepared from, and is used while they are the same, unchanged ones.
    `call` maps features [..., N] to logits [M, C]; `is_compiled` says whether that is compiled code.

    Args:
        head: The head.
        dtype: Type that the product is computed in and that the logits have.
        input_dtype: Type of the inputs; another one than `dtype` under autocast.
    """

    def __init__(self, head: Head, dtype: torch.dtype, input_dtype: torch.dtype) -> None:
        self.device, self.dtype, self.input_dtype = head.scale.device, dtype, input_dtype
        self._device_type = self.device.type
        self._product, self._revision = head.product, head.product.revision
        self._sources = [
            (store, name, tensor, tensor._version, tensor.data_ptr())
            for store, name, tensor in _learned_tensors(head)
            if tensor is not None
        ]
        wide = torch.promote_types(dtype, torch.float32)
        center = None if head.center is None else head.center.to(wide)
        inverse_std = None if head.spread is None else floor_std(head.spread).to(wide).reciprocal()
        compiled = _compiled_call(head, dtype, center, inverse_std) if wide == torch.float32 else None
        self.is_compiled = compiled is not None
        self.call = compiled or _composed_call(head, dtype, center, inverse_std)

    def fits(self, x: Tensor) -> bool:
        """Check that it is for inputs like `x`, and that none of the head's tensors was replaced or changed since."""
        dtype = x.dtype
        if dtype is not self.input_dtype or x.device != self.device:
            return False
        if dtype is not torch.float64 and torch.is_autocast_enabled(self._device_type):
            dtype = torch.get_autocast_dtype(self._device_type)
        return dtype is self.dtype and self.is_current()

    def is_current(self) -> bool:
        """Check that none of the head's tensors was replaced or changed since."""
        if self._product.revision != self._revision:
            return False
        for store, name, tensor, version, pointer in self._sources:
            if store[name] is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                return False
        return True


def prepare(head: Head, x: Tensor) -> PreparedHead | None:
    """Prepare a head for inputs like `x`; None if its tensors or those inputs do not allow it.

    Tensors made in inference mode do not, because they do not count their changes; nor do the copies of
    `nn.DataParallel`, which last for one call, and those that FSDP gathers (`FixedClassifier.shardable_`).
    """
    if head.scale.ndim or not all(name in head._parameters or name in head._buffers for name in _SOURCES):
        return None
    device, dtype = x.device, x.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    tables = list(head.product.buffers())
    tensors = tables + [tensor for _, _, tensor in _learned_tensors(head) if tensor is not None]
    if (
        not head.product.is_ready
        or device.type not in _DEVICES
        or (dtype == x.dtype and head.scale.dtype != dtype)
        or any(tensor.device != device or is_traced(tensor) or tensor.is_inference() for tensor in tensors)
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return PreparedHead(head, dtype, x.dtype)


def _learned_tensors(head: Head) -> list[tuple[Mapping[str, Tensor | None], str, Tensor | None]]:
    """List the head's own tensors but its codes, with the dictionaries that hold them."""
    found: list[tuple[Mapping[str, Tensor | None], str, Tensor | None]] = []
    for name in _SOURCES:
        store: Mapping[str, Tensor | None] = head._parameters if name in head._parameters else head._buffers
        found.append((store, name, store[name]))
    return found


def _composed_call(
    head: Head, dtype: torch.dtype, center: Tensor | None, inverse_std: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Build the function from features [M, N] to logits [M, C] of torch's operations."""
    wide = torch.promote_types(dtype, torch.float32)
    n = head.in_features
    scale = (head.scale.detach().to(torch.float64) * head.product.prescale).to(wide)
    codes = _codes(head.product, dtype)
    scores = _scores(head, codes, dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    rows = _row_factors(head, dtype)
    finish = _finish(head, dtype, bias, rows)
    normalize, is_wide, num_classes = head.spec.normalize, dtype == wide, head.out_features
    signs = head.product.block_signs
    at_once = 1 << 62 if signs is None or signs.device.type != "cpu" else max(1, _CACHED_SCORES // signs.numel())

    def call(x: Tensor) -> Tensor:
        z = _standardise(x.to(wide), center, inverse_std).reshape(-1, n)
        factor = scale
        if normalize:
            factor = scale / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(NORM_EPSILON)
        if not is_wide:
            z = (z * factor if center is None else z.mul_(factor)).to(dtype)
        if len(z) <= at_once:
            return finish(scores(z), factor if is_wide else None, None)
        logits = z.new_empty(len(z), num_classes)
        factors = factor.expand(len(z), 1)
        for start in range(0, len(z), at_once):
            part = slice(start, start + at_once)
            finish(scores(z[part]), factors[part] if is_wide else None, logits[part])
        return logits

    return call


def _compiled_call(
    head: Head, dtype: torch.dtype, center: Tensor | None, inverse_std: Tensor | None
) -> Callable[[Tensor], Tensor] | None:
    """Build the function from features [M, N] to logits [M, C] in compiled code; None if there is none for the head."""
    product = head.product
    if head.scale.device.type != "cpu" or product.table is not None or not is_compiled():
        return None
    if product.packed is None and product.left is None:
        return None  # the codes are one large matrix, or none
    directions = _directions(product)
    signs = product.block_signs if product.packed is None else product.rotation_signs
    planes = None if product.packed is None else sign_planes(product.packed.numpy(), product.num_kept, product.levels)
    tables = HeadTables(
        num_features=head.in_features if directions is None else len(directions),
        num_classes=head.out_features,
        scale=float(head.scale.detach().double()) * product.prescale,
        normalize=head.spec.normalize and directions is None,
        center=center if directions is None else None,
        inverse_std=inverse_std if directions is None else None,
        left=_as_float(product.left if directions is None else None),
        right=_as_float(product.right if directions is None else None),
        signs=_as_float(signs if directions is None else None),
        packed=None if planes is None else torch.from_numpy(planes.packed),
        plane_weights=() if planes is None else planes.weights,
        num_signs=product.num_kept,
        index=product.index,
        rows=_row_factors(head, torch.float32),
        bias=_as_float(head.bias),
        first=product.first_row,
    )
    logits = CompiledHead(tables)
    if directions is None:
        return logits if dtype is torch.float32 else lambda x: logits(x.float()).to(dtype)
    basis, n, normalize = directions, head.in_features, head.spec.normalize

    def projected(x: Tensor) -> Tensor:
        z = _standardise(x.float().reshape(-1, n), center, inverse_std)
        return logits(F.linear(F.normalize(z, eps=NORM_EPSILON) if normalize else z, basis)).to(dtype)

    return projected


def _directions(product: CodeProduct) -> Tensor | None:
    """Build what features are multiplied with before stored signs, [d, N], where that is no fast transform."""
    right, signs = product.right, product.rotation_signs
    if right is None or signs is None or product.left is not None:
        return _as_float(product.directions)
    return (right * signs)[: product.num_kept].float()


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _standardise(z: Tensor, center: Tensor | None, inverse_std: Tensor | None) -> Tensor:
    if center is None:
        return z
    z = z - center
    return z if inverse_std is None else z.mul_(inverse_std)


def _row_factors(head: Head, dtype: torch.dtype) -> Tensor | None:
    """Compute what the score of each class is multiplied with, [C]: its sign and its row scale; None for all ones."""
    rows = None if head.gains is None else head.gains.to(dtype) * (1.0 / GAIN_STEPS)
    product = head.product
    if product.right is None or product.table is not None or product.packed is not None or product.class_signs is None:
        return rows
    signs = product.class_signs.to(dtype)
    return signs if rows is None else signs * rows


def _codes(product: CodeProduct, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Build the product with the codes, or with those of rotated features; not used for blocks of a matrix."""
    if product.table is not None:
        return partial(F.linear, weight=product.table.to(dtype))
    if product.packed is not None:
        return packed_product(product.packed, product.num_kept, dtype, product.levels)
    return product


def _scores(head: Head, codes: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Build the function from z [M, N] to the scores that `_finish` takes."""
    product = head.product
    transform = _transform(product, dtype)
    if product.table is None and product.packed is None:
        return transform or product
    if product.directions is not None:
        directions = product.directions.to(dtype)
        return lambda z: codes(F.linear(z, directions))
    if transform is None or product.rotation_signs is None:
        return codes
    n, kept = head.in_features, product.num_kept
    return lambda z: codes(transform(z).view(-1, n)[:, :kept])


def _transform(product: CodeProduct, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Build the fast product with the Hadamard matrix or its blocks: z [M, N] to [M x K x N / b, b], contiguous."""
    if product.right is None:
        return None
    right = product.right.to(dtype).t().contiguous()
    b = right.shape[0]
    a = product.spec.num_features // b
    left = None if product.left is None else product.left.to(dtype)
    signs = product.rotation_signs if product.block_signs is None else product.block_signs
    signs = None if signs is None else signs.to(dtype)

    def transform(z: Tensor) -> Tensor:
        if signs is not None:
            z = z.unsqueeze(-2) * signs
        if left is not None:
            z = z.reshape(-1, a, b)
            z = torch.bmm(left.expand(z.shape[0], a, a), z)
        return torch.mm(z.reshape(-1, b), right)

    return transform


def _finish(
    head: Head, dtype: torch.dtype, bias: Tensor | None, rows: Tensor | None
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """Build the function from scores, a factor per sample [M, 1] and where to write, to logits [M, C]."""
    n, c, product = head.in_features, head.out_features, head.product
    uses_rows = product.right is not None and product.table is None and product.packed is None
    if uses_rows and product.index is not None:
        index = product.index
        width = n if product.block_signs is None else n * product.block_signs.shape[0]

        def picked(scores: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
            return _affine(scores.view(-1, width).index_select(1, index), factor, rows, bias, out)

        return picked
    if uses_rows and c > n:
        return _finish_blocks(n, c, rows, bias)
    first = product.first_row
    stride = n if uses_rows else c

    def in_order(scores: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
        if uses_rows:
            m = scores.numel() // stride
            scores = scores.as_strided((m, c), (n, 1), first)
        return _affine(scores, factor, rows, bias, out)

    return in_order


def _affine(
    scores: Tensor, factor: Tensor | None, rows: Tensor | None, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """Multiply scores [M, C], in place, with a factor per sample and one per class, and add the bias per class.

    Samples are divided by their norm after the product, so that the sums in it, and the logits of a class, are the same
    whatever classes are beside it.
    """
    if rows is not None:
        if factor is None:
            factor = rows
        else:
            scores = scores.mul_(rows)
    if factor is not None:
        return torch.mul(scores, factor, out=out) if bias is None else torch.addcmul(bias, scores, factor, out=out)
    if bias is not None:
        return torch.add(scores, bias, out=out)
    return scores.contiguous() if out is None else out.copy_(scores)


def _finish_blocks(
    n: int, c: int, gains: Tensor | None, bias: Tensor | None
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """Build `_finish` for codes that are the rows of each block and then their negatives.

    Both halves are written into their places in the logits, without building the negatives.
    """
    full = c // (2 * n)
    rest = c - full * 2 * n
    parts = [(full * 2 * n, full, 1, min(rest, n), 1), (full * 2 * n + n, full, 1, max(rest - n, 0), -1)]
    pieces = [(0, 0, full, n, 1), (n, 0, full, n, -1), *parts]
    pieces = [piece for piece in pieces if piece[2] * piece[3]]
    inner = None if gains is not None or bias is None else bias
    biases = [
        None if inner is None else inner.as_strided((count, width), (2 * n, 1), inner.storage_offset() + start)
        for start, _, count, width, _ in pieces
    ]

    def blocks(scores: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
        k = full + (rest > 0)
        scores = scores.view(-1, k, n)
        m = scores.shape[0]
        if scores.numel() <= _FEW_SCORES:
            both = torch.cat((scores, -scores), dim=-1).as_strided((m, c), (2 * k * n, 1))
            return _affine(both, factor, gains, bias, out)
        logits = scores.new_empty(m, c) if out is None else out
        if factor is not None and factor.ndim:
            factor = factor.unsqueeze(-1)
        for (start, block, count, width, sign), part in zip(pieces, biases, strict=True):
            target = logits.as_strided((m, count, width), (c, 2 * n, 1), logits.storage_offset() + start)
            source = scores[:, block : block + count, :width]
            if factor is None:
                if part is None:
                    torch.mul(source, sign, out=target)
                else:
                    torch.add(part, source, alpha=sign, out=target)
            elif part is None:
                torch.mul(source, factor * sign, out=target)
            else:
                torch.addcmul(part, source, factor, value=sign, out=target)
        if gains is not None:
            logits.mul_(gains)
            if bias is not None:
                logits.add_(bias)
        return logits

    return blocks
