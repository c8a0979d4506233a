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

    By its keys and shapes. What it says of itself (timm's arch, config.json, metadata) settles the choice if it fits.
    """
    from fixify.checkpoints import open_source
    from fixify.checkpoints.learned import REFERENCE_CODE, stated
    from fixify.errors import ArchitectureError
    from fixify.models.identify import Identification
    from fixify.models.identify import identify as run
    from fixify.reporting.tables import candidates_table

    output = Output(as_json=as_json)
    opened = open_source(source, meta=True)
    said, head = stated(opened), opened.reference_code_head
    try:
        with output.progress("building architectures") as advance:
            found = run(opened.shapes, on_progress=lambda _done, _total: advance())
    except ArchitectureError:
        if said is None:
            raise
        found = Identification((said,), "name")  # with arguments that no list has
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
        {
            "file": opened.name,
            "says": opened.facts.architecture,
            "fits": said is not None if opened.facts.architecture else None,
            "by": found.by,
            "candidates": candidates,
            "reference_code_head": None if head is None else head.path,
        },
        candidates_table(found),
    )
    if said is not None:
        output.say(f"It says that it is {said.architecture.spelled}, and fits.")
    elif opened.facts.architecture is not None:
        output.warn(
            f"It says that it is {opened.facts.architecture}, and does not fit it, or the name leaves something open."
        )
    if found.narrowed_by is not None:
        output.say(f"Narrowed down by {found.narrowed_by}.")
    if head is not None:
        output.say(f"Its classifier {head.path} is a fixed one {REFERENCE_CODE}: no weights are stored of it.")
    if said is None and (len(found.candidates) > 1 or opened.facts.architecture is not None):
        first = found.candidates[0].architecture.spelled
        output.next_step(f"fixify convert {source} --arch {first}", "say which it is")
    else:
        output.next_step(f"fixify convert {source}", "replace its classifier")
