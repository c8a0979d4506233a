"""Asking the person at the terminal what a checkpoint cannot show: which of several architectures it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from rich.text import Text

from fixify.cli.output import Output
from fixify.errors import AmbiguousArchitectureError

T = TypeVar("T")


def with_architecture(run: Callable[[str | None], T], arch: str | None, output: Output) -> T:
    """Call `run(arch)`; if several architectures fit and somebody is there to say which, ask, and call it again.

    Raises:
        AmbiguousArchitectureError: several fit, and stdin or stderr is no terminal, or there was no answer.
    """
    try:
        return run(arch)
    except AmbiguousArchitectureError as error:
        if not error.choices or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        chosen = _ask(error, output)
        if chosen is None:
            raise
    return run(chosen)


def _ask(error: AmbiguousArchitectureError, output: Output) -> str | None:
    """The architecture that is chosen, or None if the input ends."""
    names = list(error.choices)
    output.say(error.message.partition("\n")[0])
    for number, (name, facts) in enumerate(error.choices.items(), start=1):
        output.err.print(Text.assemble(f"  {number}  ", (name, "bold"), f": {facts}" if facts else ""))
    while True:
        answer = output.ask(f"Which is it? 1 to {len(names)}, or a name:")
        if answer is None or answer in names:
            return answer
        if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]
        output.say(f"{answer!r} is none of them.")
