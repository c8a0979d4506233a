"""The `fixify` program: its commands, and how an error becomes one line and an exit code.

Nothing here, nor at the top of a command's file, imports torch or timm, so `fixify --help` and shell completion are
quick. A command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fixify._version import __version__
from fixify.cli import (
    bench,
    classes,
    compare,
    convert,
    demo,
    eval,
    export,
    finetune,
    identify,
    inspect,
    plan,
    predict,
    push,
    recipes,
    report,
    train,
    verify,
)
from fixify.cli.launch import leave_if_told, may_tell, silence_all_but_first, speak
from fixify.cli.options import with_options
from fixify.cli.output import fail, visible
from fixify.cli.quick_help import defer_unused_imports
from fixify.errors import FixifyError, OutputError

COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert.convert,
    "finetune": finetune.finetune,
    "train": train.train,
    "eval": eval.evaluate,
    "predict": predict.predict,
    "compare": compare.compare,
    "export": export.export,
    "push": push.push,
    "report": report.report,
    "plan": plan.plan,
    "identify": identify.identify,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "demo": demo.demo,
}
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

_UsageError: Any = typer.BadParameter.__base__  # click's, or that of the copy of click in newer versions of typer


@contextlib.contextmanager
def _showing_arguments() -> Iterator[None]:
    """Make the control characters visible that a complaint of the parser repeats."""
    try:
        yield
    except _UsageError as error:
        error.message = visible(error.message)
        raise


class _Commands(TyperGroup):
    """The program itself, which looks up a command."""

    def resolve_command(self, *args: Any, **kwargs: Any) -> Any:
        """Find the command that is named first."""
        with _showing_arguments():
            return super().resolve_command(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> None:
        """Print the help."""
        defer_unused_imports()
        super().format_help(*args, **kwargs)


class _Command(TyperCommand):
    """A command that gets its options when they are first read.

    The list of commands reads none of them. Generating them for all commands would import pydantic, a third of the time
    that `fixify --help` takes.
    """

    @cached_property
    def _built(self) -> Any:
        alone = typer.Typer(add_completion=False, **_SETTINGS)
        alone.command(self.name)(with_options(COMMANDS[self.name or ""]))
        return typer.main.get_command(alone)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments. A complaint repeats them, and a shell puts names of files there for a `*`."""
        with _showing_arguments():
            return super().make_context(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> None:
        """Print the help."""
        defer_unused_imports()
        super().format_help(*args, **kwargs)

    @property
    def params(self) -> Any:
        return self._built.params

    @params.setter
    def params(self, _: Any) -> None:
        """Ignore the parameters of `_listed`."""

    @property
    def callback(self) -> Any:
        return self._built.callback

    @callback.setter
    def callback(self, _: Any) -> None:
        """Ignore `_listed`."""


def _help(command: Callable[..., None]) -> str:
    """Return the help, with one line per paragraph: the terminal wraps it, not the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(command.__doc__ or "").split("\n\n"))


def _listed() -> None:
    """Stand for a command in the list of commands."""


app = typer.Typer(
    name="fixify",
    cls=_Commands,
    help="Replace the classifier of a pretrained image model with a fixed one that is rebuilt from a few bytes.",
    no_args_is_help=True,
    **_SETTINGS,
)
for _name, _command in COMMANDS.items():
    app.command(_name, cls=_Command, help=_help(_command))(_listed)
app.add_typer(recipes.app, name="recipes")
app.add_typer(bench.app, name="bench")
app.add_typer(classes.app, name="classes")


def _print_version(value: bool) -> None:
    if value:
        print(f"fixify {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Replace the classifier of a pretrained image model with a fixed one that is rebuilt from a few bytes."""


def main() -> None:
    """Run the program.

    Exit codes: 0 done, 1 failed, 2 bad usage, 3 a check failed, 129, 130, 138 or 143 interrupted by SIGHUP, SIGINT,
    SIGUSR1 or SIGTERM.
    """
    # pydantic would read the metadata of every installed package to look for plugins, which no model here has.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    leave_if_told()
    silence_all_but_first()
    try:
        _call_app()
    except FixifyError as error:
        if os.environ.get("FIXIFY_DEBUG"):
            speak()
            raise
        if may_tell(error):
            speak()
            _tell(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # `fixify report --all | head`: the reader has what it wanted. Python would complain again at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        speak()  # a defect of fixify, whichever process it is in
        raise


def _call_app() -> None:
    """Run the command and write out what it printed.

    Raises:
        OutputError: stdout or stderr cannot be written, because the disk is full or the terminal is gone. Files that
            cannot be written raise it elsewhere.
    """
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # `>&-`
                sys.stdout.flush()  # when the process ends, Python could only print a traceback
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        _drop_what_cannot_be_written()
        raise OutputError(f"Cannot write the output: {error.strerror}.") from error


def _drop_what_cannot_be_written() -> None:
    """Send a stream that cannot be written to the null device: Python would try again when the process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(error: FixifyError) -> None:
    """Print an error, if there is still something to print on; the exit code says it too."""
    try:
        fail(error)
    except OSError as failed:
        if failed.errno not in _CANNOT_WRITE:
            raise
        _drop_what_cannot_be_written()
