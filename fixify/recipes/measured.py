"""The entry `measured` of a recipe: what runs of it have measured, for images and for language models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fixify._options import Conflict, refuse

_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Perplexity = Annotated[float, Field(ge=1, allow_inf_nan=False)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]
_OVERRIDE = "train."


class Accuracies(BaseModel):
    """Validation top-1 of one kind of head.

    Attributes:
        best: The best validation of each run, percent, one per seed.
        last: The validation after the last epoch, percent, one per seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    best: tuple[_Percent, ...] = Field(min_length=1)
    last: tuple[_Percent, ...] = Field(min_length=1)


class Perplexities(BaseModel):
    """Perplexity of the epoch that is best on the validation text, one per seed.

    Attributes:
        val: On the validation text.
        test: On the test text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    val: tuple[_Perplexity, ...] = Field(min_length=1)
    test: tuple[_Perplexity, ...] = Field(min_length=1)


class MeasuredRuns(BaseModel):
    """Runs of one recipe, of images or of words.

    Attributes:
        data: What was trained on, in words.
        conditions: How long the runs trained, and on what machine.
        seeds: One per run; the lists of figures are in this order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: _Text
    conditions: _Text
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> MeasuredRuns:
        refuse(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        if len(set(self.seeds)) < len(self.seeds):
            yield Conflict(("seeds",), f"seeds must differ, not be {' '.join(map(str, self.seeds))}")


class Measured(MeasuredRuns):
    """Runs of one recipe, with a learned and a fixed classifier for each seed.

    Attributes:
        num_classes: C of the data.
        set: What the runs changed in the recipe, as after `--set`.
        learned: With the network's own classifier.
        fixed: With the fixed classifier.
        held: With a fixed classifier whose alpha was held, by alpha.
    """

    num_classes: int = Field(ge=1)
    set: tuple[str, ...] = ()
    learned: Accuracies
    fixed: Accuracies
    held: dict[_Scale, Accuracies] = Field(default_factory=dict)

    @property
    def best_gaps(self) -> tuple[float, ...]:
        """Fixed minus learned, in points of the best top-1, one per seed."""
        return _differences(self.fixed.best, self.learned.best)

    @property
    def last_gaps(self) -> tuple[float, ...]:
        """The same after the last epoch, which was not chosen by the validation images."""
        return _differences(self.fixed.last, self.learned.last)

    def command(self, recipe: str) -> str:
        """Return the command that repeats the runs of the first seed."""
        scales = ["--compare-scales", ",".join(f"{scale:g}" for scale in self.held)] if self.held else []
        changed = [part for override in (*self.set, f"train.seed={self.seeds[0]}") for part in ("--set", override)]
        return " ".join(("fixify train", recipe, "--compare", *scales, *changed))

    @field_validator("set")
    @classmethod
    def _is_of_training(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        for override in overrides:
            option, equals, _ = override.partition("=")
            if not equals or not option.startswith(_OVERRIDE):
                raise ValueError(f"must be written as after --set, train.OPTION=VALUE, not {override!r}")
        return overrides

    def _conflicts(self) -> Iterator[Conflict]:
        yield from super()._conflicts()
        named = {"learned": self.learned, "fixed": self.fixed}
        for name, found in (*named.items(), *((f"held {scale:g}", found) for scale, found in self.held.items())):
            option = name.partition(" ")[0]
            if not len(found.best) == len(found.last) == len(self.seeds):
                yield Conflict(
                    (option, "seeds"),
                    f"{name} needs a best and a last top-1 for each of {len(self.seeds)} seeds, and has "
                    f"{len(found.best)} and {len(found.last)}",
                )
            elif any(best < last for best, last in zip(found.best, found.last, strict=True)):
                yield Conflict((option,), f"{name} has a last top-1 above the best one")


class MeasuredWords(MeasuredRuns):
    """Runs of one recipe with several kinds of word vectors, each with every seed.

    Attributes:
        num_words: Number of different words of the text: C.
        command: The command that repeats the runs.
        learned: With a learned embedding and a learned classifier.
        others: With other word vectors, by their description.
    """

    num_words: int = Field(ge=1)
    command: _Text
    learned: Perplexities
    others: dict[str, Perplexities] = Field(min_length=1)

    def ratios(self, words: str) -> tuple[float, ...]:
        """Divide the validation perplexity of other words by that of learned ones, one ratio per seed."""
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


def _differences(fixed: tuple[float, ...], learned: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(one - other for one, other in zip(fixed, learned, strict=True))
