"""Check a parsed recipe and report every mistake with its line.

Each section of a recipe is an option class. Beside the sections a recipe may hold entries: data, files, what they were
when a run wrote the recipe, and what was measured with them.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fixify._options import (
    CONFLICT,
    MISSING,
    NOT_A_SECTION,
    UNKNOWN,
    CheckedOptions,
    Mistake,
    Path,
    did_you_mean,
    mistakes,
    shown,
)
from fixify.conversion_options import ConvertOptions
from fixify.language.options import LanguageOptions
from fixify.recipes.measured import Accuracies, Measured, MeasuredWords, Perplexities
from fixify.recipes.parsing import Parsed, Place, Problem, dotted
from fixify.training.options import FinetuneOptions, TrainOptions

SECTIONS: dict[str, type[CheckedOptions]] = {
    options.section: options for options in (ConvertOptions, FinetuneOptions, TrainOptions, LanguageOptions)
}

ENTRIES = ("data", "class_map", "checkpoint", "against", "distill")
"""What a recipe is about: names and files, as on the command line."""

_RENAMED = {("convert", "scale"): "alpha"}


class Recorded(BaseModel):
    """The inputs of the run that wrote a recipe. Repeating it requires the same; see `fixify.training.run_folder`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint_sha256: str | None = None
    train_listing: str | None = None
    val_listing: str | None = None
    text_sha256: str | None = None
    images_a_step: int | None = Field(default=None, ge=1)


def _recipe_model(measured: type[BaseModel]) -> type[BaseModel]:
    sections: dict[str, Any] = {name: (options | None, None) for name, options in SECTIONS.items()}
    entries: dict[str, Any] = dict.fromkeys(ENTRIES, (str | None, None))
    return create_model(
        "RecipeFile",
        __config__=ConfigDict(extra="forbid", defer_build=True),
        description=(str, ""),
        expect=(str, ""),
        recorded=(Recorded, Recorded()),
        measured=(tuple[measured, ...], ()),  # type: ignore[valid-type]
        **entries,
        **sections,
    )


# A recipe with a language section has measured words, any other has measured images. One model for both would report
# a mistake in `measured` twice.
_OF_IMAGES, _OF_WORDS = _recipe_model(Measured), _recipe_model(MeasuredWords)


def current_name(section: str, option: str) -> str:
    """Return today's name of an option that a recipe may call by an older name.

    >>> current_name("convert", "scale"), current_name("finetune", "scale")
    ('alpha', 'scale')
    """
    return _RENAMED.get((section, option), option)


def check(parsed: Parsed) -> Any:
    """Check what was parsed.

    Returns:
        A pydantic model with one attribute per section and entry; None if there are mistakes, which are then all in
        `parsed.problems`.
    """
    values = parsed.values
    if not isinstance(values, dict):
        if not parsed.problems:
            what = "empty" if values is None else shown(values)
            parsed.refuse((), f"has sections ({', '.join(SECTIONS)}), and this is {what}.")
        return None
    # `finetune:` with every option commented out is a section that changes nothing.
    values = {name: {} if name in SECTIONS and value is None else value for name, value in values.items()}
    if not any((name,) in parsed.places for name in SECTIONS):
        known = ", ".join(SECTIONS)
        parsed.problems.append(Problem(Place(1), f"A recipe needs one or more of these sections: {known}."))
    if ("measured",) in parsed.places and not {("train",), ("language",)} & parsed.places.keys():
        parsed.refuse(("measured",), "needs a train: or a language: section.")
    for section, options in values.items():
        if isinstance(options, dict):
            values[section] = _with_current_names(section, options, parsed)
    try:
        checked = _validated(values)
    except ValidationError:
        told: set[Path] = set()
        for mistake in mistakes(_validated, values):
            path = _written_part(mistake.path, parsed)
            if mistake.kind == CONFLICT:
                _tell_conflict(parsed, path, mistake)
            elif (which := mistake.path if mistake.kind == MISSING else path) not in told:
                told.add(which)
                _tell(parsed, path, mistake)
        return None
    return None if parsed.problems else checked


def _with_current_names(section: str, options: dict[str, Any], parsed: Parsed) -> dict[str, Any]:
    """Rename options that have a new name, their places too."""
    found: dict[str, Any] = {}
    for option, value in options.items():
        name = current_name(section, option)
        if name != option:
            if name in options:
                parsed.refuse((section, option), f"is the old name of {name}, which is given as well.")
                continue
            for path, place in list(parsed.places.items()):
                if path[:2] == (section, option):
                    renamed: Path = (section, name, *path[2:])
                    parsed.places[renamed] = place
        found[name] = value
    return found


def _validated(values: dict[str, Any]) -> BaseModel:
    # Strict, and as JSON, in which a list can be a tuple: `epochs: true` and `epochs: "3"` are mistakes.
    model = _OF_WORDS if "language" in values else _OF_IMAGES
    return model.model_validate_json(json.dumps(values), strict=True)


def _tell(parsed: Parsed, path: Path, mistake: Mistake) -> None:
    name = str(path[-1]) if path else ""
    if mistake.kind == UNKNOWN:
        parsed.refuse(path, _unknown(name, path, of_words=("language",) in parsed.places))
    elif mistake.kind == MISSING and isinstance(mistake.path[-1], str):
        parsed.refuse(path, f"requires {mistake.path[-1]}.")
    elif mistake.kind in NOT_A_SECTION:
        parsed.refuse(path, f"must be a section, `option: value` lines below it, not {shown(mistake.given)}.")
    else:
        parsed.refuse(path, f"{mistake.text}.")


def _tell_conflict(parsed: Parsed, section: Path, mistake: Mistake) -> None:
    """Report a conflict at the first of its options that was written."""
    paths = [(*section, option) for option in mistake.options]
    if any(path in parsed.places and path[-1] not in mistake.given for path in paths):
        return  # one of them was refused already, for how it is written
    place = next((parsed.places[path] for path in paths if path in parsed.places), parsed.places[section])
    parsed.problems.append(Problem(place, f"{dotted(section)}: {mistake.text}."))


def _unknown(name: str, path: Path, *, of_words: bool) -> str:
    elsewhere = [section for section, options in SECTIONS.items() if name in options.model_fields]
    if len(path) == 1:
        if elsewhere:
            return f"belongs in a section: {' or '.join(f'{section}.{name}' for section in elsewhere)}."
        return "is not a section or entry of a recipe" + did_you_mean(name, _OF_IMAGES.model_fields)
    if path[0] == "measured":
        whole, part = (MeasuredWords, Perplexities) if of_words else (Measured, Accuracies)
        return "is not an entry here" + did_you_mean(name, (whole if len(path) == 3 else part).model_fields)
    own = SECTIONS[str(path[0])].model_fields if path[0] in SECTIONS else Recorded.model_fields
    guess = did_you_mean(name, own)
    if elsewhere and guess == ".":
        guess = f"; {elsewhere[0]}.{name} is."
    return f"is not an option{guess}"


def _written_part(location: Path, parsed: Parsed) -> Path:
    """Return pydantic's location without what it adds for unions, up to the last part that was written."""
    path = tuple(location)
    while path and path not in parsed.places:
        path = path[:-1]
    return path
