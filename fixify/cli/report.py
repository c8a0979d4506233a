"""`fixify report MODELS...`"""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Arch, Json
from fixify.cli.output import Output


def report(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Architecture names and checkpoints, slim or ordinary. Default: *.fixed.safetensors here."),
    ] = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Count parameters: what the classifier costs, and what fixing it saves or has saved.

    Names need no weights: `fixify report resnet50 mobilenetv3_small_100`.
    """
    from fixify.cli.slim import slim_files_here
    from fixify.reporting import report as count
    from fixify.reporting.tables import models_table, savings_table

    output = Output(as_json=as_json)
    names = models or slim_files_here("report")
    rows = []
    with output.progress("counting", total=len(names)) as advance:
        for name in names:
            rows.append(count(name, arch=arch))
            advance(note=name)
    tables = [models_table(rows)]
    if len(rows) == 1:
        tables.append(savings_table(rows[0].savings))
    output.result({"models": [row.to_dict() for row in rows]}, *tables)
