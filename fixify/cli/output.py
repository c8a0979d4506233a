"""Print what commands have to say: results on stdout (tables or JSON), everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fixify.errors import FixifyError


def fail(error: FixifyError) -> None:
    """Print an error on stderr: what went wrong, and what to do next. Messages are plain text, not markup."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.hint is not None:
        console.print(Text(error.hint))


class Output:
    """The output of one command.

    Args:
        as_json: Print the result as one JSON object on stdout instead of tables.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # No markup: a file or a class may be called "[v2]", which is not a style.
        self._out = Console(highlight=False, markup=False)
        self.err = Console(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None

    def result(self, data: Mapping[str, Any], *tables: RenderableType) -> None:
        """Print the result of the command: `data` with `--json`, else `tables`."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
            return
        for table in tables:
            self._out.print(table)

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line on stderr. The terminal wraps long lines."""
        self.err.print(Text(text, style=style), soft_wrap=True)

    def next_step(self, command: str, why: str) -> None:
        """Print what to type next."""
        self.err.print(Text.assemble(("next: ", "bold green"), (command, "bold"), f"   {why}"), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        """Show a progress bar on stderr, or nothing if stderr is no terminal.

        Yields:
            A function `advance(steps=1, *, note=None, total=None)`; the note is shown beside the bar.
        """
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.err,
            transient=True,
            disable=not self.err.is_terminal,
        )
        self._bar = bar
        with bar:
            task = bar.add_task(description, total=total, note="")

            def advance(steps: float = 1, *, note: str | None = None, total: float | None = None) -> None:
                known: dict[str, Any] = {} if note is None else {"note": note}
                bar.update(task, advance=steps, total=total, **known)

            yield advance
        self._bar = None

    def ask(self, question: str) -> str | None:
        """Print a question on stderr and read a line; return None if the input ends. A progress bar pauses."""
        if self._bar is not None:
            self._bar.stop()
        self.err.print(Text(question + " "), end="", soft_wrap=True)
        try:
            return input().strip()
        except EOFError:
            self.err.print()
            return None
        finally:
            if self._bar is not None:
                self._bar.start()
