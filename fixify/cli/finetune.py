"""`fixify finetune [SLIM] --data DATA`, or a recipe that says both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fixify.cli.options import (
    MACHINE_PANEL,
    ClassMap,
    ClassOrder,
    Force,
    InputKey,
    Json,
    MaxRestarts,
    NprocPerNode,
    Recipe,
    RecipeData,
    Set,
    TargetKey,
)
from fixify.cli.output import Output
from fixify.cli.progress import TensorBoard, Track, watching

_AUGMENTATION = "Augmentation (timm's names)"
_DISTILLATION = "Distillation"


def _option(
    text: str, *names: str, panel: str | None = None, low: float | None = None, high: float | None = None
) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, min=low, max=high)


def finetune(
    context: typer.Context,
    slim: Annotated[
        Path | None, typer.Argument(help="A slim checkpoint. Default: the one in this folder.", show_default=False)
    ] = None,
    data: RecipeData = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder of the run. Default: SLIM's name + -finetuned.", show_default=False),
    ] = None,
    recipe: Recipe = None,
    set_: Set = None,
    max_drop: Annotated[
        float | None, _option("Stop as soon as top-1 is within so many points of the original's; else exit code 3.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original, to measure its top-1 once, for --max-drop.", show_default=False)
    ] = None,
    original_top1: Annotated[float | None, _option("Its top-1 on this data in percent, if you know it.")] = None,
    val_every: Annotated[int | None, _option("Validate every so many updates too, not only each epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, exactly.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Download torch/... data that is not here.")] = False,
    epochs: Annotated[int | None, _option("Passes over the training images. Default: 5.")] = None,
    batch_size: Annotated[
        int | None, _option("Images a step of each process. Default: 64.", "-b", "--batch-size")
    ] = None,
    lr: Annotated[float | None, _option("Peak learning rate. Default: 0.05.")] = None,
    opt: Annotated[str | None, _option("timm's name of the optimiser. Default: sgd (Nesterov).")] = None,
    momentum: Annotated[float | None, _option("Momentum. Default: 0.9.")] = None,
    weight_decay: Annotated[float | None, _option("Weight decay of matrices. Default: 0.0001.")] = None,
    decay_alpha: Annotated[
        bool | None, _option("Decay the head's scale by it too, as in the paper.", "--decay-alpha")
    ] = None,
    loss: Annotated[
        str | None, _option("cross-entropy or the paper's cosine (section 2.2). Default: cross-entropy.")
    ] = None,
    sched: Annotated[str | None, _option("cosine, linear, step, multistep or constant. Default: cosine.")] = None,
    warmup_epochs: Annotated[float | None, _option("Epochs of rising rate. Default: 0.1.")] = None,
    min_lr: Annotated[float | None, _option("Rate at the end. Default: 0.0.")] = None,
    decay_epochs: Annotated[float | None, _option("Epochs between decays (step). Default: 30.0.")] = None,
    decay_milestones: Annotated[
        list[float] | None, _option("Epoch after which the rate decays (multistep); may be given again.")
    ] = None,
    decay_rate: Annotated[float | None, _option("Factor of a decay (step, multistep). Default: 0.1.")] = None,
    head_lr_scale: Annotated[float | None, _option("Rate multiple of the head's scale, bias. Default: 30.0.")] = None,
    ema_decay: Annotated[float | None, _option("Average the weights with this decay, and keep that.")] = None,
    grad_accum: Annotated[int | None, _option("Steps that make one update. Default: 1.")] = None,
    clip_grad: Annotated[float | None, _option("Largest norm of the gradient.")] = None,
    clip_mode: Annotated[str | None, _option("norm, value or agc (adaptive). Default: norm.")] = None,
    layer_decay: Annotated[float | None, _option("Each layer's rate, as a multiple of that of the one above.")] = None,
    freeze: Annotated[int | None, _option("So many first stages do not learn. Default: 0.")] = None,
    nan_skip: Annotated[int | None, _option("Skip at most so many steps that are not finite. Default: 0.")] = None,
    max_unreadable: Annotated[
        float | None, _option("Shard of the images that may be unreadable. Default: 0.01.")
    ] = None,
    seed: Annotated[int | None, _option("Fixes order, augmentation, dropout. Default: 0.")] = None,
    img_size: Annotated[int | None, _option("Side of the images. Default: the checkpoint's.")] = None,
    crop_pct: Annotated[float | None, _option("Center crop in validation. Default: the checkpoint's.")] = None,
    no_aug: Annotated[bool | None, _option("Resize only.", "--no-aug", panel=_AUGMENTATION)] = None,
    scale: Annotated[
        tuple[float, float] | None, _option("Area of the random crop. Default: 0.5 1.0.", panel=_AUGMENTATION)
    ] = None,
    ratio: Annotated[tuple[float, float] | None, _option("Its aspect ratio, two numbers.", panel=_AUGMENTATION)] = None,
    crop_padding: Annotated[
        int | None, _option("Instead: pad so many pixels, crop at random. For small images.", panel=_AUGMENTATION)
    ] = None,
    hflip: Annotated[float | None, _option("Shard mirrored. Default: 0.5.", panel=_AUGMENTATION)] = None,
    vflip: Annotated[float | None, _option("Shard upside down. Default: 0.0.", panel=_AUGMENTATION)] = None,
    color_jitter: Annotated[float | None, _option("Colour jitter. Default: 0.0.", panel=_AUGMENTATION)] = None,
    auto_augment: Annotated[
        str | None, _option("A policy, for example rand-m9-mstd0.5.", "--aa", "--auto-augment", panel=_AUGMENTATION)
    ] = None,
    reprob: Annotated[float | None, _option("Shard partly erased. Default: 0.0.", panel=_AUGMENTATION)] = None,
    mixup: Annotated[float | None, _option("Mixup alpha. Default: 0.0.", panel=_AUGMENTATION)] = None,
    cutmix: Annotated[float | None, _option("CutMix alpha. Default: 0.0.", panel=_AUGMENTATION)] = None,
    smoothing: Annotated[float | None, _option("Label smoothing. Default: 0.0.", panel=_AUGMENTATION)] = None,
    last_block_epochs: Annotated[
        int | None, _option("First train only the last blocks, on features computed once. Default: 0.")
    ] = None,
    distill: Annotated[
        str | None, _option("The teacher, usually the original: a checkpoint or a name.", panel=_DISTILLATION)
    ] = None,
    distill_weight: Annotated[
        float | None, _option("The teacher's share of the loss. Default: 0.5.", panel=_DISTILLATION)
    ] = None,
    distill_temperature: Annotated[
        float | None, _option("Softmax temperature. Default: 4.0.", panel=_DISTILLATION)
    ] = None,
    unlabelled: Annotated[
        bool | None,
        _option("Learn from the teacher alone; DATA may be any images.", "--unlabelled", panel=_DISTILLATION),
    ] = None,
    amp: Annotated[str | None, _option("none, bf16 or fp16. Default: none.", panel=MACHINE_PANEL)] = None,
    channels_last: Annotated[bool | None, _option("Memory format.", "--channels-last", panel=MACHINE_PANEL)] = None,
    compile: Annotated[bool | None, _option("torch.compile the model.", "--compile", panel=MACHINE_PANEL)] = None,
    grad_checkpointing: Annotated[
        bool | None, _option("Save memory, compute twice.", "--grad-checkpointing", panel=MACHINE_PANEL)
    ] = None,
    nproc_per_node: NprocPerNode = None,
    max_restarts: MaxRestarts = None,
    sync_bn: Annotated[
        bool | None, _option("Batch norms over all processes (GPUs).", "--sync-bn", panel=MACHINE_PANEL)
    ] = None,
    dist_bn: Annotated[
        str | None,
        _option("Their running statistics: reduce, broadcast or none. Default: reduce.", panel=MACHINE_PANEL),
    ] = None,
    shard: Annotated[
        bool | None, _option("Spread the model over the processes (FSDP2).", "--shard", panel=MACHINE_PANEL)
    ] = None,
    save_minutes: Annotated[
        float | None,
        _option("Write the state so often, not only after validations. Default: 10.0.", panel=MACHINE_PANEL),
    ] = None,
    workers: Annotated[
        int | None, _option("Loader processes. Default: fits the machine.", "-j", "--workers", panel=MACHINE_PANEL)
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda, mps ... Default: auto.", panel=MACHINE_PANEL)] = None,
    class_map: ClassMap = None,
    class_order: ClassOrder = None,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    track: Track = None,
    tensorboard: TensorBoard = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a slim checkpoint, so that the network fits its fixed classifier.

    A recipe may say what it is about (data, checkpoint, against, distill, class_map); what is given here wins.

    Leaves best.fixed.safetensors and last.fixed.safetensors in the folder of the run, with metrics.jsonl, timm's
    summary.csv, and the state that --resume continues from. The data's classes have to be the checkpoint's; labels go
    by their names, where it has them.
    With --max-drop 0.5 --against ORIGINAL --val-every 100 it trains no longer than it has to.
    """
    from fixify.cli.common import as_typed, chosen_recipe, finetune_defaults, report_run, the_slim_file_here
    from fixify.cli.launch import hand_over
    from fixify.errors import UsageError
    from fixify.training import FinetuneOptions, finetune, stored_options

    output = Output(as_json=as_json)
    chosen = chosen_recipe(recipe, set_ or [])
    said = {"data": data, "checkpoint": slim, "against": against, "distill": distill, "class_map": class_map}
    about: dict[str, Any] = {
        name: getattr(chosen, name, None) if value is None else value for name, value in said.items()
    }
    if about["data"] is None:
        where = "there is no recipe" if recipe is None else f"the recipe {recipe} names none"
        raise UsageError(
            f"What to train on is not said: --data is missing, and {where}.",
            hint="Add --data DATA: a folder with train/ and val/, or a name; or a line `data: DATA` to a recipe.",
        )
    source = Path(about["checkpoint"] or the_slim_file_here("finetune"))
    folder = (
        Path(source.name.removesuffix(".safetensors").removesuffix(".fixed") + "-finetuned") if out is None else out
    )
    given = {
        name: value
        for name, value in context.params.items()
        if name in FinetuneOptions.model_fields and value not in (None, ())
    }
    for name in ("distill_weight", "distill_temperature"):
        if name in given and about["distill"] is None:
            raise UsageError(f"--{name.replace('_', '-')} needs a teacher.", hint="Add --distill ORIGINAL.")
    start = finetune_defaults(output, chosen, stored_options(folder, FinetuneOptions) if resume else None)
    options = start.replace(**given)
    hand_over(nproc_per_node, max_restarts)
    with watching(output, [*(track or []), *(["tensorboard"] if tensorboard else [])]) as tell:
        result = finetune(
            source,
            about["data"],
            folder,
            options,
            against=about["against"],
            distill=about["distill"],
            resume=resume,
            force=force,
            download=download,
            class_map=about["class_map"],
            command=as_typed(),
            on_event=tell,
        )
    report_run(output, result, options, about["data"])
