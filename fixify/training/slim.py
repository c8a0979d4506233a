"""From a slim checkpoint and a data name to a finetuned slim checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fixify._io import sha256_of
from fixify.checkpoint import load, read_info, save
from fixify.data import DataOptions, match_classes, open_train_val, open_unlabelled, override
from fixify.errors import UsageError
from fixify.evaluation import check_input_size
from fixify.training.events import Listener
from fixify.training.files import BEST_FILE, LAST_FILE
from fixify.training.logging import stored_options
from fixify.training.options import FinetuneOptions
from fixify.training.others import open_other
from fixify.training.restarting import joined
from fixify.training.run import FinetuneResult, finetune


def run_finetune(
    slim_path: Path | str,
    data_name: str,
    out_dir: Path | str,
    options: FinetuneOptions | None = None,
    *,
    against: Path | str | None = None,
    distill: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    class_map: Path | str | None = None,
    command: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    on_event: Listener | None = None,
) -> FinetuneResult:
    """Finetune a slim checkpoint; in every process that torchrun started, if it did.

    The data gets the labels that the checkpoint means, by the names of the classes where it has them (see
    `fixify.data.match_classes`); the checkpoint is validated as it came, then trained and validated after each epoch.

    Args:
        slim_path: The checkpoint; it is not changed.
        data_name: See `fixify.data.open_data`.
        out_dir: Folder of the run; see `fixify.training.finetune`.
        options: None takes the defaults, or with `resume` those the run was started with.
        against: The original, a checkpoint or a model name: evaluated once on the validation data before training, and
            what `options.max_drop` is measured from. None: the teacher, if `max_drop` is given without a number.
        distill: The teacher, a checkpoint or a model name, usually the original; `options.distill_weight` says how much
            it counts. With `options.unlabelled` the data may be any images; see `fixify.data.open_unlabelled`.
        resume: Continue the run in `out_dir`.
        force: Replace the run in `out_dir`.
        download: Whether `torch/...` data may be downloaded.
        class_map: A file that says which class of the data has which label; see `fixify.data.DataOptions`.
        command: What was typed to start the run; recorded.
        recorded: See `fixify.training.finetune`.
        on_event: Told what happens.

    Raises:
        FormatError, CodebookMismatchError: the checkpoint cannot be loaded.
        SourceError, ArchitectureError, NoClassifierError: `against` or `distill` cannot be opened.
        DataError: the data is missing, not laid out as expected, or not the checkpoint's.
        ConnectionLost: another process ended.
        TrainingError, OutputExistsError, OutputError: see `fixify.training.finetune`.
        UsageError: the checkpoint would be overwritten, or `img_size` does not fit the model.
    """
    source, out = Path(slim_path), Path(out_dir)
    if source.resolve() in {(out / name).resolve() for name in (BEST_FILE, LAST_FILE)}:
        raise UsageError(f"The run in {out} would overwrite {source}.", hint="Choose another folder with -o.")
    if options is None:
        options = stored_options(out, FinetuneOptions) if resume else FinetuneOptions()
    options = options.for_this_process()
    with joined(options, out, on_event) as again:
        info = read_info(source)
        stored = (info.training or {}).get("class_names"), info.labels
        stored_names = stored[0] or stored[1]
        reading = DataOptions(options.class_order, class_map, options.input_key, options.target_key)
        if options.unlabelled:
            names = stored_names or [str(label) for label in range(info.num_classes)]
            train, val = open_unlabelled(data_name, names, seed=options.seed, download=download, options=reading)
            val = match_classes(val, info.num_classes, *stored, subset=True).data
            train = replace(train, class_names=val.class_names)
        else:
            train, val = open_train_val(data_name, download=download, options=reading)
            # What is noted of the labels is said of the training images alone.
            matched = match_classes(val, info.num_classes, *stored, subset=True).data
            val = replace(matched, description=val.description)
            train = match_classes(train, info.num_classes, *stored).data
        model = load(source)
        preprocessing = override(info.preprocessing, img_size=options.img_size, crop_pct=options.crop_pct)
        if options.img_size is not None:
            check_input_size(model, preprocessing["input_size"])
        if val.labelled:
            stored_names = list(val.class_names)
        labels = stored_names if info.labels is None else info.labels
        model.fixify_info = info.model_copy(update={"labels": labels, "preprocessing": preprocessing})  # type: ignore[assignment]

        def save_model(trained: nn.Module, path: Path, record: dict[str, Any]) -> None:
            save(trained, path, force=True, training=record)

        facts = {"checkpoint": source.name, "checkpoint_sha256": sha256_of(source), "class_names": stored_names}
        if class_map is not None:
            facts["class_map"] = class_map_facts(class_map)
        teacher = None if distill is None else open_other(distill, val, options)
        original = None if against is None else open_other(against, val, options)
        if original is None and options.max_drop is not None and options.original_top1 is None:
            original = teacher
        return finetune(
            model,
            train,
            val,
            preprocessing,
            options,
            out,
            save=save_model,
            resume=resume or again,
            force=force,
            facts=facts,
            original=original,
            teacher=teacher,
            command=command,
            entries={
                "checkpoint": source,
                "data": data_name,
                "against": against,
                "distill": distill,
                "class_map": class_map,
            },
            recorded=recorded,
            on_event=on_event,
        )


def class_map_facts(class_map: Path | str) -> dict[str, str]:
    """What a run records of its class map."""
    return {"name": Path(class_map).name, "sha256": sha256_of(Path(class_map))}
