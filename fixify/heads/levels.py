"""The levels that stored weights may have: signs, and the finer ones of a `binary` head with `bits_per_weight`.

Importing this module needs no NumPy, so that reading the header of a file is quick; `fixify.heads.signs` packs levels
and multiplies with them.

Levels are whole numbers. Those of b = 1 to 4 bits are odd, from -(2^b - 1) to 2^b - 1, and so they are sums of b
signs, 2^(b-1) s_1 + ... + s_b: b planes of packed signs, the heaviest first. Those of 1.58 bits are -1, 0 and 1, five
to a byte (3^5 = 243), so they take 1.6 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

TRITS_PER_BYTE = 5
TRIT_POWERS = tuple(3**i for i in range(TRITS_PER_BYTE))
"""What the ternary digits of a byte are worth, the first the least."""


@dataclass(frozen=True)
class Levels:
    """The levels of one rate, and how they are packed into bytes.

    Attributes:
        bits: Bits per weight, as `--bits-per-weight` names them.
        num_planes: Planes of signs that are stored for each class; 0: five ternary digits in a byte.
        step: Distance of neighbouring levels, in standard deviations of normally distributed weights, at which
            rounding has the least squared error (Max, "Quantizing for minimum distortion", 1960).
        mean_square: Mean square of the levels of such weights. Codes are divided by its root and that of their number,
            so their norms are near 1.
    """

    bits: float
    num_planes: int
    step: float
    mean_square: float

    @property
    def largest(self) -> int:
        """The largest level."""
        return 2**self.num_planes - 1 if self.num_planes else 1

    @property
    def spacing(self) -> int:
        """The difference of neighbouring levels."""
        return 2 if self.num_planes else 1

    @property
    def values(self) -> tuple[int, ...]:
        """All levels, smallest first."""
        return tuple(range(-self.largest, self.largest + 1, self.spacing))

    @property
    def noise(self) -> float:
        """Squared error of normally distributed weights, in variances: 0.363 with one bit, 0.119 with two."""
        return 1.0 - self.mean_square * (self.step / self.spacing) ** 2

    def num_bytes(self, count: int) -> int:
        """Compute the bytes that `count` levels of a class take.

        >>> [LEVELS[bits].num_bytes(20) for bits in (1.58, 2, 3, 4)]
        [4, 6, 9, 12]
        """
        return self.num_planes * -(-count // 8) if self.num_planes else -(-count // TRITS_PER_BYTE)


SIGNS = Levels(1, 1, 1.596, 1.0)
"""One bit: +1 and -1."""
LEVELS: Mapping[float, Levels] = MappingProxyType(
    {
        levels.bits: levels
        for levels in (
            Levels(1.58, 0, 1.224, 0.54),
            Levels(2, 2, 0.9957, 3.555),
            Levels(3, 3, 0.586, 11.21),
            Levels(4, 4, 0.3352, 35.19),
        )
    }
)
"""The rates above one bit, by `HeadSpec.bits_per_weight`."""
RATES = (1, *LEVELS)
"""The values of `--bits-per-weight`."""
PLANES = (SIGNS, LEVELS[2], LEVELS[3], LEVELS[4], Levels(5, 5, 0.188138, 112.612), Levels(6, 6, 0.104064, 368.984))
"""The levels of 1, 2, ... planes of signs: a projected coordinate has one of these rates."""
