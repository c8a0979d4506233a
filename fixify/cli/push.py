"""Run `fixify push REPO [CKPT]`."""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Json
from fixify.cli.output import Output


def push(
    target: Annotated[
        str,
        typer.Argument(
            metavar="REPO",
            help="A repository of the Hugging Face hub, organisation/name; or local-dir:FOLDER for the same files.",
        ),
    ],
    checkpoint: Annotated[
        str | None, typer.Argument(help="A slim checkpoint. Default: the only one here.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; created if it does not exist. Default: main.", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Message of the commit.", show_default=False)
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="E.g. apache-2.0. Default: that of timm's weights, if known.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an existing repository.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a slim checkpoint on the Hugging Face hub, with timm's config.json and a model card.

    Anyone can then load it: fixify.load("hf-hub:organisation/name"), or timm.create_model after `import fixify`.
    """
    import fixify
    from fixify.cli.common import the_slim_file_here
    from fixify.reporting.layout import human_bytes, new_table

    output = Output(as_json=as_json)
    file = checkpoint if checkpoint is not None else the_slim_file_here(f"push {target}")
    done = fixify.push(target, file, private=private, revision=revision, message=message, licence=licence, force=force)
    shown = new_table("", "")
    shown.add_row("published", done.url or done.name)
    for name, size in done.files.items():
        shown.add_row(name, human_bytes(size))
    shown.add_row("base model", done.base_model or "not known")
    shown.add_row("licence", done.licence or "not known")
    output.result(done.to_dict(), shown)
    if done.licence is None:
        output.say("The licence is not known. Give it: --license apache-2.0 --force")
    if done.is_bare:
        output.next_step(f"fixify export {done.name} --head-only", "for ONNX Runtime and NumPy; in Python: fixify.load")
    else:
        output.next_step(f"fixify predict {done.name} IMAGES", "run it from there")
