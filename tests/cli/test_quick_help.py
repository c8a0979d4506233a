"""The help without the modules that it does not need."""

from __future__ import annotations

import subprocess
import sys

HELP = """
import sys
from fixify.cli import app
if {plain}:
    app.defer_unused_imports = lambda: None
sys.argv = ["fixify", *{arguments}]
app.main()
"""


def shown(*arguments: str, plain: bool) -> str:
    code = HELP.format(plain=plain, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_help_looks_as_typer_prints_it() -> None:
    for arguments in (["--help"], ["convert", "--help"]):
        assert shown(*arguments, plain=False) == shown(*arguments, plain=True) != ""


def test_what_is_left_out_is_imported_when_it_is_used() -> None:
    code = """
import sys
from fixify.cli.quick_help import defer_unused_imports
defer_unused_imports()
import typer.rich_utils
assert "rich.markdown" not in sys.modules and "rich.traceback" not in sys.modules
from rich.markdown import Markdown
assert typer.rich_utils.Markdown is not Markdown
made = typer.rich_utils.Markdown("# title")
assert type(made) is Markdown and isinstance(made, typer.rich_utils.Markdown)
try:
    1 / 0
except ZeroDivisionError as error:
    trace = typer.rich_utils.Traceback.from_exception(type(error), error, error.__traceback__)
from rich.traceback import Traceback
assert type(trace) is Traceback
defer_unused_imports()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
