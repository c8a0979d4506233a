"""Print what commands have to say: results on stdout (tables or JSON), everything else on stderr.

Nothing else in fixify writes to a terminal. Much of what is printed comes from files that somebody else made: names of
classes, files, tensors and pickle globals. Characters that a terminal obeys instead of showing are therefore written as
escapes, so that no file can move the cursor, set the title or fill the clipboard.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fixify.errors import FixifyError

if TYPE_CHECKING:
    from rich.progress import Progress

# What a terminal does not show: the controls of ASCII and Latin-1 except tab and newline, characters that reorder or
# hide text, separators of lines and paragraphs, and halves of surrogate pairs (bytes of file names that are not UTF-8),
# which cannot be encoded at all.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Write the characters that a terminal would obey or hide as escapes; keep tabs and newlines.

    >>> print(visible("cat\x1b[2J\u202e"))
    cat\x1b[2J\u202e
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SafeConsole(Console):
    """A console of rich that shows control characters instead of sending them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything printed; rich calls this for each part of a table too."""
        if isinstance(renderable, str):
            renderable = visible(renderable)
        elif isinstance(renderable, Text) and _HIDDEN.search(renderable.plain):
            renderable = self._shown(renderable)  # before it is wrapped, since escapes are longer
        for segment in super().render(renderable, options):
            # The sequences of rich itself, which move the cursor of a progress bar, are segments of their own.
            hidden = segment.control is None and _HIDDEN.search(segment.text)
            yield Segment(visible(segment.text), segment.style) if hidden else segment

    def _shown(self, text: Text) -> Text:
        shown = text.blank_copy()
        for segment in text.render(self):
            shown.append(visible(segment.text), segment.style)
        return shown


def fail(error: FixifyError) -> None:
    """Print an error on stderr: what went wrong, and what to do next. Messages are plain text, not markup."""
    console = SafeConsole(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), visible(error.message)))
    if error.hint is not None:
        console.print(Text(visible(error.hint)))


class Output:
    """The output of one command.

    Args:
        as_json: Print the result as one JSON object on stdout instead of tables.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # No markup: a file or a class may be called "[v2]", which is not a style.
        self._out = SafeConsole(highlight=False, markup=False)
        self.err: Console = SafeConsole(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None

    def result(self, data: Mapping[str, Any], *tables: RenderableType) -> None:
        """Print the result of the command: `data` with `--json`, else `tables`."""
        if self.as_json:
            text = json.dumps(data, indent=2, allow_nan=False)
            sys.stdout.write(text.replace("\x7f", "\\u007f") + "\n")  # the only control that JSON leaves as it is
            return
        for table in tables:
            self._out.print(table)

    def text(self, text: str) -> None:
        """Print text on stdout as it is, without wrapping: for other programs, and for copying."""
        sys.stdout.write(visible(text))

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line on stderr. The terminal wraps long lines."""
        self.err.print(Text(visible(text), style=style), soft_wrap=True)

    def next_step(self, command: str, why: str) -> None:
        """Print what to type next."""
        self.err.print(Text.assemble(("next: ", "bold green"), (visible(command), "bold"), f"   {why}"), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), visible(text)), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        """Show a progress bar on stderr, or nothing if stderr is no terminal.

        Yields:
            A function `advance(steps=1, *, note=None, total=None)`; the note is shown beside the bar.
        """
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

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
        with contextlib.nullcontext() if bar.disable else bar:  # older versions of rich end a bar with an empty line
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
        self.err.print(Text(visible(question) + " "), end="", soft_wrap=True)
        try:
            return input().strip()
        except EOFError:
            self.err.print()
            return None
        finally:
            if self._bar is not None:
                self._bar.start()
