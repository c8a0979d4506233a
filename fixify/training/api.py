"""Finetune a slim checkpoint, or train a network from scratch, from file and data names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from fixify._files import sha256_of
from fixify.checkpoints.learned import SUFFIX as LEARNED_SUFFIX
from fixify.checkpoints.learned import save_ordinary
from fixify.checkpoints.slim import SUFFIX as FIXED_SUFFIX
from fixify.checkpoints.slim import Origin, SlimInfo, describe, load, read_info, save
from fixify.data import DataOptions, OpenedData, match_classes, open_train_val, open_unlabelled, override
from fixify.data.preprocessing import channels_of
from fixify.data.seeding import Stream, derive_seed, seeded_globals
from fixify.errors import DataError, FixifyError, FormatError, UsageError
from fixify.metrics import check_input_size
from fixify.models.architectures import Architecture, Preprocessing, build, parse_architecture, preprocessing
from fixify.surgery import HeadConfig, fix_classifier_
from fixify.training import distributed
from fixify.training.events import Listener, Warned
from fixify.training.facts import Inputs, NamedFile, OpenedInputs, Recorded, RunFacts, RunOutput, SaveModel
from fixify.training.last_block import uncalibrated_heads
from fixify.training.options import FinetuneOptions, TrainOptions
from fixify.training.run import FinetuneResult, train_model
from fixify.training.run_folder import BEST_FILE, LAST_FILE, stored_options
from fixify.training.run_records import StartedRun, read_run_file
from fixify.training.starting_point import default_teacher, may_have_teacher
from fixify.training.teacher import ReferenceModel, open_reference


def finetune(
    slim_path: Path | str,
    data_name: str | Path,
    out_dir: Path | str | None = None,
    options: FinetuneOptions | None = None,
    *,
    against: Path | str | None = None,
    distill: Path | str | Literal[False] | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    class_map: Path | str | None = None,
    command: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    on_event: Listener | None = None,
) -> FinetuneResult:
    """Finetune a slim checkpoint; under torchrun in all of its processes.

    The data must have the checkpoint's classes. Labels are matched by class name if the checkpoint has names (see
    `fixify.data.match_classes`). The checkpoint is validated first, then trained and validated after each epoch. If no
    validation is better than the first, the best checkpoint is the one that training started from. Heads with one bit
    per weight or more must be better by more than chance (`fixify.training.starting_point.defends_start`).

    Args:
        slim_path: The checkpoint; it is not changed.
        data_name: See `fixify.data.open_data`.
        out_dir: Folder of the run; None: see `finetune_folder`.
        options: How to train; None takes the defaults, or with `resume` those that the run was started with. The
            defaults of `lr`, `distill_weight` and `freeze_bn` depend on the head.
        against: The original, a checkpoint or a model name. It is evaluated once on the validation data before
            training, and `options.max_drop` is measured from it. None takes the teacher if `max_drop` has no number.
        distill: The teacher, a checkpoint or a model name, usually the original; `options.distill_weight` is its
            weight. With `options.unlabelled` the data may be any images; see `fixify.data.open_unlabelled`. None takes
            the original for most heads that were converted from it (`fixify.training.starting_point.default_teacher`):
            `against`, or the file that the checkpoint was made from if it lies beside it unchanged; without it, for
            heads with one bit per weight or more, the checkpoint itself. False takes none.
        resume: Continue the run in `out_dir`.
        force: Replace the run in `out_dir`.
        download: Allow downloading `torch/...` data.
        class_map: A file that says which class of the data has which label; see `fixify.data.DataOptions`.
        command: What was typed to start the run; recorded.
        recorded: What a recipe recorded of its inputs (`fixify.training.facts.Recorded`); they must be the same.
        on_event: Called with each event.

    Raises:
        FormatError, CodebookMismatchError: the checkpoint cannot be loaded.
        SourceError, ArchitectureError, NoClassifierError: `against` or `distill` cannot be opened.
        DataError: the data is missing, has another layout, or has other classes than the checkpoint.
        ConnectionLost: another process ended.
        TrainingError, OutputExistsError, OutputError: see `fixify.training.train_model`.
        UsageError: the run would overwrite the checkpoint, or `img_size` does not fit the model.
    """
    source = Path(slim_path)
    out = finetune_folder(source) if out_dir is None else Path(out_dir)
    if source.resolve() in {(out / name).resolve() for name in (BEST_FILE, LAST_FILE)}:
        raise UsageError(f"The run in {out} would overwrite {source}.", hint="Choose another folder with -o.")
    if options is None:
        options = (stored_options(out, FinetuneOptions) if resume else None) or FinetuneOptions()
    options = options.for_this_process()
    inputs = Inputs(str(data_name), source, against, distill or None, class_map, Recorded.from_dict(recorded))
    with connected_processes(options, out, on_event) as restarted:
        info = read_info(source)
        if info.is_bare:
            raise UsageError(
                f"{source} is a classifier without a network, and there is nothing to fine-tune.",
                hint="Put its matrix onto a network first: fixify convert MODEL --classifier FILE",
            )
        train, val = _open_matching(info, inputs, options, download=download)
        model, info = _load_slim(source, info, val, options)
        # `info.labels` stay the checkpoint's own names; the facts name the classes as the data does, where it can.
        class_names = val.recorded_names if val.labelled else _class_names(info)
        known, note = None, None
        if distill is None:
            chosen, known = _default_teacher(
                inputs, info, val, options, out, on_event, resume=resume or restarted, model=model
            )
            if chosen is not None:
                inputs = replace(inputs, distill=chosen)
                note = _teacher_note(chosen, source)
        teacher, original = _open_references(inputs, val, options, on_event, teacher=known)
        if original is None and options.max_drop is not None and options.original_top1 is None:
            original = None if inputs.distill == source else teacher  # the start is no measure of what was lost
        opened = OpenedInputs(train, val, info.data_config, original, teacher, inputs, note)
        facts = replace(
            RunFacts.of(opened),
            checkpoint=NamedFile(source.name, sha256_of(source)),
            class_names=None if class_names is None else tuple(class_names),
            class_map=None if class_map is None else NamedFile.of(class_map),
        )

        def save_model(trained: nn.Module, path: Path, record: dict[str, Any]) -> None:
            save(trained, path, force=True, training=record)

        output = RunOutput(out, save_model, FIXED_SUFFIX, resume=resume or restarted, force=force, command=command)
        return train_model(model, opened, options, output, facts=facts, on_event=on_event)


def finetune_folder(slim_path: Path | str) -> Path:
    """Return the folder that `finetune` uses by default: the checkpoint's name and -finetuned, in the current folder.

    >>> str(finetune_folder("models/net.fixed.safetensors"))
    'net-finetuned'
    """
    return Path(Path(slim_path).name.removesuffix(".safetensors").removesuffix(".fixed") + "-finetuned")


def _open_matching(
    info: SlimInfo, inputs: Inputs, options: FinetuneOptions, *, download: bool
) -> tuple[OpenedData, OpenedData]:
    """Open the two splits, with the labels that the checkpoint means."""
    reading = DataOptions(options.class_order, inputs.class_map, options.input_key, options.target_key)
    stored = (info.training or {}).get("class_names"), info.labels
    if options.unlabelled:
        names = _class_names(info) or [str(label) for label in range(info.num_classes)]
        train, val = open_unlabelled(inputs.data, names, seed=options.seed, download=download, options=reading)
        val = match_classes(val, info.num_classes, *stored, subset=True).data
        return replace(train, class_names=val.class_names), val
    train, val = open_train_val(inputs.data, download=download, options=reading)
    # The description says how labels were matched; it is enough to say it of the training images.
    matched = match_classes(val, info.num_classes, *stored, subset=True).data
    return match_classes(train, info.num_classes, *stored).data, replace(matched, description=val.description)


def _class_names(info: SlimInfo) -> list[str] | None:
    """Return the class names of the last training of a checkpoint, else its own."""
    names: list[str] | None = (info.training or {}).get("class_names") or info.labels
    return names


def _load_slim(source: Path, info: SlimInfo, val: OpenedData, options: FinetuneOptions) -> tuple[nn.Module, SlimInfo]:
    """Load the checkpoint, and write the labels and the preprocessing of this run into its info."""
    model = load(source, check=True)
    config = override(info.data_config, img_size=options.img_size, crop_pct=options.crop_pct)
    if options.img_size is not None:
        check_input_size(model, config["input_size"])
    labels = info.labels
    if labels is None:
        labels = val.recorded_names if val.labelled else _class_names(info)
    info = info.model_copy(update={"labels": labels, "preprocessing": config})
    model.fixify_info = info  # type: ignore[assignment]
    return model, info


def _open_references(
    inputs: Inputs,
    data: OpenedData,
    options: FinetuneOptions,
    on_event: Listener | None,
    *,
    teacher: ReferenceModel | None = None,
) -> tuple[ReferenceModel | None, ReferenceModel | None]:
    """Open the teacher, unless it is open, and the original; tell what was read of them and what was left out."""
    if teacher is None and inputs.distill is not None:
        teacher = open_reference(inputs.distill, data, options)
    original = None
    if inputs.against is not None:
        original = teacher if inputs.against == inputs.distill else open_reference(inputs.against, data, options)
    opened = (each for each in (teacher, original) if each is not None)
    for note in dict.fromkeys(note for each in opened for note in each.notes):
        if on_event is not None:
            on_event(Warned(note))
    return teacher, original


def _default_teacher(
    inputs: Inputs,
    info: SlimInfo,
    val: OpenedData,
    options: FinetuneOptions,
    out: Path,
    on_event: Listener | None,
    *,
    resume: bool,
    model: nn.Module,
) -> tuple[Path | str | None, ReferenceModel | None]:
    """Choose the teacher of a run for which nobody named one.

    Rank 0 decides for all processes. One that cannot open the teacher raises an error later; without it, that process
    would train another model.

    Returns:
        Its name, or None; and the model, where it is open already.
    """
    opened: list[ReferenceModel] = []

    def choose() -> Path | str | None:
        if not may_have_teacher(out, resume=resume):
            return None
        calibrated = not uncalibrated_heads(model)
        chosen = default_teacher(Path(inputs.checkpoint or ""), info, inputs.against, options, calibrated=calibrated)
        if chosen is not None and chosen != inputs.against:
            try:
                opened.append(open_reference(chosen, val, options))
            except FixifyError as error:
                if on_event is not None:
                    on_event(Warned(f"{Path(chosen).name} was converted, but cannot teach: {error.message}"))
                return None
        return chosen

    chosen = distributed.on_rank_zero(choose)
    return chosen, opened[0] if opened else None


def _teacher_note(teacher: Path | str, slim: Path) -> str:
    if teacher == slim:
        return (
            f"the original is not known: learning from the labels and the answers of {slim.name} itself (--distill "
            "ORIGINAL: from the original's; --no-distill: from the labels alone)"
        )
    return f"learning from the original's answers: {Path(teacher).name} (--no-distill: from the labels)"


@contextmanager
def connected_processes(options: FinetuneOptions, out: Path, on_event: Listener | None) -> Iterator[bool]:
    """Connect torchrun's processes within the block; yield whether they were restarted and continue the run in `out`.

    Raises:
        ConnectionLost: another process ended.
    """
    with distributed.process_group(options.resolved_device()):
        restarted = is_restarted_run(out)
        if restarted and on_event is not None:
            count, most = (os.environ[f"TORCHELASTIC_{name}"] for name in ("RESTART_COUNT", "MAX_RESTARTS"))
            on_event(Warned(f"A process was lost; all were started again ({count} of {most} times)."))
        yield restarted


def is_restarted_run(out: Path) -> bool:
    """Check whether torchrun restarted its processes (`--max-restarts`), and the same launch began the run in `out`.

    Any other run in the folder is treated as without a restart: it is refused, or replaced.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return distributed.on_rank_zero(lambda: restarted and _launch_of(out) == distributed.launch())


def _launch_of(out: Path) -> str | None:
    try:
        return read_run_file(out, StartedRun).launch
    except FormatError:
        return None


def train_from_scratch(
    data_name: str | Path,
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
    """Train a network from scratch, with its learned classifier or a fixed one (the paper's experiments).

    Under torchrun all of its processes train. With a fixed head the run leaves best.fixed.safetensors and
    last.fixed.safetensors, slim checkpoints. With a learned one it leaves best.safetensors and last.safetensors, whose
    architecture `fixify convert` and the other commands recognise. To compare the two, train twice:
    `options.replace(head="learned")` changes nothing else. A binary head is a learned one for the first steps
    (`options.convert_after`); checkpoints are written from then on.

    Args:
        data_name: See `fixify.data.open_data`.
        out_dir: Folder of the run; see `fixify.training.train_model`.
        options: How to train; None only with `resume`: the options that the run was started with.
        against: A model whose top-1 `options.max_drop` is measured from.
        distill: A teacher of the same classes.
        resume: Continue the run in `out_dir`.
        force: Replace the run in `out_dir`.
        download: Allow downloading `torch/...` data.
        class_map: A file that says which class of the data has which label; see `fixify.data.DataOptions`.
        command: What was typed to start the run; recorded.
        recorded: What a recipe recorded of its inputs (`fixify.training.facts.Recorded`); they must be the same.
        on_event: Called with each event.

    Raises:
        DataError: the data is missing, or has another layout.
        ArchitectureError, HeadSpecError, UsageError: see `new_network`.
        TrainingError, OutputExistsError, OutputError: see `fixify.training.train_model`.
    """
    out = Path(out_dir)
    if options is None:
        if not resume:
            raise UsageError("Training from scratch needs options: TrainOptions.create(model=...).")
        options = stored_options(out, TrainOptions)
    if options is None:
        raise UsageError(
            f"There is no run in {out} yet, so its options are unknown.",
            hint="Give the options: TrainOptions.create(model=...).",
        )
    if options.unlabelled:
        raise UsageError("unlabelled is for finetuning: training from scratch needs labels.")
    options = options.for_this_process()
    inputs = Inputs(str(data_name), None, against, distill, class_map, Recorded.from_dict(recorded))
    with connected_processes(options, out, on_event) as restarted:
        reading = DataOptions(options.class_order, class_map, options.input_key, options.target_key)
        train, val = open_train_val(inputs.data, download=download, options=reading)
        # Validation images may lack some classes; numeric labels alone would then seem to be fewer classes.
        matched = match_classes(val, train.num_classes, train.class_names, subset=True).data
        val = replace(matched, description=val.description)
        network = new_network(options, list(train.class_names), numbered=train.numbered)
        teacher, original = _open_references(inputs, val, options, on_event)
        opened = OpenedInputs(train, val, network.preprocessing, original, teacher, inputs)
        facts = replace(
            RunFacts.of(opened),
            architecture=network.architecture.spelled,
            class_map=None if class_map is None else NamedFile.of(class_map),
        )
        save_model = _saver(network, train.recorded_names)
        output = RunOutput(out, save_model, network.suffix, resume=resume or restarted, force=force, command=command)
        return train_model(network.model, opened, options, output, facts=facts, on_event=on_event)


# The network that is trained from scratch.


@dataclass(frozen=True)
class NewNetwork:
    """A network with random weights.

    Attributes:
        model: The network, with the head that the options ask for.
        architecture: Its architecture.
        preprocessing: timm's data configuration.
        num_classes: Number of classes.
        info: The info of its slim checkpoints; None with a learned head.
        converts: Whether the learned head becomes a fixed one in the run.
    """

    model: nn.Module
    architecture: Architecture
    preprocessing: Preprocessing
    num_classes: int
    info: SlimInfo | None
    converts: bool = False

    @property
    def suffix(self) -> str:
        """File suffix of its checkpoints."""
        return LEARNED_SUFFIX if self.info is None and not self.converts else FIXED_SUFFIX


def new_network(options: TrainOptions, class_names: list[str], *, numbered: bool = False) -> NewNetwork:
    """Build a network with random weights, which depend on the seed but not on the kind of head.

    Args:
        options: Architecture, head, image size and seed.
        class_names: Class names in label order.
        numbered: Whether the names are only the labels, and not recorded.

    Raises:
        ArchitectureError: there is no such architecture, or its arguments are wrong.
        HeadSpecError: there is no such codebook for its number of features and classes.
        UsageError: the network does not take images of this size or number of channels.
        DataError: there is only one class.
    """
    num_classes = len(class_names)
    if num_classes < 2:
        raise DataError(
            f"The training data has one class, {class_names[0]!r}: a classifier has nothing to tell apart.",
            hint="Give a folder whose train/ has a subfolder for each of several classes: --data FOLDER",
        )
    architecture = _architecture(options)
    with seeded_globals(derive_seed(options.seed, 0, Stream.INIT), torch.device("cpu")):
        model = build(architecture, num_classes=num_classes)
    config = override(preprocessing(architecture), img_size=options.img_size, crop_pct=options.crop_pct)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) != channels_of(config):
            raise UsageError(f"{name} must have {channels_of(config)} numbers, one per channel, not {len(values)}.")
    if options.mean is not None:
        config["mean"] = list(options.mean)
    if options.std is not None:
        config["std"] = list(options.std)
    check_input_size(model, config["input_size"])
    labels = None if numbered else class_names
    model.fixify_origin = Origin(architecture, config, labels, {}, "float32")  # type: ignore[assignment]
    info = None if options.head == "learned" or options.converts else _fix_(model, architecture, options)
    return NewNetwork(model, architecture, config, num_classes, info, options.converts)


def _architecture(options: TrainOptions) -> Architecture:
    found = parse_architecture(options.model, **options.model_args)
    if found.tag is not None:
        raise UsageError(
            f"{found.ref} names pretrained weights; training from scratch starts from random ones.",
            hint=f"Write model: {found.library}/{found.name}; or convert the weights and finetune: fixify convert",
        )
    extra: dict[str, Any] = {}
    if options.in_chans is not None:
        if found.library != "torchvision":
            extra["in_chans"] = options.in_chans
        elif options.in_chans != 3:
            raise UsageError(
                f"torchvision's {found.name} takes images of 3 channels, not of {options.in_chans}.",
                hint="Leave out in_chans to give gray images as RGB; or take timm's network of that name.",
            )
    size_argument = _size_argument(found)
    if options.img_size is not None and size_argument is not None:
        extra[size_argument] = options.img_size
    return parse_architecture(found.ref, **{**extra, **found.kwargs})


def _size_argument(architecture: Architecture) -> str | None:
    """Name the builder's argument for the image size; None if the network takes any size."""
    if architecture.library == "torchvision":
        return "image_size" if architecture.name.startswith("vit_") else None
    config = get_pretrained_cfg(architecture.name)
    return "img_size" if config is not None and config.fixed_input_size else None


def _fix_(model: nn.Module, architecture: Architecture, options: TrainOptions) -> SlimInfo:
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
    return describe(model)


def _saver(network: NewNetwork, labels: list[str] | None) -> SaveModel:
    def save_fixed(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
        if network.info is not None:  # else the conversion described it
            model.fixify_info = network.info  # type: ignore[assignment]  # a moving average is another object
        save(model, path, force=True, training=record)

    def save_learned(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
        save_ordinary(
            model,
            path,
            network.architecture,
            num_classes=network.num_classes,
            preprocessing=network.preprocessing,
            labels=labels,
            training=record,
            force=True,
        )

    is_fixed = network.suffix == FIXED_SUFFIX
    chosen: Callable[[nn.Module, Path, dict[str, Any]], None] = save_fixed if is_fixed else save_learned
    if network.info is not None:
        network.model.fixify_info = network.info  # type: ignore[assignment]
    return chosen
