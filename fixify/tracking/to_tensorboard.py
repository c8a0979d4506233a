"""TensorBoard: event files in the folder `tensorboard` of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from fixify.errors import OutputError
from fixify.tracking.protocol import TrackedRun

FOLDER = "tensorboard"


class TensorBoard:
    """Writes event files; those of a run that was resumed say from which step on the ones before are void."""

    def start(self, run: TrackedRun) -> None:
        """See `Tracker`; raises `OutputError` if the files cannot be written."""
        folder = run.folder / FOLDER
        try:
            if not run.resumed:
                for old in folder.glob("events.out.tfevents.*"):
                    old.unlink()
            self._writer = SummaryWriter(str(folder), purge_step=run.first_step + 1 if run.resumed else None)
        except OSError as error:
            raise OutputError(f"Cannot write {folder}: {error.strerror or error}.") from error
        if not run.resumed:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed leaves what it logged

    def finish(self) -> None:
        """See `Tracker`."""
        self._writer.close()


new = TensorBoard
