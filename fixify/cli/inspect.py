"""Run `fixify inspect FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output


def inspect(
    file: Annotated[Path, typer.Argument(help="A slim checkpoint, an exported .onnx file, or a language model.")],
    as_json: Json = False,
) -> None:
    """Show what a slim checkpoint says about itself. Only its header is read."""
    import fixify
    from fixify.checkpoints.slim import SlimInfo
    from fixify.reporting.tables import about_table

    found = fixify.inspect(file)
    facts = found.model_dump() if isinstance(found, SlimInfo) else found.to_dict()
    Output(as_json=as_json).result({"file": file.name, **facts}, about_table(file, found))
