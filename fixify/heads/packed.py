"""The product with packed signs, a chunk of classes at a time: the whole codebook never exists as numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 22
"""Signs unpacked at once: 16 MB as float32."""


def unpack(packed: Tensor, num_signs: int, dtype: torch.dtype) -> Tensor:
    """Packed signs uint8 [k, ceil(d / 8)] as numbers: +1 or -1, [k, d]; bit 1 is a minus sign, highest bit first."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> shifts) & 1
    return 1.0 - 2.0 * bits.flatten(1)[:, :num_signs].to(dtype)


class PackedLinear(torch.autograd.Function):
    """`z @ signs.T` for z [..., d] and packed signs [C, ceil(d / 8)]: [..., C]. Unpacks again on the way back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.num_signs, ctx.dtype = z.shape[-1], z.dtype
        parts = packed.split(max(1, _CHUNK // z.shape[-1]))
        return torch.cat([F.linear(z, unpack(part, z.shape[-1], z.dtype)) for part in parts], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (packed,), (grad,) = ctx.saved_tensors, grads
        step = max(1, _CHUNK // ctx.num_signs)
        total = torch.zeros(*grad.shape[:-1], ctx.num_signs, dtype=torch.float32, device=grad.device)
        for part, of_part in zip(packed.split(step), grad.split(step, dim=-1), strict=True):
            total += of_part @ unpack(part, ctx.num_signs, grad.dtype)
        return total.to(ctx.dtype), None
