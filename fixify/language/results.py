"""Reading the folders of language models' runs, to put them side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fixify.errors import FormatError
from fixify.language.building import Size
from fixify.language.options import LanguageOptions
from fixify.training.logging import METRICS_FILE, RUN_FILE


@dataclass(frozen=True)
class LanguageRun:
    """What a run left.

    Attributes:
        label: A short name.
        text: What it is of.
        words: What stands for words, in a few words.
        num_layers, num_features, num_words: Of the model.
        perplexity: On the validation text, the lowest of all epochs.
        test_perplexity: On the test text, of that epoch's weights; None if the run did not come to its end.
        epochs: Done.
        size: What the model has.
    """

    label: str
    text: str
    words: str
    num_layers: int
    num_features: int
    num_words: int
    perplexity: float
    test_perplexity: float | None
    epochs: int
    size: Size

    @property
    def is_learned(self) -> bool:
        """Whether embedding and classifier are learned, and not shared: what the others are compared with."""
        return self.words == "learned"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "size": self.size.to_dict()}


def is_language_run(folder: Path) -> bool:
    """Whether a run's folder is that of a language model."""
    try:
        return bool(json.loads((folder / RUN_FILE).read_text()).get("section") == LanguageOptions.section)
    except (OSError, ValueError, AttributeError):
        return False


def read_language_runs(folders: Sequence[Path]) -> list[LanguageRun]:
    """Read runs.

    Raises:
        FormatError: a file of one is missing or damaged, or it has no epoch yet.
    """
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> LanguageRun:
    try:
        about = json.loads((folder / RUN_FILE).read_text())
        options = LanguageOptions.create(**about["options"])
        history = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        size = Size(*(about["size"][name] for name in ("parameters", "fixed", "learned")))
        return LanguageRun(
            label=folder.resolve().name,
            text=about["text"],
            words=options.label,
            num_layers=options.num_layers,
            num_features=options.num_features,
            num_words=about["num_words"],
            perplexity=min(record["val_perplexity"] for record in history),
            test_perplexity=about.get("result", {}).get("test_perplexity"),
            epochs=len(history),
            size=size,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder} is not a whole run of a language model: {error}.") from error
