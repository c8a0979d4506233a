"""The live view of a run in a terminal: bars for the epoch and the whole run, and below them the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fixify.cli.pace import as_time

_GAP = "   "


class LiveView(Progress):
    """Bars and numbers at the bottom of a terminal; nothing at all elsewhere.

    It fits any width: the bars take what is left, and the numbers go on as many lines as they need.

    Args:
        console: Of stderr.
    """

    def __init__(self, console: Console) -> None:
        self.is_live = console.is_terminal and not console.is_dumb_terminal
        self._numbers: Sequence[tuple[str, str]] = ()
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", justify="right", markup=False),
            console=console,
            transient=True,
            expand=True,
            disable=not self.is_live,
        )
        self.epoch = self.add_hidden("epoch")
        self.whole = self.add_hidden("total")
        self.evaluating = self.add_hidden("validating")

    def add_hidden(self, description: str) -> TaskID:
        """Add a bar that is not shown yet."""
        return self.add_task(description, total=None, visible=False, note="")

    def show_bar(self, task: TaskID, done: int, total: int, *, description: str | None = None, note: str = "") -> None:
        """Show a bar as it is now."""
        self.update(task, description=description, completed=done, total=total, note=note, visible=True)

    def show_training(self, description: str, epoch: tuple[int, int], whole: tuple[int, int]) -> None:
        """Show (done, total) batches of the epoch and of the run."""
        self.show_bar(self.epoch, *epoch, description=description)
        self.show_bar(self.whole, *whole)

    def show_left(self, left: tuple[float, float] | None) -> None:
        """Show seconds left in the epoch and in the run."""
        for task, seconds in zip((self.epoch, self.whole), left or (None, None), strict=True):
            self.update(task, note=f"{as_time(seconds)} left")

    def show_numbers(self, numbers: Sequence[tuple[str, str]]) -> None:
        """Show names with values."""
        self._numbers = numbers

    def hide(self, *tasks: TaskID) -> None:
        """Hide bars; without the run's own, its numbers too."""
        for task in tasks:
            self.update(task, visible=False)
        if self.whole in tasks:
            self._numbers = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws."""
        yield self.make_tasks_table(self.tasks)
        if self._numbers:
            yield _Numbers(self._numbers)


class _Numbers:
    """Names with values, as many on a line as fit; a value is never parted from its name."""

    def __init__(self, numbers: Sequence[tuple[str, str]]) -> None:
        self.numbers = numbers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(no_wrap=True, overflow="ellipsis")
        for name, value in self.numbers:
            part = Text.assemble((f"{name} " if name else "", "dim"), value)
            if line and len(line) + len(_GAP) + len(part) > options.max_width:
                yield line
                line = Text(no_wrap=True, overflow="ellipsis")
            line = Text.assemble(line, _GAP if line else "", part, no_wrap=True, overflow="ellipsis")
        yield line
