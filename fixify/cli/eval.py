"""Run `fixify eval CKPT --data DATA`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fixify.cli.options import Arch, ClassMap, Data, Device, Download, Ema, Json, takes
from fixify.cli.output import Output


@takes("fixify.training.options:FinetuneOptions", "class_order", "input_key", "target_key", "max_unreadable")
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint (slim or ordinary), an exported .onnx file, or a model name.")
    ],
    data: Data,
    options: dict[str, Any],
    against: Annotated[
        str | None,
        typer.Option(help="Another checkpoint: compare, and count how often both agree.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1, help="Images per step.")] = 64,
    workers: Annotated[
        int | None, typer.Option("-j", "--workers", min=0, help="Loader processes. Default: fits the machine.")
    ] = None,
    device: Device = None,
    amp: Annotated[str, typer.Option(help="Autocast precision: none, bf16 or fp16.")] = "none",
    img_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images in pixels. Default: the checkpoint's.", show_default=False),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="Share kept by the center crop. Default: the checkpoint's.", show_default=False
        ),
    ] = None,
    download: Download = False,
    class_map: ClassMap = None,
    arch: Arch = None,
    ema: Ema = False,
    as_json: Json = False,
) -> None:
    """Measure top-1, top-5, loss and calibration error on a data set, and compare two checkpoints.

    Labels are matched by class name if the checkpoint has names. It can then be measured on some of its classes, and an
    ImageNet checkpoint on folders named by synset.

    With --against it also counts how often both checkpoints agree: on all images, and on those where OTHER is more than
    50 % sure.
    """
    import fixify
    from fixify.cli.common import counting_images, opened
    from fixify.cli.libraries import import_libraries

    import_libraries()
    from fixify.reporting.tables import metrics_table

    output = Output(as_json=as_json)
    with counting_images(output, "evaluating") as (begin, count):
        found = fixify.evaluate(
            opened(checkpoint, arch, output, ema=ema),
            data,
            against=None if against is None else opened(against, arch, output, ema=ema),
            split=split,
            batch_size=batch_size,
            workers=workers,
            device=device,
            amp=amp,
            img_size=img_size,
            crop_pct=crop_pct,
            download=download,
            class_map=class_map,
            on_start=begin,
            on_images=count,
            on_warning=output.warn,
            **options,
        )
    output.result(found.to_dict(), metrics_table(found))
