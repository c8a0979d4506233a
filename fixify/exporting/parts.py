"""A fixed head as small constants, from which every export format builds the same computation.

`logits = lengths * scale * product((x - mean) * inverse_std, divided by its norm) + bias`, where `product` multiplies
with codes of +-1: two small matrices and a choice of rows (Hadamard), packed signs (binary), or a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fixify.heads import FixedClassifier, kind_of
from fixify.heads.codes import (
    Codes,
    FeatureRows,
    HadamardRows,
    Rotation,
    SignRows,
    StoredLevels,
    StoredSigns,
    TruncatedRows,
)
from fixify.heads.constructions import Construction, Factor
from fixify.heads.matrices import block_bits
from fixify.heads.product import factor_tables
from fixify.heads.projection import Projection, coordinates_of, weights_of
from fixify.heads.signs import sign_planes
from fixify.heads.statistics import floor_std


@dataclass(frozen=True)
class Transform:
    """Multiplication with a Hadamard matrix of order M = a b as two small products, after padding with zeros.

    Attributes:
        left: H_a, int8 [a, a].
        right: H_b, int8 [b, b].
        padding: Zeros appended to the features, M - N.
    """

    left: np.ndarray
    right: np.ndarray
    padding: int = 0

    @property
    def order(self) -> int:
        """The order M of the matrix."""
        return len(self.left) * len(self.right)

    @classmethod
    def of(cls, construction: Construction, padding: int = 0) -> Transform:
        """Build the two factors of a Hadamard matrix."""
        left, right = (table.astype(np.int8) for table in factor_tables(construction))
        return cls(left, right, padding)


@dataclass(frozen=True)
class Picked:
    """Scores with K sign-flipped copies of one Hadamard matrix, of which each class takes one.

    Attributes:
        transform: The matrix, of order M.
        block_signs: Packed signs of the K blocks, uint8 [K, ceil(M / 8)]; None: one block without signs.
        position: Position of each class among the K M scores, int64 [C].
        negative: Whether the score is negated, bool [C]; None: no score is.
    """

    transform: Transform
    block_signs: np.ndarray | None
    position: np.ndarray
    negative: np.ndarray | None


@dataclass(frozen=True)
class Signs:
    """Packed signs, one bit per weight, or several planes of them that make levels.

    Attributes:
        packed: uint8 [C, planes * ceil(d / 8)]; bit 1 is a minus sign, highest bit first.
        width: d.
        rotation: Applied to the features first; None: d = N.
        rotation_signs: Packed signs that multiply the features before the rotation, uint8 [ceil(N / 8)].
        directions: Integers that the features are multiplied with first, int8 [k, N], in a head with a projection.
        columns: Which of the k products each sign then reads, int64 [d].
        factors: What that product is multiplied with, float32 [d].
        planes: Weights of the planes. If there are several, a class reads the features, padded to a multiple of 8, once
            for each plane, times its weight.
    """

    packed: np.ndarray
    width: int
    rotation: Transform | None = None
    rotation_signs: np.ndarray | None = None
    directions: np.ndarray | None = None
    columns: np.ndarray | None = None
    factors: np.ndarray | None = None
    planes: tuple[int, ...] = (1,)

    @property
    def plane_width(self) -> int:
        """Numbers that one of several planes reads: d, padded to a multiple of 8."""
        return self.packed.shape[1] * 8 // len(self.planes)

    @property
    def read_width(self) -> int:
        """Numbers that a class reads in all."""
        return self.width if len(self.planes) == 1 else self.plane_width * len(self.planes)


@dataclass(frozen=True)
class Table:
    """Codes of real numbers, which no export can make smaller.

    Attributes:
        codes: float32 [C, N].
    """

    codes: np.ndarray


@dataclass(frozen=True)
class First:
    """Class c reads feature c.

    Attributes:
        count: C.
    """

    count: int


Product = Picked | Signs | Table | First


@dataclass(frozen=True)
class HeadParts:
    """A fixed head as small constants.

    Attributes:
        num_features: N.
        num_classes: C.
        channel_dim: -1 for features [..., N], 1 for feature maps [B, N, H, W].
        mean: Subtracted from the features, float32 [N], or None.
        std: Divides the features then, float32 [N], or None.
        normalize: Whether the features are then divided by their L2 norm.
        product: The product with the codes, without the factor that makes them of norm 1.
        scale: Alpha and that factor.
        gains: Lengths of the codes in steps of 1/255, uint8 [C], or None.
        bias: float32 [C], or None.
    """

    num_features: int
    num_classes: int
    channel_dim: int
    mean: np.ndarray | None
    std: np.ndarray | None
    normalize: bool
    product: Product
    scale: float
    gains: np.ndarray | None
    bias: np.ndarray | None

    @classmethod
    def of(cls, head: FixedClassifier) -> HeadParts:
        """Split a head into its parts.

        Args:
            head: The head, with its stored codes loaded.

        Raises:
            HeadSpecError: The stored codes have not been loaded.
        """
        stored = None if head.codes is None else head.codes.detach().cpu().numpy()
        product, unit = _product(kind_of(head.spec).codes(head.spec, stored, head.product.projection))
        std = None if head.std is None else floor_std(head.std.detach())
        return cls(
            num_features=head.in_features,
            num_classes=head.out_features,
            channel_dim=head.channel_dim,
            mean=_array(head.mean),
            std=_array(std),
            normalize=head.spec.normalize,
            product=product,
            scale=float(head.scale.detach().double()) * unit,
            gains=None if head.gains is None else head.gains.detach().cpu().numpy(),
            bias=_array(head.bias),
        )

    @property
    def is_small(self) -> bool:
        """Whether the codes take a few bits per weight or less."""
        return not isinstance(self.product, Table)

    def rounds_features(self, *, portable: bool) -> bool:
        """Check whether the ONNX graph multiplies by an operator of ONNX Runtime that rounds features to 8 bits.

        Signs of a projection are digits of levels, which such rounding changes too much: by 0.5 standard deviations of
        the logits on random images. Their products are exact, as portable ones are.

        Args:
            portable: Whether only standard operators are used.
        """
        return isinstance(self.product, Signs) and self.product.directions is None and not portable

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """List the constants by name, packed as they are stored."""
        for name, value in (("mean", self.mean), ("std", self.std), ("gains", self.gains), ("bias", self.bias)):
            if value is not None:
                yield name, value
        yield "scale", np.float32(self.scale)
        match self.product:
            case Picked(transform, block_signs, position, negative):
                yield from (("left", transform.left), ("right", transform.right), ("position", smallest(position)))
                if block_signs is not None:
                    yield "block_signs", block_signs
                if negative is not None:
                    yield "negative", np.packbits(negative)
            case Signs(packed, _, rotation, rotation_signs):
                yield "codes", packed
                if len(self.product.planes) > 1:
                    yield "planes", np.array(self.product.planes, dtype=np.uint8)
                if self.product.directions is not None and self.product.columns is not None:
                    yield "directions", self.product.directions
                    yield "columns", smallest(self.product.columns)
                    yield "factors", np.asarray(self.product.factors)
                if rotation is not None and rotation_signs is not None:
                    yield from (("left", rotation.left), ("right", rotation.right), ("rotation_signs", rotation_signs))
            case Table(codes):
                yield "codes", codes
            case First(_):
                pass


def smallest(indices: np.ndarray) -> np.ndarray:
    """Convert indices to the smallest unsigned type that holds them."""
    return indices.astype(np.min_scalar_type(int(indices.max(initial=0))))


def _product(codes: Codes) -> tuple[Product, float]:
    """Return the product with codes, and the factor that makes their norm 1."""
    match codes:
        case HadamardRows():
            return _hadamard(codes), codes.shape[1] ** -0.5
        case TruncatedRows():
            return _truncated(codes), codes.shape[1] ** -0.5
        case SignRows():
            return Signs(np.concatenate(list(codes.packed())), codes.shape[1]), codes.shape[1] ** -0.5
        case StoredSigns():
            made = Signs(codes.packed, codes.num_signs)
            if codes.rotation is None:
                return made, codes.num_signs**-0.5
            if isinstance(codes.rotation, Projection):
                return _projected(made, codes.rotation), codes.num_signs**-0.5
            return _rotated(made, codes.rotation), (codes.num_signs * codes.num_features) ** -0.5
        case StoredLevels():
            made, unit = _planes(codes)
            unit *= codes.unit
            if codes.rotation is None:
                return made, unit
            return _rotated(made, codes.rotation), unit * codes.num_features**-0.5
        case FeatureRows():
            return First(codes.num_classes), 1.0
        case _:
            return Table(np.array(codes.table(), dtype=np.float32)), 1.0


def _hadamard(codes: HadamardRows) -> Product:
    """Take the fast product, or packed signs where so many blocks are used that one bit per weight is faster."""
    c, n = codes.shape
    blocks, block = np.unique(codes.block, return_inverse=True)
    transform = Transform.of(codes.construction)
    if len(blocks) > 1 and c < 2 * len(blocks) * (len(transform.left) + len(transform.right)):  # as `prefers_dense`
        return Signs(np.concatenate(list(codes.packed())), n)
    bits = np.packbits(block_bits(codes.construction, codes.seed, blocks), axis=1) if blocks.any() else None
    negative = codes.is_negative.astype(bool)
    return Picked(transform, bits, block.reshape(-1) * n + codes.row, negative if negative.any() else None)


def _truncated(codes: TruncatedRows) -> Picked:
    """Pad the features to the order of Sylvester's matrix, of whose rows these are the beginnings, negated."""
    c, n = codes.shape
    order = 1 << (max(n, c) - 1).bit_length()
    transform = Transform.of((Factor("sylvester", order),), padding=order - n)
    return Picked(transform, None, codes.classes, np.ones(c, dtype=bool))


def _planes(codes: StoredLevels) -> tuple[Signs, float]:
    """Take levels as weighted sums of signs; the weights are whole numbers, with a unit."""
    planes = sign_planes(codes.packed, codes.num_features, codes.levels)
    unit = min(planes.weights)
    return Signs(planes.packed, codes.num_features, planes=tuple(int(each / unit) for each in planes.weights)), unit


def _rotated(signs: Signs, rotation: Rotation) -> Signs:
    bits = np.packbits(rotation.signs() < 0)
    return replace(signs, rotation=Transform.of(rotation.construction), rotation_signs=bits)


def _projected(signs: Signs, projection: Projection) -> Signs:
    columns = coordinates_of(projection.planes)
    factors = projection.steps.astype(np.float32)[columns] * weights_of(projection.planes)
    return replace(signs, directions=projection.directions, columns=columns, factors=factors)


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().float().cpu().numpy()
