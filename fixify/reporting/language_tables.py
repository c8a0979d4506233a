"""Language models side by side, in the columns of the paper's Table 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fixify.language.results import LanguageRun
from fixify.language.run import DIVERGED
from fixify.language.saving import LanguageInfo
from fixify.reporting.tables import human_bytes, new_table, short_digest

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


def language_info_table(path: Path, info: LanguageInfo) -> Table:
    """What the file of a language model says about itself, one fact a row."""
    options, size, training = info.options, info.size, info.training
    made = new_table("", "", title=path.name)
    made.show_header = False
    made.add_row("network", f"{options.num_layers}-layer LSTM (h={options.num_features})")
    made.add_row("words", f"{options.label}; {len(info.words):,} of them: {' '.join(info.words[:6])} ...")
    if info.codebook is not None:
        made.add_row(
            "", f"{info.codebook.construction}, seed {info.codebook.seed}, {short_digest(info.codebook.digest)}"
        )
    made.add_row("learned", f"{size.learned:,} of {size.parameters:,} parameters; {size.share:.2f} % are fixed")
    made.add_row("file", human_bytes(path.stat().st_size))
    loss, epoch = training.get("val_loss"), training.get("epoch")
    if isinstance(loss, float) and loss < DIVERGED and isinstance(epoch, int):
        made.add_row("trained", f"on {training.get('text')}")
        made.add_row("", f"validation perplexity {math.exp(loss):.1f} after epoch {epoch + 1} of {options.epochs}")
    return made


def reference(runs: Sequence[LanguageRun]) -> LanguageRun | None:
    """The one run with learned words; None if there are none or several."""
    learned = [run for run in runs if run.is_learned]
    return learned[0] if len(learned) == 1 else None
