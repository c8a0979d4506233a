"""Language models side by side, in the columns of the paper's Table 2."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fixify.language.results import LanguageRun
from fixify.reporting.tables import new_table

_PAPERS_RATIO = 81.2 / 74.1
"""Of Table 2: perplexity with fixed words over that with learned ones."""


def language_table(runs: Sequence[LanguageRun]) -> Table:
    """One row a run; beside each perplexity, how many times that of learned words it is, if there is one such run."""
    base = reference(runs)
    first = runs[0]
    made = new_table(
        "words", ">validation", ">/ learned", ">test", "># params", ">fixed", ">learned here",
        title=f"{first.num_layers}-layer LSTM (h={first.num_features}), perplexity: {first.text}",
    )  # fmt: skip
    for run in runs:
        made.add_row(
            run.words,
            f"{run.perplexity:.1f}",
            "" if base is None else f"{run.perplexity / base.perplexity:.3f}",
            "" if run.test_perplexity is None else f"{run.test_perplexity:.1f}",
            f"{run.size.parameters:,}",
            f"{run.size.share:.2f} %",
            f"{run.size.learned:,}",
        )
    if base is not None:
        made.caption = f"the paper's ratio, word2vec on WikiText-2: 81.2 / 74.1 = {_PAPERS_RATIO:.3f}"
        made.caption_justify = "left"
    return made


def reference(runs: Sequence[LanguageRun]) -> LanguageRun | None:
    """The one run with learned words; None if there are none or several."""
    learned = [run for run in runs if run.is_learned]
    return learned[0] if len(learned) == 1 else None
