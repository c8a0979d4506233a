"""Who listens to a run: the terminal, and trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fixify.cli.output import Output
from fixify.cli.training_display import TrainingDisplay

if TYPE_CHECKING:
    from fixify.training import Event, Listener

_PANEL = "Watching"

Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Log to tensorboard, trackio or wandb as well; may be given again.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Short for --track tensorboard.", rich_help_panel=_PANEL)
]


@contextlib.contextmanager
def watching(output: Output, trackers: Sequence[str]) -> Iterator[Listener]:
    """The listener of one run or of several in turns; of many processes only the first one has any use for it.

    Raises:
        UsageError: there is no such tracker, or the package that it needs is not installed.
    """
    with contextlib.ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(TrainingDisplay(output))]
        if trackers:
            from fixify.tracking import Tracking, open_trackers

            listeners.append(stack.enter_context(Tracking(open_trackers(trackers))))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield tell
