"""`fixify plan SOURCE`"""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Arch, Json
from fixify.cli.output import Output


def plan(
    source: Annotated[str, typer.Argument(help="A checkpoint (only its names and shapes are read) or a model name.")],
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Is it worth it? What each kind of head would save, and how far apart its codes are."""
    from fixify.cli.common import with_architecture
    from fixify.reporting.costs import plan as run
    from fixify.reporting.tables import kinds_table, savings_table

    output = Output(as_json=as_json)
    made = with_architecture(lambda known: run(source, arch=known), arch, output)
    kinds = [kinds_table(made.kinds)] if made.kinds else []
    output.result(made.to_dict(), made.verdict, savings_table(made.report.savings), *kinds)
