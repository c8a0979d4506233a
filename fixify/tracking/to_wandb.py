"""Weights & Biases; its own environment variables hold (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY ...)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import wandb

from fixify.errors import TrainingError
from fixify.tracking.mark import Mark
from fixify.tracking.protocol import TrackedRun

PROJECT = "fixify"


class WeightsAndBiases:
    """Logs into the project `fixify`, unless WANDB_PROJECT names another."""

    def start(self, run: TrackedRun) -> None:
        """See `Tracker`; raises `TrainingError` if W&B cannot be reached or does not know the user."""
        self._mark = Mark(run.folder / "wandb.json", resumed=run.resumed)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                id=self._mark.identity,
                resume="allow" if self._mark.is_known else None,
                config=dict(run.config),
                dir=str(run.folder),
            )
        except wandb.Error as error:
            raise TrainingError(
                f"W&B cannot be used: {error}", hint="Type wandb login, or set WANDB_MODE=offline."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self._mark.is_new(step):
            self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        self._run.finish()


new = WeightsAndBiases
