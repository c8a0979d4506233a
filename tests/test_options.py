from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from fixify._options import did_you_mean, explain, shown


class Options(BaseModel):
    count: int = Field(default=1, ge=1)
    rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    on: bool = False
    name: str = "a"
    amp: Literal["none", "bf16"] = "none"
    pair: tuple[float, float] = (0, 1)

    @field_validator("name")
    @classmethod
    def _not_b(cls, name: str) -> str:
        if name == "b":
            raise ValueError("must not be b")
        return name


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"count": "five"}, "must be a whole number, not the text 'five'"),
        ({"count": 0}, "must be greater than or equal to 1, not 0"),
        ({"count": 1.5}, "must be a whole number, not 1.5"),
        ({"rate": float("nan")}, "must be a finite number, not nan"),
        ({"rate": None}, "must be a number, not null"),
        ({"on": "yess"}, "must be true or false, not the text 'yess'"),
        ({"name": True}, "must be text, not true"),
        ({"name": "b"}, "must not be b"),
        ({"amp": "fp8"}, "must be 'none' or 'bf16', not the text 'fp8'"),
        ({"pair": [1.0, 2.0, 3.0]}, "must be a list of 2, not of 3: [1.0, 2.0, 3.0]"),
        ({"pair": [1.0]}, "has no value number 2: [1.0]"),
        ({"pair": {"x": 1}}, "must be a list, not a section"),
        ({"name": ["x" * 99]}, "must be text, not [" + "x" * 56 + "..."),
    ],
)
def test_a_sentence_says_what_is_allowed_and_what_was_given(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Options(**given)
    (problem,) = caught.value.errors()
    assert explain(problem) == sentence


def test_a_missing_value() -> None:
    class Needs(BaseModel):
        here: int

    with pytest.raises(ValidationError) as caught:
        Needs()  # type: ignore[call-arg]
    assert explain(caught.value.errors()[0]) == "is missing"


def test_the_nearest_name() -> None:
    assert did_you_mean("epoch", ["lr", "epochs"]) == "; did you mean 'epochs'?"
    assert did_you_mean("x" * 10_000, ["lr"]) == "."
    assert shown("3") == "the text '3'" and shown(3) == "3"
