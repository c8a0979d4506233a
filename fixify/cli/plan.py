"""Run `fixify plan SOURCE`."""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Arch, Json
from fixify.cli.output import Output


def plan(
    source: Annotated[str, typer.Argument(help="A checkpoint (only names and shapes are read) or a model name.")],
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Estimate the savings of each kind of head before converting, and how far apart its codes are."""
    import fixify
    from fixify.cli.common import with_architecture
    from fixify.cli.libraries import import_libraries_for

    import_libraries_for([source])
    from fixify.reporting.tables import kinds_table, savings_table

    output = Output(as_json=as_json)
    made = with_architecture(lambda known: fixify.plan(source, arch=known), arch, output)
    for note in made.report.notes:
        output.say(note)
    kinds = [kinds_table(made.kinds)] if made.kinds else []
    output.result(made.to_dict(), made.verdict, savings_table(made.report.savings), *kinds)
