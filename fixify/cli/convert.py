"""`fixify convert SOURCE`"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fixify.cli.options import Arch, Ema, Force, Json, Out, Seed
from fixify.cli.output import Output


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint (.pth, .pt, .safetensors) or a model name.")],
    out: Out = None,
    head: Annotated[str, typer.Option(help="hadamard, orthogonal, or auto: hadamard where one is known.")] = "auto",
    seed: Seed = 0,
    arch: Arch = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="A new label set of this size. Default: the classes of SOURCE.")
    ] = None,
    match: Annotated[
        bool, typer.Option("--match/--no-match", help="Give each class the code nearest to its old class vector.")
    ] = True,
    scale: Annotated[
        float | None, typer.Option(min=0, help="Initial scale alpha. Default: softmax reaches 0.95 at cosine 1.")
    ] = None,
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="Keep one learned bias a class.")] = True,
    standardize: Annotated[
        bool, typer.Option("--standardize/--no-standardize", help="Standardise each feature before normalising.")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Store the backbone as float32, float16 or bfloat16. Default: as it is.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A file of class names, or imagenet. Default: those that came with SOURCE.")
    ] = None,
    ema: Ema = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace the classifier of a checkpoint by a fixed one, and write the slim checkpoint.

    The backbone is kept bit for bit. No data is needed; accuracy comes back with `fixify finetune`.
    """
    from fixify.cli.asking import with_architecture
    from fixify.conversion import convert as run
    from fixify.reporting.tables import removed_line, savings_table

    output = Output(as_json=as_json)
    with_options = partial(
        run,
        source,
        out,
        head=head,
        seed=seed,
        num_classes=num_classes,
        match=match,
        scale=scale,
        bias=bias,
        standardize=standardize,
        dtype=dtype,
        labels=labels,
        ema=ema,
        force=force,
    )
    done = with_architecture(lambda known: with_options(arch=known), arch, output)
    for note in done.notes:
        output.say(note)
    savings = done.savings.to_dict()
    output.result(
        {"path": str(done.path), "notes": done.notes, "savings": savings, "info": done.info.model_dump()},
        removed_line(done.savings),
        savings_table(done.savings),
    )
    output.say(f"Wrote {done.path}.")
    output.next_step(f"fixify finetune {done.path} --data DATA", "recover the accuracy (DATA has train/ and val/)")
