"""Types of values that are read from files: how large they may be.

`pydantic.TypeAdapter` checks dataclasses whose fields have these types. Within the program they are plain numbers and
texts.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

_LARGEST = 1e39
"""Above what a float32 can hold."""


def _nan_for_none(value: object) -> object:
    return math.nan if value is None else value


def _bounded(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"{value:g} is too large")
    return value


Count = Annotated[int, Field(ge=0, le=2**53)]
"""How many of something there are."""
Number = Annotated[float, AfterValidator(_bounded)]
"""A number that may be NaN or infinite."""
Measured = Annotated[Number, BeforeValidator(_nan_for_none)]
"""A number that is null in JSON if it is not finite."""
Percent = Annotated[float, Field(ge=0, le=100.001, allow_inf_nan=False)]
"""A percentage, with room for rounding."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A part of a whole."""
Text = Annotated[str, Field(max_length=100_000)]
"""A name, a command, or a sentence."""


def finite_or_none(value: object) -> object:
    """Return a value as JSON may hold it: None for a number that is not finite.

    >>> [finite_or_none(value) for value in (1.5, math.nan, "nan")]
    [1.5, None, 'nan']
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value
