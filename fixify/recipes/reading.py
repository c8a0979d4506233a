"""Read a recipe by name or file, with `--set` overrides, into checked options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixify._options import did_you_mean
from fixify.conversion_options import ConvertOptions
from fixify.errors import UsageError
from fixify.language.options import LanguageOptions
from fixify.recipes.measured import Measured, MeasuredWords
from fixify.recipes.parsing import Parsed, Place, Problem, RecipeError, parse, read_text
from fixify.recipes.schema import ENTRIES, SECTIONS, check, current_name
from fixify.recipes.shipped import find_recipe
from fixify.training.options import FinetuneOptions, TrainOptions


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. What it does not give is None.

    Attributes:
        name: The name or file it was read from; "--set" if overrides are all there is.
        description: What it does.
        expect: What to expect of it.
        convert: Options of `fixify.convert`.
        finetune: Options of `fixify.finetune`.
        train: Options of training from scratch.
        language: Options of training a language model.
        overridden: The options that overrides gave, for example ("finetune", "lr").
        data: Data name.
        class_map: File with the label of each class.
        checkpoint: The slim checkpoint to finetune.
        against: The original, whose top-1 is measured.
        distill: The teacher.
        recorded: Inputs of the run that wrote the recipe; see `fixify.training.run_folder`.
        measured: What runs of it have measured; of words if it has a language section.
    """

    name: str
    description: str
    expect: str
    convert: ConvertOptions | None
    finetune: FinetuneOptions | None
    train: TrainOptions | None
    overridden: tuple[tuple[str, str], ...]
    language: LanguageOptions | None = None
    data: str | None = None
    class_map: str | None = None
    checkpoint: str | None = None
    against: str | None = None
    distill: str | None = None
    recorded: Mapping[str, str | int] = field(default_factory=dict)
    measured: tuple[Measured, ...] | tuple[MeasuredWords, ...] = ()

    @property
    def sections(self) -> tuple[str, ...]:
        """Names of its sections."""
        return tuple(name for name in SECTIONS if getattr(self, name) is not None)


def read_recipe(source: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything in it.

    Args:
        source: The name of a shipped recipe, or a path; None if overrides are all there is.
        overrides: "SECTION.OPTION=VALUE" each; the value is YAML.

    Raises:
        RecipeError: the file or an override has mistakes; all of them are reported, each with its line.
        UsageError: there is no such recipe, or it cannot be read.

    >>> read_recipe("retrofit", ["finetune.lr=3e-4"]).finetune.lr
    0.0003
    """
    if source is None:
        name, parsed = "--set", Parsed(values={}, places={(): Place()})
    else:
        name, parsed = str(source), parse(read_text(find_recipe(source)))
    overridden = tuple(key for text in overrides if (key := _override(parsed, text)) is not None)
    checked = check(parsed)
    if checked is None:
        raise RecipeError(name, parsed.problems)
    return Recipe(
        name=name,
        description=checked.description.strip(),
        expect=checked.expect.strip(),
        overridden=overridden,
        recorded=checked.recorded.model_dump(exclude_none=True),
        measured=checked.measured,
        **{name: getattr(checked, name) for name in (*SECTIONS, *ENTRIES)},
    )


def _override(parsed: Parsed, text: str) -> tuple[str, str] | None:
    """Put one `--set` into what was parsed.

    Returns:
        Its section and option; None if it is itself a mistake.
    """
    place = Place(override=text)

    def refuse(message: str) -> None:
        parsed.problems.append(Problem(place, message))

    target, equals, value_text = text.partition("=")
    section, dot, option = (part.strip() for part in target.partition("."))
    if not equals or not dot or not option:
        owners = [name for name, options in SECTIONS.items() if section in options.model_fields]
        guess = f"; did you mean {owners[0]}.{section}={value_text}?" if owners and not dot else "."
        refuse(f"Expected SECTION.OPTION=VALUE, for example finetune.lr=3e-4{guess}")
        return None
    if section not in SECTIONS:
        refuse(f"{section!r} is not a section{did_you_mean(section, SECTIONS)}")
        return None
    option = current_name(section, option)
    found = parse(value_text, place, (section, option))
    if isinstance(found.values, dict):
        found.refuse((section, option), "must be one value.")
    _forget(parsed, section, option)
    parsed.problems += found.problems
    parsed.places |= found.places
    if not isinstance(parsed.values, dict):  # the file is no recipe, which `check` reports
        return None
    parsed.places.setdefault((section,), place)
    options = parsed.values.get(section)
    if options is None:
        options = parsed.values[section] = {}
    if isinstance(options, dict) and not found.problems:
        options[option] = found.values
    return section, option


def _forget(parsed: Parsed, section: str, option: str) -> None:
    """Drop what the file gives for an option that is overridden. A mistake in how it is written there stays."""
    gone = [path for path in parsed.places if path[0:1] == (section,) and _is_option(section, path, option)]
    for path in gone:
        del parsed.places[path]
    if isinstance(parsed.values, dict) and isinstance(parsed.values.get(section), dict):
        for path in gone:
            parsed.values[section].pop(path[1], None)


def _is_option(section: str, path: tuple[str | int, ...], option: str) -> bool:
    return len(path) > 1 and current_name(section, str(path[1])) == option


def how_to_use(name: str, section: str) -> str:
    """Return the command that follows a section of a recipe.

    >>> how_to_use("retrofit", "finetune")
    'fixify finetune --recipe retrofit'
    """
    return f"fixify train {name}" if section in ("train", "language") else f"fixify {section} --recipe {name}"


def section_of(recipe: Recipe, section: str) -> Any:
    """Return the section that a command follows.

    Raises:
        UsageError: the recipe does not have it, or an override is for another command.
    """
    wrong = [f"{given}.{option}" for given, option in recipe.overridden if given != section]
    if wrong:
        raise UsageError(f"--set {wrong[0]} is not for `fixify {section}`.", hint="Drop it.")
    found = getattr(recipe, section)
    if found is None:
        has = " and ".join(f"{name}:" for name in recipe.sections)
        raise UsageError(
            f"The recipe {recipe.name} has no {section}: section; it has {has}.",
            hint=f"Use it with: {how_to_use(recipe.name, recipe.sections[0])}",
        )
    return found
