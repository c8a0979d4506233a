"""Run `fixify export CKPT`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fixify.cli.options import Force, Json, Out, takes
from fixify.cli.output import Output


@takes("fixify.exporting.options:ExportOptions")
def export(
    checkpoint: Annotated[str, typer.Argument(help="A slim checkpoint.")],
    options: dict[str, Any],
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a slim checkpoint as ONNX, for torch.export, or for stock timm, so that it runs without fixify.

    The head stays small: Hadamard codes are two small matrices, binary codes one bit per weight.

    The result is compared with PyTorch before it is written; if it does not agree, the exit code is 3 and there is no
    file.
    """
    import fixify
    from fixify.cli.libraries import import_libraries

    import_libraries()
    from fixify.reporting.tables import export_table

    output = Output(as_json=as_json)
    done = fixify.export(checkpoint, out, force=force, on_warning=output.warn, **options)
    for note in done.notes:
        output.say(note)
    output.result(done.to_dict(), export_table(done))
    output.say(f"Wrote {', '.join(map(str, done.paths))}.")
    if done.paths[0].suffix == ".onnx" and not done.paths[1:] and options.get("top_k") is None:
        output.next_step(f"fixify predict {done.paths[0]} IMAGES", "run it")
