"""Run `fixify verify FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output
from fixify.errors import CheckFailed


def verify(
    file: Annotated[Path, typer.Argument(help="A slim checkpoint, or a language model.")],
    source: Annotated[
        Path | None, typer.Option(help="The original: compare the backbone bit for bit.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild the codebook, reload the weights, run the model, and check that the file holds what it promises.

    The exit code is 3 if a check fails.
    """
    import fixify
    from fixify.cli.libraries import import_libraries

    import_libraries()
    from fixify.reporting.tables import checks_table

    found = fixify.verify(file, source=source)
    Output(as_json=as_json).result(found.to_dict(), checks_table(found.checks))
    if not found.passed:
        first = found.failed[0]
        raise CheckFailed(f"{file} does not hold what it promises: {first.name}: {first.detail}.")
