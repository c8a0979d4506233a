"""Run `fixify identify FILE`."""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output


def identify(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint. Only names and shapes are read.")],
    as_json: Json = False,
) -> None:
    """Find the architecture of a state dict, by its keys and shapes.

    What the file says of itself (timm's arch, config.json, metadata) settles the choice if the tensors fit it.
    """
    import fixify
    from fixify.cli.libraries import import_libraries_for

    import_libraries_for([source])
    from fixify.checkpoints.recognition import REFERENCE_CODE
    from fixify.reporting.tables import candidates_table

    output = Output(as_json=as_json)
    with output.progress("building architectures") as advance:
        identity = fixify.identify(source, on_progress=lambda _done, _total: advance())
    output.result(identity.to_dict(), candidates_table(identity.found))
    if identity.stated is not None:
        output.say(f"The file names {identity.stated.architecture.spelled}, and its tensors fit.")
    elif identity.says is not None:
        output.warn(f"The file names {identity.says}, but its tensors do not fit, or the name is incomplete.")
    if identity.found.narrowed_by is not None:
        output.say(f"Narrowed down by {identity.found.narrowed_by}.")
    if identity.reference_head is not None:
        output.say(f"Its classifier {identity.reference_head} is a fixed one {REFERENCE_CODE}; it stores no weights.")
    for note in identity.notes:
        output.say(note)
    if identity.is_settled:
        output.next_step(f"fixify convert {source}", "replace its classifier")
    else:
        first = identity.found.candidates[0].architecture.spelled
        output.next_step(f"fixify convert {source} --arch {first}", "choose one of them")
