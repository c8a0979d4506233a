"""`fixify identify FILE`"""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output


def identify(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint. Only its names and shapes are read.")],
    as_json: Json = False,
) -> None:
    """Which architecture is this state dict?

    What the file says of itself is shown as well, but not believed: only its keys and shapes count here.
    """
    from fixify.reporting.tables import candidates_table
    from fixify.sources import open_source
    from fixify.zoo.identify import identify as run

    output = Output(as_json=as_json)
    opened = open_source(source, meta=True)
    with output.progress("building architectures") as advance:
        found = run(opened.shapes, on_progress=lambda _done, _total: advance())
    candidates = [
        {
            "architecture": candidate.architecture.to_dict(),
            "num_classes": candidate.num_classes,
            "aliases": list(candidate.aliases),
            "differences": dict(candidate.differences),
        }
        for candidate in found.candidates
    ]
    output.result(
        {"file": opened.name, "says": opened.architecture, "by": found.by, "candidates": candidates},
        candidates_table(found),
    )
    if opened.architecture is not None:
        output.say(f"The file says it is {opened.architecture}.")
    if found.scheme is not None:
        scheme = found.scheme
        output.say(f"Its key names are those of {scheme.name}: {scheme.trait} {scheme.value} ({scheme.provenance}).")
    if len(found.candidates) > 1:
        output.next_step(f"fixify convert {source} --arch {found.candidates[0].architecture.ref}", "say which it is")
    else:
        output.next_step(f"fixify convert {source}", "replace its classifier")
