"""`fixify inspect FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output


def inspect(
    file: Annotated[Path, typer.Argument(help="A slim checkpoint, or a language model.")],
    as_json: Json = False,
) -> None:
    """Show what a slim checkpoint says about itself. Only its header is read."""
    from fixify.checkpoints.slim import read_info
    from fixify.language.checkpoint import is_language, read_language_info
    from fixify.reporting.tables import info_table, language_info_table

    output = Output(as_json=as_json)
    if is_language(file):
        about = read_language_info(file)
        output.result({"file": file.name, **about.to_dict()}, language_info_table(file, about))
        return
    info = read_info(file)
    output.result({"file": file.name, **info.model_dump()}, info_table(file, info))
