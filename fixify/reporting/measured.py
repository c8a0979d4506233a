"""Show what runs of the shipped recipes have measured: learned against fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich.table import Table

from fixify.models.architectures import build, parse_architecture
from fixify.models.classifiers import find_classifiers
from fixify.recipes.measured import Measured, MeasuredWords
from fixify.recipes.reading import read_recipe, section_of
from fixify.recipes.shipped import recipe_names
from fixify.reporting.layout import new_table


@dataclass(frozen=True)
class Spread:
    """Mean and range of one number over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute it from one value per seed."""
        return cls(mean(values), min(values), max(values))

    def lines(self, form: str = ".1f") -> str:
        """Write the mean, and below it the range."""
        return f"{self.mean:{form}}\n{self.low:{form}} to {self.high:{form}}"

    def to_dict(self) -> dict[str, float]:
        """Return it as JSON has it."""
        return dict(vars(self))


@dataclass(frozen=True)
class RunHere:
    """One entry `measured` of a recipe for images.

    Attributes:
        recipe: Name of the recipe.
        data_name: The recipe's data, as `--data` names it.
        network: The network that was trained.
        num_features: N of the network.
        standardized: Whether the fixed head standardises its features; the paper's does not.
        measured: The figures.
        signs: Signs per class of a classifier that the runs converted; None if they have a fixed one from the start.
    """

    recipe: str
    data_name: str | None
    network: str
    num_features: int
    standardized: bool
    measured: Measured
    signs: int | None = None

    @property
    def head(self) -> str:
        """What is compared with the learned classifier, in two or three words."""
        if self.signs is not None:
            return f"{self.signs} learned signs"
        return "standardised head" if self.standardized else "paper head"

    @property
    def learned(self) -> Spread:
        """Top-1 of the learned classifier after the last epoch, percent."""
        return Spread.of(self.measured.learned.last)

    @property
    def fixed(self) -> Spread:
        """Top-1 of the fixed classifier after the last epoch, percent."""
        return Spread.of(self.measured.fixed.last)

    @property
    def gap(self) -> Spread:
        """Fixed minus learned of the same seed, points."""
        return Spread.of(self.measured.last_gaps)

    @property
    def changed(self) -> tuple[str, ...]:
        """Other options that the runs changed in the recipe: `lr=0.02`."""
        options = (override.partition(".")[2] for override in self.measured.set)
        return tuple(option for option in options if option.partition("=")[0] not in ("model", "head_standardize"))

    @property
    def command(self) -> str:
        """The command that repeats the runs of the first seed."""
        return self.measured.command(self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, with the gaps and with mean and range over the seeds."""
        return {
            "recipe": self.recipe,
            "command": self.command,
            "network": self.network,
            "num_features": self.num_features,
            "standardized": self.standardized,
            "head": self.head,
            **self.measured.model_dump(mode="json"),
            "gap": {"best": list(self.measured.best_gaps), "last": list(self.measured.last_gaps)},
            "over_seeds": {
                "best": _over_seeds(self.measured.learned.best, self.measured.fixed.best, self.measured.best_gaps),
                "last": _over_seeds(self.measured.learned.last, self.measured.fixed.last, self.measured.last_gaps),
            },
        }


def _over_seeds(learned: Sequence[float], fixed: Sequence[float], gap: Sequence[float]) -> dict[str, Any]:
    named = {"learned": learned, "fixed": fixed, "gap": gap}
    return {name: Spread.of(values).to_dict() for name, values in named.items()}


@dataclass(frozen=True)
class WordsHere:
    """One entry `measured` of a recipe for a language model."""

    recipe: str
    measured: MeasuredWords

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, with the ratios of perplexities."""
        ratios = {words: list(self.measured.ratios(words)) for words in self.measured.others}
        return {"recipe": self.recipe, **self.measured.model_dump(mode="json"), "ratios": ratios}


def run_here() -> tuple[tuple[RunHere, ...], tuple[WordsHere, ...]]:
    """Read every entry `measured` of the shipped recipes: those for images, and those for words.

    Raises:
        RecipeError: a shipped recipe is damaged, or an entry changes options that the recipe does not have.
        FixifyError: the recipes are missing.
    """
    entries = [(name, measured) for name in recipe_names() for measured in read_recipe(name).measured]
    return (
        tuple(_run_here(name, found) for name, found in entries if isinstance(found, Measured)),
        tuple(WordsHere(name, found) for name, found in entries if isinstance(found, MeasuredWords)),
    )


def _run_here(recipe: str, measured: Measured) -> RunHere:
    read = read_recipe(recipe, measured.set)
    options = section_of(read, "train")
    architecture = parse_architecture(options.model, **options.model_args)
    model = build(architecture, num_classes=measured.num_classes, meta=True)
    (site,) = find_classifiers(model, architecture)
    signs = (options.bits_per_class or site.num_features) if options.converts else None
    return RunHere(recipe, read.data, options.model, site.num_features, options.head_standardize, measured, signs)


def run_here_tables(found: Sequence[RunHere]) -> list[Table | str]:
    """Show one row per entry, each number with its range below it, and then how they were measured."""
    title = "Learned against fixed, run here: validation top-1 after the last epoch, %"
    made = new_table("data", "network", ">learned", ">fixed", ">fixed - learned", title=title)
    for row in found:
        made.add_row(
            f"{row.measured.data}\nC = {row.measured.num_classes}, N = {row.num_features}",
            "\n".join((row.network, row.head, *row.changed)),
            row.learned.lines(),
            row.fixed.lines(),
            row.gap.lines("+.1f"),
        )
    made.caption = "mean and range over the seeds; --json has the best epochs too"
    made.caption_justify = "left"
    return [made, "", *(_how(row) for row in found)]


def words_here_tables(found: Sequence[WordsHere]) -> list[Table | str]:
    """Show one row per kind of words, each number with its range below it, and then how they were measured."""
    parts: list[Table | str] = []
    for row in found:
        measured = row.measured
        title = f"Words learned and fixed, run here, perplexity: {measured.data}"
        made = new_table("words", ">validation", ">/ learned", ">test", title=title)
        for words, values in {"learned": measured.learned, **measured.others}.items():
            ratio = "" if words == "learned" else Spread.of(measured.ratios(words)).lines(".3f")
            made.add_row(words, Spread.of(values.val).lines(), ratio, Spread.of(values.test).lines())
        seeds = ", ".join(map(str, measured.seeds))
        parts += [
            made,
            "",
            f"{measured.num_words:,} words; {measured.conditions}; seeds {seeds}. {measured.command}",
            "",
        ]
    return parts


def _how(row: RunHere) -> str:
    seeds = ", ".join(map(str, row.measured.seeds))
    return f"{row.measured.data}, {row.network}: {row.measured.conditions}; seeds {seeds}. {row.command}"
