"""The `fixify` program: its commands, and how an error becomes one line and an exit code.

Nothing here, nor at the top of a command's file, imports torch or timm: `fixify --help` and shell completion
answer at once. A command imports what it needs when it runs.
"""

from __future__ import annotations

import inspect as docs
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fixify._version import __version__
from fixify.cli import convert, demo, eval, finetune, identify, inspect, plan, predict, recipes, report, train, verify
from fixify.cli.launch import leave_if_told, may_tell, silence_all_but_first, speak
from fixify.cli.output import fail
from fixify.errors import FixifyError

app = typer.Typer(
    name="fixify",
    help="Replace the classifier of a pretrained image model with a fixed one that is rebuilt from a few bytes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None]) -> None:
    """Add a command; in its help each paragraph is wrapped to the terminal, not as it is in the source."""
    paragraphs = docs.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(name, help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(command)


_add("convert", convert.convert)
_add("finetune", finetune.finetune)
_add("train", train.train)
_add("eval", eval.evaluate)
_add("predict", predict.predict)
_add("report", report.report)
_add("plan", plan.plan)
_add("identify", identify.identify)
_add("inspect", inspect.inspect)
_add("verify", verify.verify)
app.add_typer(recipes.app, name="recipes")
_add("demo", demo.demo)


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
    """Run the program. Exit codes: 0 done, 1 failed, 2 bad usage, 3 a check did not hold, 130 or 143 interrupted."""
    leave_if_told()
    silence_all_but_first()
    try:
        app()
    except FixifyError as error:
        if os.environ.get("FIXIFY_DEBUG"):
            speak()
            raise
        if may_tell(error):
            speak()
            fail(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # `fixify report --all | head`: the reader has what it wanted. Python would complain again at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        speak()  # a mistake of ours, whichever process makes it
        raise
