"""`fixify verify FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output
from fixify.errors import CheckFailed, UsageError


def verify(
    file: Annotated[Path, typer.Argument(help="A slim checkpoint, or a language model.")],
    source: Annotated[
        Path | None, typer.Option(help="The original: compare the backbone bit for bit.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild the codebook, reload the weights, run the model, and say whether all is as the file promises.

    Exits with 3 if something is not.
    """
    from fixify.checkpoints.verify import verify as run
    from fixify.language.checkpoint import is_language, verify_language
    from fixify.reporting.tables import checks_table

    output = Output(as_json=as_json)
    if is_language(file):
        if source is not None:
            raise UsageError(f"{file} is a language model; it was made of no other file.", hint="Leave --source out.")
        checks = verify_language(file)
    else:
        checks = run(file, source=source)
    failed = [check for check in checks if not check.passed]
    output.result(
        {"file": file.name, "passed": not failed, "checks": [vars(check) for check in checks]}, checks_table(checks)
    )
    if failed:
        raise CheckFailed(f"{file} does not hold what it promises: {failed[0].name}: {failed[0].detail}.")
