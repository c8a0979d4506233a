"""`fixify inspect FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output


def inspect(
    file: Annotated[Path, typer.Argument(help="A slim checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show what a slim checkpoint says about itself. Only its header is read."""
    from fixify.checkpoint import read_info
    from fixify.reporting.tables import info_table

    info = read_info(file)
    Output(as_json=as_json).result({"file": file.name, **info.model_dump()}, info_table(file, info))
