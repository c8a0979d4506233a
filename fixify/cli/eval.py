"""`fixify eval CKPT --data DATA`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixify.cli.options import Arch, ClassMap, ClassOrder, Data, Device, Ema, InputKey, Json, TargetKey
from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.checkpoints.open import OpenModel
    from fixify.data import Matched


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A slim or ordinary checkpoint, or a model name.")],
    data: Data,
    against: Annotated[
        str | None, typer.Option(help="Another checkpoint: compare, and say how often they agree.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1, help="Images a step.")] = 64,
    workers: Annotated[
        int | None, typer.Option("-j", "--workers", min=0, help="Loader processes. Default: fits the machine.")
    ] = None,
    device: Device = None,
    amp: Annotated[str, typer.Option(help="none, bf16 or fp16.")] = "none",
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images. Default: the checkpoint's.", show_default=False)
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="Shard kept by the center crop. Default: the checkpoint's.", show_default=False
        ),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download torch/... data that is not here.")] = False,
    class_map: ClassMap = None,
    class_order: ClassOrder = None,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    arch: Arch = None,
    ema: Ema = False,
    as_json: Json = False,
) -> None:
    """Measure top-1, top-5, loss and calibration error on a data set, and compare two checkpoints.

    Labels go by the names of the classes: a checkpoint that has names can be measured on some of its classes, and one
    for ImageNet on folders named by synset.
    With --against the agreement is counted too: over all images, and over those on which OTHER is more than 50 % sure.
    """
    from fixify.checkpoints.open import open_model
    from fixify.cli.common import with_architecture
    from fixify.data import DataOptions, default_workers, make_loader, match_classes, open_data, override
    from fixify.errors import DataError, UsageError
    from fixify.metrics import Agreement, Metrics, check_input_size, compare, resolve_device
    from fixify.metrics import evaluate as measure
    from fixify.reporting.tables import metrics_table

    output = Output(as_json=as_json)
    if split not in ("train", "val", "test"):
        raise UsageError(f"--split is train, val or test, not {split!r}.")
    if amp not in ("none", "bf16", "fp16"):
        raise UsageError(f"--amp is none, bf16 or fp16, not {amp!r}.")
    where = resolve_device(device)
    if class_order not in (None, "natural", "lexical"):
        raise UsageError(f"--class-order is natural or lexical, not {class_order!r}.")
    reading = DataOptions(class_order, class_map, input_key, target_key)  # type: ignore[arg-type]
    opened = open_data(data, split=split, download=download, options=reading)  # type: ignore[arg-type]

    def prepare(ref: str) -> tuple[OpenModel, Matched, dict[str, Any]]:
        model = with_architecture(lambda known: open_model(ref, arch=known, ema=ema), arch, output)
        training = (model.slim.training if model.slim is not None else None) or {}
        matched = match_classes(opened, model.num_classes, training.get("class_names"), model.labels, subset=True)
        preprocessing = override(model.preprocessing, img_size=img_size, crop_pct=crop_pct)
        if img_size is not None:
            check_input_size(model.model, preprocessing["input_size"])
        model.model.to(where)
        return model, matched, preprocessing

    def loader(preprocessing: dict[str, Any]) -> Any:
        return make_loader(
            matched.data,
            preprocessing,
            training=False,
            batch_size=batch_size,
            workers=default_workers(where) if workers is None else workers,
            device=where,
        )

    model, matched, preprocessing = prepare(checkpoint)
    output.say(f"data: {matched.data.description}")
    other, other_matched, other_preprocessing = (None, None, None) if against is None else prepare(against)
    if other is not None and other_matched is not None and other_matched.label_of != matched.label_of:
        raise DataError(
            f"{model.name} and {other.name} have their classes in different orders, so that their answers cannot be "
            f"compared: {matched.data.class_names[:3]} ... and {other_matched.data.class_names[:3]} ...",
            hint="Evaluate them one by one; each gets its own labels.",
        )
    found: list[tuple[str, Metrics]]
    agreement: Agreement | None = None
    with output.progress("evaluating", total=len(opened)) as advance:
        done = 0

        def on_batch(images: int) -> None:
            nonlocal done
            advance(images - done)
            done = images

        if other is None or other_preprocessing is None:
            metrics = measure(model.model, loader(preprocessing), device=where, amp=amp, on_batch=on_batch)  # type: ignore[arg-type]
            found = [(model.name, metrics)]
        else:
            comparison = compare(
                other.model,
                model.model,
                loader(other_preprocessing),
                None if other_preprocessing == preprocessing else loader(preprocessing),
                device=where,
                amp=amp,  # type: ignore[arg-type]
                on_batch=on_batch,
            )
            found = [(model.name, comparison.second), (other.name, comparison.first)]
            agreement = comparison.agreement
    result: dict[str, Any] = {
        "data": opened.name,
        "split": split,
        "models": [{"name": name, **metrics.to_dict()} for name, metrics in found],
    }
    if agreement is not None:
        result["agreement"] = vars(agreement)
    output.result(result, metrics_table(found, agreement))
