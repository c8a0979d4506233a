"""What language models of one recipe have measured, in the recipe's entry `measured`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fixify.validation import Conflict, refuse

_Perplexity = Annotated[float, Field(ge=1, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]


class Perplexities(BaseModel):
    """Of the epoch that is best on the validation text, one a seed.

    Attributes:
        val: On the validation text.
        test: On the test text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    val: tuple[_Perplexity, ...] = Field(min_length=1)
    test: tuple[_Perplexity, ...] = Field(min_length=1)


class MeasuredWords(BaseModel):
    """Runs of one recipe with several kinds of words, each of every seed.

    Attributes:
        data: The text, for a person.
        num_words: How many kinds of words it has: C.
        conditions: How long the runs trained, and on what machine.
        command: What repeats them.
        seeds: One each run; the lists of perplexities are in this order.
        learned: With an embedding and a classifier that are both learned.
        others: With other words, by what they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: _Text
    num_words: int = Field(ge=1)
    conditions: _Text
    command: _Text
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    learned: Perplexities
    others: dict[str, Perplexities] = Field(min_length=1)

    def ratios(self, words: str) -> tuple[float, ...]:
        """Validation perplexity of other words over that of learned ones, one a seed."""
        return tuple(one / other for one, other in zip(self.others[words].val, self.learned.val, strict=True))

    @model_validator(mode="after")
    def _fits_together(self) -> MeasuredWords:
        refuse(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        if len(set(self.seeds)) < len(self.seeds):
            yield Conflict(("seeds",), f"seeds must differ, not be {' '.join(map(str, self.seeds))}")
        for option, name, found in (
            ("learned", "learned", self.learned),
            *(("others", name, found) for name, found in self.others.items()),
        ):
            if not len(found.val) == len(found.test) == len(self.seeds):
                yield Conflict(
                    (option, "seeds"),
                    f"{name} needs a perplexity of both texts for each of {len(self.seeds)} seeds, and has "
                    f"{len(found.val)} and {len(found.test)}",
                )
