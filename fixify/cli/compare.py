"""Run `fixify compare ORIGINAL SLIM --data DATA`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fixify.cli.options import Arch, ClassMap, Data, Device, Download, Ema, Force, Json, takes
from fixify.cli.output import Output


@takes("fixify.training.options:FinetuneOptions", "class_order", "input_key", "target_key", "max_unreadable")
def compare(
    original: Annotated[str, typer.Argument(help="The original checkpoint, or a model name.")],
    slim: Annotated[str, typer.Argument(help="The slim checkpoint made from it.")],
    data: Data,
    options: dict[str, Any],
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Take all images of DATA without labels, and count agreement.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images without labels that calibrate the alternatives: a folder, or a data name. Take those of "
            "`fixify convert --calibrate`, if there were any.",
            show_default=False,
        ),
    ] = None,
    calibrate_images: Annotated[int, typer.Option(min=8, help="Images drawn to calibrate.")] = 512,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1, help="Images per step.")] = 64,
    workers: Annotated[
        int | None, typer.Option("-j", "--workers", min=0, help="Loader processes. Default: fits the machine.")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which images calibrate.")] = 0,
    download: Download = False,
    class_map: ClassMap = None,
    arch: Arch = None,
    ema: Ema = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the comparison as a page, too.", metavar="FILE", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare a fixed head with other ways to make the original's classifier small, on the same images.

    The others are its weights as int8, int4, int3 and int2, and, in as many bytes as the fixed head, a truncated SVD
    and pruned weights. With --calibrate there is a second form of each that knows the features of some images.
    """
    import fixify
    from fixify._files import refuse_existing, write_atomic
    from fixify.cli.common import counting_images, opened
    from fixify.reporting.compare_page import compare_page, compare_tables

    output = Output(as_json=as_json)
    if html is not None:
        refuse_existing(html, force=force)
    with counting_images(output, "comparing") as (begin, count):
        found = fixify.compare(
            opened(original, arch, output, ema=ema),
            opened(slim, None, output),
            data,
            unlabelled=unlabelled,
            calibrate=calibrate,
            calibrate_images=calibrate_images,
            split=split,
            batch_size=batch_size,
            workers=workers,
            device=device,
            seed=seed,
            download=download,
            class_map=class_map,
            on_start=begin,
            on_images=count,
            on_warning=output.warn,
            **options,
        )
    if html is not None:
        write_atomic(html, compare_page(found))
    output.result(found.to_dict(), *compare_tables(found))
    for note in found.notes:
        output.say(note)
    if html is not None:
        output.say(f"page: {html}")
