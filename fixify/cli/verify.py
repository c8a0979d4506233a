"""`fixify verify FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output
from fixify.errors import CheckFailed


def verify(
    file: Annotated[Path, typer.Argument(help="A slim checkpoint.")],
    source: Annotated[
        Path | None, typer.Option(help="The original: compare the backbone bit for bit.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild the codebook, reload the weights, run the model, and say whether all is as the file promises.

    Exits with 3 if something is not.
    """
    from fixify.reporting.tables import checks_table
    from fixify.verification import verify as run

    output = Output(as_json=as_json)
    checks = run(file, source=source)
    failed = [check for check in checks if not check.passed]
    output.result(
        {"file": file.name, "passed": not failed, "checks": [vars(check) for check in checks]}, checks_table(checks)
    )
    if failed:
        raise CheckFailed(f"{file} does not hold what it promises: {failed[0].name}: {failed[0].detail}.")
