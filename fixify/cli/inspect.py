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
    from fixify.checkpoints.header import SlimInfo

    found = fixify.inspect(file)
    output = Output(as_json=as_json)
    if isinstance(found, SlimInfo):
        from fixify.reporting.about import slim_table

        output.result({"file": file.name, **found.model_dump()}, slim_table(file, found))
    else:
        from fixify.reporting.tables import language_info_table

        output.result({"file": file.name, **found.to_dict()}, language_info_table(file, found))
