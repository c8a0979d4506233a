"""What a recipe may say. Each section has one definition, elsewhere: `convert` is the signature of `fixify.convert`,
`finetune` is `fixify.training.FinetuneOptions`, `train` is `fixify.training.TrainOptions`, `language` is
`fixify.language.LanguageOptions`. An option that is added there is an option here. Beside the sections a recipe may say
what it is about: data, files, what they were, and what was measured with them."""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from fixify.calibrating import MIN_IMAGES
from fixify.checkpoint import DTYPES
from fixify.conversion import conflicts, convert
from fixify.heads.spec import KINDS
from fixify.language.options import LanguageOptions
from fixify.recipes.measured import Accuracies, Measured
from fixify.recipes.measured_words import MeasuredWords, Perplexities
from fixify.recipes.parsing import Parsed, dotted
from fixify.recipes.parsing import Path as ValuePath
from fixify.recipes.problems import Place, Problem
from fixify.training import FinetuneOptions, TrainOptions
from fixify.validation import did_you_mean, explain, mistakes, refuse, shown

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
    return create_model(
        "ConvertOptions",
        __config__=ConfigDict(extra="forbid", frozen=True),
        __validators__={"fit_together": model_validator(mode="after")(_fit_together)},  # type: ignore[dict-item]
        **fields,
    )


def _fit_together(options: BaseModel) -> BaseModel:
    """Refuse options of `convert` that do not go together, both given here; the other may come by the command line."""
    values = {name: getattr(options, name, None) for name in inspect.signature(conflicts).parameters}
    refuse(each for each in conflicts(**values) if set(each.options) <= options.model_fields_set)  # type: ignore[arg-type]
    return options


def _as_text(hint: Any) -> Any:
    """The type without `Path`: in YAML a path is text."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = tuple(kind for kind in get_args(hint) if kind is not Path)
        return Union[rest]  # noqa: UP007, of a computed tuple
    return hint


ConvertOptions = _convert_options()

SECTIONS: dict[str, type[BaseModel]] = {
    "convert": ConvertOptions,
    "finetune": FinetuneOptions,
    "train": TrainOptions,
    "language": LanguageOptions,
}


class Recorded(BaseModel):
    """What a run had, which repeating it has to find again; see `fixify.training.recipe_file`."""

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
