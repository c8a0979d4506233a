"""What a tracker is, and how one is had by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fixify.errors import UsageError
from fixify.validation import did_you_mean

TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class TrackedRun:
    """The run that is tracked.

    Attributes:
        folder: Of the run; a tracker may keep its own files there.
        config: What decides the result, JSON-safe.
        resumed: Whether the run goes on. What was logged of it may reach beyond `first_step`, if it crashed.
        first_step: Updates that are done.
    """

    folder: Path
    config: Mapping[str, Any]
    resumed: bool
    first_step: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """Where numbers go. Logging a step of a resumed run again must not show it twice."""

    def start(self, run: TrackedRun) -> None:
        """Begin, or go on with, this run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers; steps never fall, and one step may come in several parts."""

    def finish(self) -> None:
        """Send what is left."""


def open_trackers(names: Iterable[str]) -> list[Tracker]:
    """The trackers of these names, each once.

    Raises:
        UsageError: there is none of a name, or the package that it needs is not installed.
    """
    opened: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise UsageError(
                f"There is no tracker {name!r}{did_you_mean(name, TRACKERS)}",
                hint=f"--track takes {', '.join(TRACKERS)}.",
            )
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # none, or only a folder of that name, as W&B leaves one
            raise UsageError(
                f"--track {name} needs the package {name}, which is not installed.", hint=f"pip install {name}"
            )
        opened.append(importlib.import_module(f"fixify.tracking.to_{name}").new())
    return opened
