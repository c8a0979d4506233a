"""Run `fixify predict CKPT IMAGES...`."""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Arch, Ema, Json
from fixify.cli.output import Output


def predict(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint (slim or ordinary), an exported .onnx file, or a model name.")
    ],
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    labels: Annotated[
        str | None, typer.Option(help="A file of class names, or imagenet. Default: the checkpoint's.")
    ] = None,
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images that may be unreadable; they are left out.")
    ] = 0.01,
    arch: Arch = None,
    ema: Ema = False,
    as_json: Json = False,
) -> None:
    """Print labels and probabilities of images, preprocessed as the checkpoint says."""
    import fixify
    from fixify.checkpoints import imagenet_labels
    from fixify.checkpoints.open import open_model
    from fixify.cli.common import with_architecture
    from fixify.reporting.tables import predictions_table

    output = Output(as_json=as_json)
    opened = with_architecture(lambda known: open_model(checkpoint, arch=known, ema=ema), arch, output)
    for note in opened.notes:
        output.say(note)
    if labels is None and opened.labels is None:
        which = "--labels imagenet or " if imagenet_labels(opened.num_classes) else ""
        output.say(f"{opened.name} has no class names; numbers are shown. Give names with {which}--labels FILE.")
    with output.progress("classifying", total=len(images)) as advance:
        found = fixify.predict(
            opened,
            images,
            top=top,
            labels=labels,
            max_unreadable=max_unreadable,
            on_image=lambda _: advance(),
            on_warning=output.warn,
        )
    output.result({"predictions": [prediction.to_dict() for prediction in found]}, predictions_table(found))
