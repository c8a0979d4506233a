"""Going on after torchrun has started all processes again, because one was lost (`--max-restarts`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from fixify._files import sha256_of
from fixify.checkpoints.learned import SUFFIX, save_ordinary
from fixify.checkpoints.slim import SUFFIX as FIXED_SUFFIX
from fixify.checkpoints.slim import Origin, SlimInfo, describe, load, read_info, save
from fixify.data import DataOptions, match_classes, open_train_val, open_unlabelled, override
from fixify.data.preprocessing import channels_of
from fixify.data.seeding import Stream, derive_seed, seeded_globals
from fixify.errors import UsageError
from fixify.metrics import check_input_size
from fixify.models.architectures import Architecture, build, parse_architecture, preprocessing
from fixify.surgery import HeadConfig, fix_classifier_
from fixify.training import distributed
from fixify.training.checkpointing import SaveModel
from fixify.training.events import Listener, Warned
from fixify.training.options import FinetuneOptions, TrainOptions
from fixify.training.run import FinetuneResult, train_model
from fixify.training.run_folder import BEST_FILE, LAST_FILE, RUN_FILE, stored_options
from fixify.training.teacher import open_other


@contextmanager
def joined(options: FinetuneOptions, out: Path, on_event: Listener | None) -> Iterator[bool]:
    """Within the block the processes that torchrun started are connected; gives whether the run in `out` goes on after
    such a restart, and says so.
    """
    with distributed.process_group(options.resolved_device()):
        again = goes_on(out)
        if again and on_event is not None:
            count, most = (os.environ[f"TORCHELASTIC_{name}"] for name in ("RESTART_COUNT", "MAX_RESTARTS"))
            on_event(Warned(f"A process was lost; all were started again ({count} of {most} times)."))
        yield again


def goes_on(out: Path) -> bool:
    """Whether this is such a restart, and the run in the folder is the one that this launch had begun.

    Another run in the folder is as it would be without the restart: refused, or replaced.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return distributed.on_rank_zero(lambda: again and _launch_of(out) == distributed.launch())


def _launch_of(out: Path) -> str | None:
    try:
        found = json.loads((out / RUN_FILE).read_text()).get("launch")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found)


# From a slim checkpoint and a data name to a finetuned slim checkpoint.


def finetune(
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
        out_dir: Folder of the run; see `fixify.training.train_model`.
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
        recorded: See `fixify.training.train_model`.
        on_event: Told what happens.

    Raises:
        FormatError, CodebookMismatchError: the checkpoint cannot be loaded.
        SourceError, ArchitectureError, NoClassifierError: `against` or `distill` cannot be opened.
        DataError: the data is missing, not laid out as expected, or not the checkpoint's.
        ConnectionLost: another process ended.
        TrainingError, OutputExistsError, OutputError: see `fixify.training.train_model`.
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
        return train_model(
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


# Training a network from scratch, with its learned classifier or a fixed one: the paper's experiments.


@dataclass(frozen=True)
class NewNetwork:
    """A network that was not trained yet.

    Attributes:
        model: With the head that the options say.
        architecture: What it is.
        preprocessing: How images become its input; timm's names.
        num_classes: Of its classifier.
        info: What a slim checkpoint says about it; None with a learned head.
    """

    model: nn.Module
    architecture: Architecture
    preprocessing: dict[str, Any]
    num_classes: int
    info: SlimInfo | None

    @property
    def suffix(self) -> str:
        """Of its checkpoints."""
        return SUFFIX if self.info is None else FIXED_SUFFIX


def new_network(options: TrainOptions, class_names: list[str]) -> NewNetwork:
    """Build a network with random weights: of one seed the same, except for the head, whichever head it gets.

    Args:
        options: Which.
        class_names: In label order.

    Raises:
        ArchitectureError: no such architecture, or arguments that do not suit it.
        HeadSpecError: no such codebook for its number of features and classes.
        UsageError: it does not take images of that size or that many channels.
    """
    num_classes = len(class_names)
    architecture = _architecture(options)
    with seeded_globals(derive_seed(options.seed, 0, Stream.INIT), torch.device("cpu")):
        model = build(architecture, num_classes=num_classes)
    config = override(preprocessing(architecture), img_size=options.img_size, crop_pct=options.crop_pct)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None:
            if len(values) != channels_of(config):
                raise UsageError(f"{name} must have {channels_of(config)} numbers, one a channel, not {len(values)}.")
            config[name] = list(values)
    check_input_size(model, config["input_size"])
    info = None if options.head == "learned" else _fix_(model, architecture, config, options, class_names)
    return NewNetwork(model, architecture, config, num_classes, info)


def train_from_scratch(
    data_name: str,
    out_dir: Path | str,
    options: TrainOptions | None = None,
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
    """Train a network from scratch; in every process that torchrun started, if it did.

    With a fixed head the run leaves best.fixed.safetensors and last.fixed.safetensors, slim checkpoints; with a learned
    one best.safetensors and last.safetensors, which `fixify convert` and the others open without being told what they
    are. To compare the two, train twice: `options.replace(head="learned")` differs in nothing else.

    Args:
        data_name: See `fixify.data.open_data`.
        out_dir: Folder of the run; see `fixify.training.train_model`.
        options: How; None only with `resume`: those that the run was started with.
        against: A model whose top-1 `options.max_drop` is measured from.
        distill: A teacher of the same classes.
        resume: Continue the run in `out_dir`.
        force: Replace the run in `out_dir`.
        download: Whether `torch/...` data may be downloaded.
        class_map: A file that says which class of the data has which label; see `fixify.data.DataOptions`.
        command: What was typed, for the record.
        recorded: See `fixify.training.train_model`.
        on_event: Told what happens.

    Raises:
        DataError: the data is missing, or not laid out as expected.
        ArchitectureError, HeadSpecError, UsageError: see `new_network`.
        TrainingError, OutputExistsError, OutputError: see `fixify.training.train_model`.
    """
    out = Path(out_dir)
    if options is None:
        if not resume:
            raise UsageError("Training from scratch needs options: TrainOptions.create(model=...).")
        options = stored_options(out, TrainOptions)
    if options.unlabelled:
        raise UsageError("unlabelled is for finetuning: from scratch, images need labels.")
    options = options.for_this_process()
    with joined(options, out, on_event) as again:
        reading = DataOptions(options.class_order, class_map, options.input_key, options.target_key)
        train, val = open_train_val(data_name, download=download, options=reading)
        # Validation images need not be of every class; of labels that are numbers it then knows fewer.
        matched = match_classes(val, train.num_classes, train.class_names, subset=True).data
        val = replace(matched, description=val.description)
        class_names = list(train.class_names)
        network = new_network(options, class_names)
        return train_model(
            network.model,
            train,
            val,
            network.preprocessing,
            options,
            out,
            save=_saver(network, class_names),
            suffix=network.suffix,
            resume=resume or again,
            force=force,
            facts={
                "architecture": network.architecture.spelled,
                **({} if class_map is None else {"class_map": class_map_facts(class_map)}),
            },
            original=None if against is None else open_other(against, val, options),
            teacher=None if distill is None else open_other(distill, val, options),
            command=command,
            entries={"data": data_name, "class_map": class_map, "against": against, "distill": distill},
            recorded=recorded,
            on_event=on_event,
        )


def _architecture(options: TrainOptions) -> Architecture:
    found = parse_architecture(options.model, **options.model_args)
    if found.tag is not None:
        raise UsageError(
            f"{found.ref} names pretrained weights, and training from scratch starts from random ones.",
            hint=f"Write model: {found.library}/{found.name}; or convert the weights and finetune: fixify convert",
        )
    extra: dict[str, Any] = {}
    if options.in_chans is not None:
        if found.library != "torchvision":
            extra["in_chans"] = options.in_chans
        elif options.in_chans != 3:
            raise UsageError(
                f"torchvision's {found.name} takes images of 3 channels, not of {options.in_chans}.",
                hint="Leave out in_chans: gray images are then given as RGB. Or take timm's network of that name.",
            )
    size_argument = _size_argument(found)
    if options.img_size is not None and size_argument is not None:
        extra[size_argument] = options.img_size
    return parse_architecture(found.ref, **{**extra, **found.kwargs})


def _size_argument(architecture: Architecture) -> str | None:
    """What the builder calls the image size, if the network is built for one."""
    if architecture.library == "torchvision":
        return "image_size" if architecture.name.startswith("vit_") else None
    config = get_pretrained_cfg(architecture.name)
    return "img_size" if config is not None and config.fixed_input_size else None


def _fix_(
    model: nn.Module, architecture: Architecture, config: dict[str, Any], options: TrainOptions, class_names: list[str]
) -> SlimInfo:
    """Give a new network the fixed head that the options say, with codes in class order."""
    head = HeadConfig.create(
        head=options.head,
        seed=options.head_seed,
        match=False,
        alpha=options.head_scale,
        fixed_scale=options.head_fixed_scale,
        bias=options.head_bias,
        standardize=options.head_standardize,
    )
    fix_classifier_(model, head, arch=architecture)
    model.fixify_origin = Origin(architecture, config, class_names, {}, "float32")  # type: ignore[assignment]
    return describe(model)


def _saver(network: NewNetwork, class_names: list[str]) -> SaveModel:
    def save_fixed(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
        model.fixify_info = network.info  # type: ignore[assignment]  # a moving average is another object
        save(model, path, force=True, training=record)

    def save_learned(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
        save_ordinary(
            model,
            path,
            network.architecture,
            num_classes=network.num_classes,
            preprocessing=network.preprocessing,
            labels=class_names,
            training=record,
            force=True,
        )

    chosen: Callable[[nn.Module, Path, dict[str, Any]], None] = save_learned if network.info is None else save_fixed
    if network.info is not None:
        network.model.fixify_info = network.info  # type: ignore[assignment]
    return chosen
