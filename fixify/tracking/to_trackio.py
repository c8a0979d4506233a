"""trackio: a local database (`trackio show`), or a Space if TRACKIO_SPACE_ID says so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

import trackio

from fixify.tracking.mark import Mark
from fixify.tracking.protocol import TrackedRun

PROJECT = "fixify"


class Trackio:
    """Logs into the project `fixify`."""

    def start(self, run: TrackedRun) -> None:
        """See `Tracker`."""
        self._mark = Mark(run.folder / "trackio.json", resumed=run.resumed)
        with _talking_to_stderr():
            self._run = trackio.init(
                PROJECT,
                name=f"{run.name}-{self._mark.identity}",
                config=dict(run.config),
                resume="allow" if self._mark.is_known else "never",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self._mark.is_new(step):
            self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        with _talking_to_stderr():
            trackio.finish()


@contextlib.contextmanager
def _talking_to_stderr() -> Iterator[None]:
    """trackio prints to stdout, where the command's result goes."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


new = Trackio
