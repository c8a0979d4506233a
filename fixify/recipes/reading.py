"""From a recipe's name or file, and `--set`s, to options that were checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixify._options import did_you_mean
from fixify.errors import UsageError
from fixify.language.options import LanguageOptions
from fixify.recipes.parsing import Parsed, Place, Problem, RecipeError, parse, read_text
from fixify.recipes.schema import ENTRIES, SECTIONS, Measured, MeasuredWords, check
from fixify.recipes.shipped import find_recipe
from fixify.training import FinetuneOptions, TrainOptions


@dataclass(frozen=True)
class Recipe:
    """A recipe that was checked.

    Attributes:
        name: How it was named; "--set" if overrides are all there is.
        description: What it does.
        expect: What to expect of it.
        convert: Keyword arguments of `fixify.convert`, those that the recipe gives; None without such a section.
        finetune: Options of `fixify.training.finetune`; None without such a section.
        train: Options of `fixify.training.train_from_scratch`; None without such a section.
        language: Options of `fixify.language.run_language`; None without such a section.
        data: Data name; None if the recipe names none, as for the following.
        class_map: Which class has which label.
        checkpoint: The slim checkpoint to finetune.
        against: The original, whose top-1 is measured.
        distill: The teacher.
        recorded: What the run that wrote the recipe had: SHA-256 of its inputs, images a step; see
            `fixify.training.run_folder`.
        measured: What its comparisons of learned and fixed have measured; of words, if it has a language section.
        overridden: What overrides gave, for example ("finetune", "lr").
    """

    name: str
    description: str
    expect: str
    convert: dict[str, Any] | None
    finetune: FinetuneOptions | None
    train: TrainOptions | None
    overridden: tuple[tuple[str, str], ...]
    language: LanguageOptions | None = None
    data: str | None = None
    class_map: str | None = None
    checkpoint: str | None = None
    against: str | None = None
    distill: str | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[Measured, ...] | tuple[MeasuredWords, ...] = ()

    @property
    def sections(self) -> tuple[str, ...]:
        """Names of the sections that it has."""
        return tuple(name for name in SECTIONS if getattr(self, name) is not None)


def read_recipe(source: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything in it.

    Args:
        source: The name of a shipped recipe, or a path; None for nothing but the overrides.
        overrides: "SECTION.OPTION=VALUE" each, for example "finetune.lr=3e-4"; the value is YAML.

    Raises:
        RecipeError: mistakes in the file or in the overrides, all of them, each with its line.
        UsageError: there is no such recipe, or it cannot be read.
    """
    if source is None:
        name, parsed = "--set", Parsed(values={}, places={(): Place()})
    else:
        name, parsed = str(source), parse(read_text(find_recipe(source)))
    overridden = tuple(key for text in overrides if (key := _override(parsed, text)) is not None)
    checked = check(parsed)
    if checked is None:
        raise RecipeError(name, parsed.problems)
    convert = checked.convert  # type: ignore[attr-defined]
    return Recipe(
        name=name,
        description=checked.description.strip(),  # type: ignore[attr-defined]
        expect=checked.expect.strip(),  # type: ignore[attr-defined]
        convert=None if convert is None else convert.model_dump(exclude_unset=True),
        finetune=checked.finetune,  # type: ignore[attr-defined]
        train=checked.train,  # type: ignore[attr-defined]
        language=checked.language,  # type: ignore[attr-defined]
        overridden=overridden,
        **{name: getattr(checked, name) for name in ENTRIES},
        recorded=checked.recorded.model_dump(exclude_none=True),  # type: ignore[attr-defined]
        measured=checked.measured,  # type: ignore[attr-defined]
    )


def _override(parsed: Parsed, text: str) -> tuple[str, str] | None:
    """Put one `--set` into what was parsed; its section and option, or None if it is itself a mistake."""
    place = Place(override=text)

    def refuse(message: str) -> None:
        parsed.problems.append(Problem(place, message))

    target, equals, value_text = text.partition("=")
    section, dot, option = (part.strip() for part in target.partition("."))
    if not equals or not dot or not option:
        owners = [name for name, options in SECTIONS.items() if section in options.model_fields]
        guess = f"; did you mean {owners[0]}.{section}={value_text}?" if owners and not dot else "."
        refuse(f"It is written SECTION.OPTION=VALUE, for example finetune.lr=3e-4{guess}")
        return None
    if section not in SECTIONS:
        refuse(f"{section!r} is not a section{did_you_mean(section, SECTIONS)}")
        return None
    found = parse(value_text, place, (section, option))
    if isinstance(found.values, dict):
        found.refuse((section, option), "must be one value.")
    _forget(parsed, section, option)
    parsed.problems += found.problems
    parsed.places |= found.places
    if not isinstance(parsed.values, dict):  # the file is no recipe, which is told anyway
        return None
    parsed.places.setdefault((section,), place)
    options = parsed.values.get(section)
    if options is None:
        options = parsed.values[section] = {}
    if isinstance(options, dict) and not found.problems:
        options[option] = found.values
    return section, option


def _forget(parsed: Parsed, section: str, option: str) -> None:
    """Drop what the file gives for an option that is overridden. That it cannot be read there stays a mistake."""
    gone = {path: place for path, place in parsed.places.items() if path[:2] == (section, option)}
    for path in gone:
        del parsed.places[path]
    if isinstance(parsed.values, dict) and isinstance(parsed.values.get(section), dict):
        parsed.values[section].pop(option, None)


def how_to_use(name: str, section: str) -> str:
    """The command that a section of a recipe is for."""
    return f"fixify train {name}" if section in ("train", "language") else f"fixify {section} --recipe {name}"


def section_of(recipe: Recipe, section: str) -> Any:
    """The section that a command needs.

    Raises:
        UsageError: the recipe has none, or an override is about another command.
    """
    wrong = [f"{given}.{option}" for given, option in recipe.overridden if given != section]
    if wrong:
        raise UsageError(f"--set {wrong[0]} does not concern `fixify {section}`.", hint="Leave it out here.")
    found = getattr(recipe, section)
    if found is None:
        has = " and ".join(f"{name}:" for name in recipe.sections)
        raise UsageError(
            f"The recipe {recipe.name} has no {section}: section, only {has}.",
            hint=f"Use it with: {how_to_use(recipe.name, recipe.sections[0])}",
        )
    return found
