"""Option classes: mistakes as sentences, conflicts, flags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from fixify._options import (
    CheckedOptions,
    Conflict,
    Flag,
    did_you_mean,
    explain,
    flag_of,
    mistakes,
    option,
    shown,
)
from fixify.errors import UsageError


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


class Rates(CheckedOptions):
    low: float = option(0.0, "Low.", ge=0)
    high: float = option(1.0, "High.", flags=("-H", "--high"), panel="machine", hidden=("--top",), metavar="RATE")
    inner: float = option(0.5, "Inner.", flags=())

    def _conflicts(self) -> Iterator[Conflict]:
        if self.low > self.high:
            yield Conflict(("low", "high"), f"low ({self.low:g}) is above high ({self.high:g})", "Lower --low.")


def test_every_mistake_is_told_at_once_with_what_to_do() -> None:
    with pytest.raises(UsageError) as caught:
        Rates.create(low=2, hgh=1, inner="x")
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert any("'hgh'" in line and "'high'" in line for line in lines)
    assert any("inner" in line and "'x'" in line for line in lines)
    assert any("low (2)" in line and "high (1)" in line for line in lines)
    assert caught.value.hint == "Lower --low."
    with pytest.raises(UsageError, match=r"low \(2\)"):
        Rates().replace(low=2)


def test_a_conflict_with_the_default_of_a_wrong_value_is_not_told() -> None:
    (mistake,) = mistakes(Rates.model_validate, {"low": 2, "high": "x"})
    assert (mistake.path, mistake.kind) == (("high",), "float_parsing")


def test_the_flag_of_a_field() -> None:
    fields = Rates.model_fields
    assert flag_of("low", fields["low"]) == Flag(("--low",))
    assert flag_of("high", fields["high"]) == Flag(("-H", "--high"), "machine", ("--top",), "RATE")
    assert flag_of("inner", fields["inner"]).names == ()
    assert fields["high"].description == "High."


def test_what_determines_the_result_and_the_defaults() -> None:
    assert Rates.defaults() == {"low": 0.0, "high": 1.0, "inner": 0.5}
    assert Rates.create(low=0.25).recipe() == {"low": 0.25, "high": 1.0, "inner": 0.5}
