"""Heads of every kind, with stored codes, statistics and biases that are not those of a new head."""

from __future__ import annotations

import numpy as np
import torch

from fixify.heads import FixedClassifier, HeadSpec
from fixify.heads.levels import LEVELS
from fixify.heads.projection import Projection
from fixify.heads.signs import pack_levels

SPECS = {
    "C < N": HeadSpec("hadamard", 64, 10),
    "C = N": HeadSpec("hadamard", 64, 64),
    "+-rows": HeadSpec("hadamard", 64, 100),
    "blocks": HeadSpec("hadamard", 20, 300),
    "Kerdock blocks": HeadSpec("hadamard", 64, 2000, standardize=True),
    "centered": HeadSpec("hadamard", 1280, 1000, standardize="center"),
    "not normalised": HeadSpec("hadamard", 64, 10, normalize=False),
    "matched": HeadSpec("hadamard", 96, 90, matched=True, blocks=1, standardize=True),
    "matched in a few of many blocks": HeadSpec("hadamard", 96, 500, matched=True, blocks=3),
    "matched, a block per class": HeadSpec("hadamard", 64, 500, matched=True, blocks=400, gains=True),
    "no Sylvester": HeadSpec("hadamard", 20, 7),
    "order 1": HeadSpec("hadamard", 1, 2),
    "published code, C < N": HeadSpec("hadamard", 96, 10, construction="truncated-sylvester"),
    "published code, C > N": HeadSpec("hadamard", 96, 128, construction="truncated-sylvester"),
    "orthogonal": HeadSpec("orthogonal", 24, 50, standardize=True),
    "simplex": HeadSpec("simplex", 24, 20, bias=False),
    "identity": HeadSpec("identity", 24, 20, standardize=True),
    "bare identity": HeadSpec("identity", 24, 20, normalize=False, bias=False),
    "binary": HeadSpec("binary", 1280, 200, bits_per_class=1280, gains=True, normalize=False),
    "binary, few signs": HeadSpec("binary", 1280, 200, bits_per_class=88, gains=True, standardize="center"),
    "binary, no bytes of signs": HeadSpec("binary", 64, 50, bits_per_class=29),
    "binary, no rotation": HeadSpec("binary", 386, 50, bits_per_class=386, standardize=True),
    "1.58 bits": HeadSpec("binary", 1280, 50, bits_per_weight=1.58, gains=True, standardize="center"),
    "2 bits, no rotation": HeadSpec("binary", 30, 50, bits_per_weight=2, gains=True),
    "4 bits, no bytes of signs": HeadSpec("binary", 44, 50, bits_per_weight=4, gains=True, normalize=False),
    "projected": HeadSpec("binary", 200, 150, bits_per_class=40, planes=(18, 12, 7, 3), gains=True, normalize=False),
    "projected, no bytes of signs": HeadSpec(
        "binary", 30, 50, bits_per_class=13, planes=(6, 4, 2, 1), gains=True, normalize=False, standardize="center"
    ),
    "gains": HeadSpec("hadamard", 64, 10, gains=True),
    "fixed scale": HeadSpec("hadamard", 64, 10, fixed_scale=True),
}


def a_head(spec: HeadSpec, *, channel_dim: int = -1) -> FixedClassifier:
    rng = np.random.default_rng(0)
    codes = None
    if spec.bits_per_weight is not None:
        levels = LEVELS[spec.bits_per_weight]
        drawn = rng.choice(levels.values, (spec.num_classes, spec.num_features))
        codes = torch.from_numpy(pack_levels(drawn, levels))
    elif spec.kind == "binary":
        signs = rng.integers(0, 2, (spec.num_classes, spec.bits_per_class or 0), dtype=np.uint8)
        codes = torch.from_numpy(np.packbits(signs, axis=1))
    elif spec.stores_codes:
        space = 2 * spec.num_features * (spec.blocks or 1)
        codes = torch.from_numpy(rng.choice(space, spec.num_classes, replace=False))
    gains = torch.from_numpy(rng.integers(1, 256, spec.num_classes, dtype=np.uint8)) if spec.gains else None
    projection = None
    if spec.planes is not None:
        directions = rng.integers(-127, 128, (spec.planes[0], spec.num_features), dtype=np.int8)
        projection = Projection(spec.planes, directions, rng.uniform(1e-4, 2e-3, spec.planes[0]).astype(np.float32))
    head = FixedClassifier(spec, codes=codes, gains=gains, projection=projection, channel_dim=channel_dim).eval()
    with torch.no_grad():
        head.scale.mul_(0.7)
        for tensor in (head.bias, head.center, head.spread):
            if tensor is not None:
                tensor.copy_(torch.from_numpy(rng.uniform(0, 1, tensor.shape)))
    return head


def features_for(spec: HeadSpec, *sizes: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, spec.num_features, *sizes, generator=generator).relu()


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / expected.std())
