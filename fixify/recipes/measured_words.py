"""What language models of one recipe have measured, in the recipe's entry `measured`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fixify.recipes.measured import MeasuredRuns, Text
from fixify.validation import Conflict

_Perplexity = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class Perplexities(BaseModel):
    """Of the epoch that is best on the validation text, one a seed.

    Attributes:
        val: On the validation text.
        test: On the test text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    val: tuple[_Perplexity, ...] = Field(min_length=1)
    test: tuple[_Perplexity, ...] = Field(min_length=1)


class MeasuredWords(MeasuredRuns):
    """Runs of one recipe with several kinds of words, each of every seed.

    Attributes:
        num_words: How many kinds of words the text has: C.
        command: What repeats the runs.
        learned: With an embedding and a classifier that are both learned.
        others: With other words, by what they are.
    """

    num_words: int = Field(ge=1)
    command: Text
    learned: Perplexities
    others: dict[str, Perplexities] = Field(min_length=1)

    def ratios(self, words: str) -> tuple[float, ...]:
        """Validation perplexity of other words over that of learned ones, one a seed."""
        return tuple(one / other for one, other in zip(self.others[words].val, self.learned.val, strict=True))

    def _conflicts(self) -> Iterator[Conflict]:
        yield from super()._conflicts()
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
