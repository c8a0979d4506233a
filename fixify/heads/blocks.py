"""The Hadamard matrix of a head, and the sign vectors that make more blocks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fixify.heads import random
from fixify.heads.kerdock import has_kerdock_set, kerdock_bits
from fixify.heads.matrices import Construction, factorise, format_construction, parse_construction

if TYPE_CHECKING:
    from fixify.heads.spec import HeadSpec


def construction_of(spec: HeadSpec) -> Construction:
    """How the Hadamard matrix of the spec is built: as it records, or as this version would choose."""
    if spec.construction is not None:
        return parse_construction(spec.construction, spec.num_features)
    return factorise(spec.num_features)


def block_bits(spec: HeadSpec, blocks: np.ndarray) -> np.ndarray:
    """Sign vectors of some blocks; they depend on N, the seed and the block's number alone.

    Block 0 is all plus. Up to N/2 the others are Kerdock's where N = 4^k (and H is Sylvester's); all others are read
    from the seeded stream.

    Args:
        blocks: Block numbers, integers [k].

    Returns:
        uint8 [k, N]; 1 is a minus sign.
    """
    n = spec.num_features
    kerdock = has_kerdock_set(n) and format_construction(construction_of(spec)) == f"sylvester-{n}"
    bits = np.zeros((len(blocks), n), dtype=np.uint8)
    for i, block in enumerate(blocks.tolist()):
        if kerdock and block < n // 2:
            bits[i] = kerdock_bits(n, block, block + 1)[0]
        elif block:
            bits[i] = random.sign_bits(spec.seed, random.Purpose.BLOCK_SIGNS, block, n)
    return bits
