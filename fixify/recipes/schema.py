"""What a recipe may say. Each section has one definition, elsewhere: `convert` is the signature of `fixify.convert`,
`finetune` is `fixify.training.FinetuneOptions`. An option that is added there is an option here."""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fixify.calibrating import MIN_IMAGES
from fixify.checkpoint import DTYPES
from fixify.conversion import convert
from fixify.heads.spec import KINDS
from fixify.recipes.parsing import Parsed, dotted
from fixify.recipes.parsing import Path as ValuePath
from fixify.recipes.problems import Place, Problem
from fixify.training import FinetuneOptions
from fixify.validation import did_you_mean, explain, shown

# What belongs to one conversion and not to a recipe: the files. (Nor do callbacks, `on_...`.)
_OF_ONE_CALL = {"source", "out", "force"}

_HEADS, _DTYPES = ("auto", *KINDS), tuple(DTYPES)

# What the types of `convert` do not say and it would find out only after reading the checkpoint.
_LIMITS: dict[str, Any] = {
    "head": Literal[_HEADS],
    "dtype": Literal[_DTYPES] | None,
    "num_classes": Annotated[int, Field(ge=1)] | None,
    "bits_per_class": Annotated[int, Field(ge=1)] | None,
    "calibrate_images": Annotated[int, Field(ge=MIN_IMAGES)],
    "scale": Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
    "seed": Annotated[int, Field(ge=0, lt=1 << 64)],
}


def convert_option_names() -> tuple[str, ...]:
    """The options of `fixify.convert` that a recipe may set."""
    return tuple(
        name
        for name in inspect.signature(convert).parameters
        if name not in _OF_ONE_CALL and not name.startswith("on_")
    )


def _convert_options() -> type[BaseModel]:
    hints = get_type_hints(convert, include_extras=True)
    parameters = inspect.signature(convert).parameters
    fields: dict[str, Any] = {
        name: (_LIMITS.get(name, _as_text(hints[name])), parameters[name].default) for name in convert_option_names()
    }
    return create_model("ConvertOptions", __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def _as_text(hint: Any) -> Any:
    """The type without `Path`: in YAML a path is text."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = tuple(kind for kind in get_args(hint) if kind is not Path)
        return Union[rest]  # noqa: UP007, of a computed tuple
    return hint


ConvertOptions = _convert_options()

SECTIONS: dict[str, type[BaseModel]] = {"convert": ConvertOptions, "finetune": FinetuneOptions}


def _recipe_model() -> type[BaseModel]:
    sections: dict[str, Any] = {name: (options | None, None) for name, options in SECTIONS.items()}
    return create_model(
        "RecipeFile", __config__=ConfigDict(extra="forbid"), description=(str, ""), expect=(str, ""), **sections
    )


_RecipeFile = _recipe_model()


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
    try:
        # Strict, and as JSON, in which a list can be a tuple: `epochs: true` and `epochs: "3"` are mistakes.
        checked = _RecipeFile.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        told: set[ValuePath] = set()
        for problem in error.errors(include_url=False):
            path = _known_part(problem["loc"], parsed)
            if path not in told:
                told.add(path)
                _tell(parsed, path, problem)
        return None
    return None if parsed.problems else checked


def _tell(parsed: Parsed, path: ValuePath, problem: Any) -> None:
    name = str(path[-1]) if path else ""
    if problem["type"] == "extra_forbidden":
        parsed.refuse(path, _unknown(name, path))
    elif problem["type"] in ("model_type", "model_attributes_type"):
        parsed.refuse(path, f"must be a section, `option: value` lines below it, not {shown(problem['input'])}.")
    elif problem["type"] == "value_error" and path and path[-1] in SECTIONS:
        # Options that do not go together: the sentence names them itself.
        parsed.problems.append(Problem(_blame(parsed, path, explain(problem)), f"{dotted(path)}: {explain(problem)}."))
    else:
        parsed.refuse(path, f"{explain(problem)}.")


def _blame(parsed: Parsed, section: ValuePath, sentence: str) -> Place:
    """Where the first option that a sentence about several of them names was given, else the section."""
    words = sentence.replace("(", " ").replace(")", " ").split()
    paths: list[ValuePath] = [(*section, word) for word in words]
    return next((parsed.places[path] for path in paths if path in parsed.places), parsed.places[section])


def _unknown(name: str, path: ValuePath) -> str:
    elsewhere = [section for section, options in SECTIONS.items() if name in options.model_fields]
    if len(path) == 1:
        if elsewhere:
            return f"belongs into a section: {' or '.join(f'{section}.{name}' for section in elsewhere)}."
        return "is not a section or entry of a recipe" + did_you_mean(name, _RecipeFile.model_fields)
    own = SECTIONS[str(path[0])].model_fields
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
