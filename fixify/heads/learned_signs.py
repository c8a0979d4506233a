"""Learned signs: latent weights whose signs are the codes of a binary head while it is trained.

Not in the paper, whose codes are fixed. With many more classes than features a small network cannot turn its features
to codes that do not follow the likeness of the classes, so codes and network are learned together here. What is stored
afterwards is one bit per sign, as before.

The gradient of a sign is taken for that of its latent weight (Courbariaux, Bengio & David, "BinaryConnect", NIPS 2015).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fixify.heads.encoding import separate_


def latent_of(packed: np.ndarray, num_signs: int) -> Tensor:
    """Return packed signs, uint8 [C, bytes], as latent weights of +-1, float32 [C, d]."""
    negative = np.unpackbits(packed, axis=1, count=num_signs)
    return torch.from_numpy(1.0 - 2.0 * negative.astype(np.float32))


def signs_of(latent: Tensor) -> Tensor:
    """Return the signs +-1 of latent weights; gradients pass unchanged."""
    signs = torch.where(latent < 0, -1.0, 1.0).to(latent.dtype)
    return signs + (latent - latent.detach())


@torch.no_grad()
def packed_signs(latent: Tensor) -> np.ndarray:
    """Pack the signs of latent weights [C, d] as a binary head stores them, uint8 [C, ceil(d / 8)].

    Classes with equal signs could never be told apart: last signs are changed until there are none.
    """
    packed = np.packbits(latent.cpu().numpy() < 0, axis=1)
    separate_(packed, latent.shape[1])
    return packed
