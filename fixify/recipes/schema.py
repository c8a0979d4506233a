"""What `fixify train RECIPE --compare` has measured, in the recipe's entry `measured`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from fixify._options import Conflict, did_you_mean, explain, mistakes, refuse, shown
from fixify.conversion import ConvertOptions
from fixify.language.options import LanguageOptions
from fixify.recipes.parsing import Parsed, Place, Problem, dotted
from fixify.recipes.parsing import Path as ValuePath
from fixify.training import FinetuneOptions, TrainOptions

_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
_OVERRIDE = "train."


class Accuracies(BaseModel):
    """Validation top-1 of one kind of head.

    Attributes:
        best: The best validation of each run, percent, one a seed.
        last: The one after the last epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    best: tuple[_Percent, ...] = Field(min_length=1)
    last: tuple[_Percent, ...] = Field(min_length=1)


class MeasuredRuns(BaseModel):
    """What runs of one recipe have measured, of images or of words.

    Attributes:
        data: What was trained on, for a person.
        conditions: How long they trained, and on what machine.
        seeds: One each run; the lists of figures are in this order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Text
    conditions: Text
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> MeasuredRuns:
        refuse(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        if len(set(self.seeds)) < len(self.seeds):
            yield Conflict(("seeds",), f"seeds must differ, not be {' '.join(map(str, self.seeds))}")


class Measured(MeasuredRuns):
    """Runs of one recipe, a learned and a fixed classifier of each seed.

    Attributes:
        num_classes: C of the data.
        set: What the runs changed in the recipe, as after `--set`.
        learned: With the network's own classifier.
        fixed: With the fixed one.
        held: With a fixed one whose alpha was held, by alpha.
    """

    num_classes: int = Field(ge=1)
    set: tuple[str, ...] = ()
    learned: Accuracies
    fixed: Accuracies
    held: dict[_Scale, Accuracies] = Field(default_factory=dict)

    @property
    def best_gaps(self) -> tuple[float, ...]:
        """Fixed minus learned, points of the best top-1, one a seed."""
        return _differences(self.fixed.best, self.learned.best)

    @property
    def last_gaps(self) -> tuple[float, ...]:
        """The same after the last epoch, which nobody chose by the validation images."""
        return _differences(self.fixed.last, self.learned.last)

    def command(self, recipe: str) -> str:
        """The command that repeats the runs of one seed, the first."""
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


def _differences(fixed: tuple[float, ...], learned: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(one - other for one, other in zip(fixed, learned, strict=True))


# What language models of one recipe have measured, in the recipe's entry `measured`.


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


# What a recipe may say. Each section has one definition, elsewhere: `convert` is the signature of `fixify.convert`,
# `finetune` is `fixify.training.FinetuneOptions`, `train` is `fixify.training.TrainOptions`, `language` is
# `fixify.language.LanguageOptions`. An option that is added there is an option here. Beside the sections a recipe may say
# what it is about: data, files, what they were, and what was measured with them.


def convert_option_names() -> tuple[str, ...]:
    """The options of `fixify.convert` that a recipe may set."""
    return tuple(ConvertOptions.model_fields)


SECTIONS: dict[str, type[BaseModel]] = {
    "convert": ConvertOptions,
    "finetune": FinetuneOptions,
    "train": TrainOptions,
    "language": LanguageOptions,
}


class Recorded(BaseModel):
    """What a run had, which repeating it has to find again; see `fixify.training.run_folder`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint_sha256: str | None = None
    train_listing: str | None = None
    val_listing: str | None = None
    text_sha256: str | None = None
    images_a_step: int | None = Field(default=None, ge=1)


# What a recipe is about: names and files, as on the command line.
ENTRIES = ("data", "class_map", "checkpoint", "against", "distill")


def _recipe_model(measured: type[BaseModel]) -> type[BaseModel]:
    sections: dict[str, Any] = {name: (options | None, None) for name, options in SECTIONS.items()}
    entries: dict[str, Any] = dict.fromkeys(ENTRIES, (str | None, None))
    return create_model(
        "RecipeFile",
        __config__=ConfigDict(extra="forbid"),
        description=(str, ""),
        expect=(str, ""),
        recorded=(Recorded, Recorded()),
        measured=(tuple[measured, ...], ()),  # type: ignore[valid-type]
        **entries,
        **sections,
    )


# What a recipe has measured is of images or of words, as its section says; with both kinds in one model, a mistake
# would be told as two.
_OF_IMAGES, _OF_WORDS = _recipe_model(Measured), _recipe_model(MeasuredWords)


def check(parsed: Parsed) -> BaseModel | None:
    """The recipe that was parsed; None if it has mistakes, which are then all in `parsed.problems`."""
    values = parsed.values
    if not isinstance(values, dict):
        if not parsed.problems:
            what = "empty" if values is None else shown(values)
            parsed.refuse((), f"has sections ({_sections()}), and this is {what}.")
        return None
    # `finetune:` with every option commented out is a section that changes nothing.
    values = {name: {} if name in SECTIONS and value is None else value for name, value in values.items()}
    if not any((name,) in parsed.places for name in SECTIONS):
        parsed.problems.append(Problem(Place(1), f"A recipe needs one or more of these sections: {_sections()}."))
    if ("measured",) in parsed.places and not {("train",), ("language",)} & parsed.places.keys():
        parsed.refuse(("measured",), "is of `fixify train`, and the recipe has neither train: nor language:.")
    try:
        checked = _validated(values)
    except ValidationError:
        told: set[ValuePath] = set()
        for problem in mistakes(_validated, values):
            path = _known_part(problem["loc"], parsed)
            if "options" in problem:
                _tell_conflict(parsed, path, problem)
            elif (which := problem["loc"] if problem["type"] == "missing" else path) not in told:
                told.add(which)
                _tell(parsed, path, problem)
        return None
    return None if parsed.problems else checked


def _validated(values: dict[str, Any]) -> BaseModel:
    # Strict, and as JSON, in which a list can be a tuple: `epochs: true` and `epochs: "3"` are mistakes.
    model = _OF_WORDS if "language" in values else _OF_IMAGES
    return model.model_validate_json(json.dumps(values), strict=True)


def _tell(parsed: Parsed, path: ValuePath, problem: Any) -> None:
    name = str(path[-1]) if path else ""
    if problem["type"] == "extra_forbidden":
        parsed.refuse(path, _unknown(name, path, of_words=("language",) in parsed.places))
    elif problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        parsed.refuse(path, f"needs {problem['loc'][-1]}: what that is has no default.")
    elif problem["type"] in ("model_type", "model_attributes_type"):
        parsed.refuse(path, f"must be a section, `option: value` lines below it, not {shown(problem['input'])}.")
    else:
        parsed.refuse(path, f"{explain(problem)}.")


def _tell_conflict(parsed: Parsed, section: ValuePath, problem: Any) -> None:
    """Options that do not go together: the sentence names them, and the place is that of the first that was written."""
    paths = [(*section, option) for option in problem["options"]]
    if any(path in parsed.places and path[-1] not in problem["input"] for path in paths):
        return  # one of them was refused already, for how it is written
    place = next((parsed.places[path] for path in paths if path in parsed.places), parsed.places[section])
    parsed.problems.append(Problem(place, f"{dotted(section)}: {explain(problem)}."))


def _unknown(name: str, path: ValuePath, *, of_words: bool) -> str:
    elsewhere = [section for section, options in SECTIONS.items() if name in options.model_fields]
    if len(path) == 1:
        if elsewhere:
            return f"belongs into a section: {' or '.join(f'{section}.{name}' for section in elsewhere)}."
        return "is not a section or entry of a recipe" + did_you_mean(name, _OF_IMAGES.model_fields)
    if path[0] == "measured":
        whole, part = (MeasuredWords, Perplexities) if of_words else (Measured, Accuracies)
        return "is not an entry here" + did_you_mean(name, (whole if len(path) == 3 else part).model_fields)
    own = SECTIONS[str(path[0])].model_fields if path[0] in SECTIONS else Recorded.model_fields
    guess = did_you_mean(name, own)
    if elsewhere and guess == ".":
        guess = f"; {elsewhere[0]}.{name} is."
    return f"is not an option{guess}"


def _known_part(location: tuple[str | int, ...], parsed: Parsed) -> ValuePath:
    """pydantic's location without what it adds for unions, and up to the part that was written."""
    path = tuple(location)
    while path and path not in parsed.places:
        path = path[:-1]
    return path


def _sections() -> str:
    return ", ".join(SECTIONS)
