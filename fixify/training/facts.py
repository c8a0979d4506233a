"""Dataclasses that describe one run: its inputs, the facts that identify it, its machine and its output.

`Inputs` holds names as a person gave them, `OpenedInputs` what they opened to. `RunFacts` identifies the run: it is
written to run.json and to the state, and compared when the run is resumed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import nn

from fixify._files import sha256_of
from fixify._values import counted
from fixify._version import __version__
from fixify.checkpoints.slim import SUFFIX
from fixify.data import OpenedData, listing_digest
from fixify.data.preprocessing import channels_of
from fixify.errors import NoClassifierError, TrainingError, UsageError
from fixify.heads import FixedClassifier
from fixify.models.architectures import Preprocessing
from fixify.models.classifiers import find_classifiers
from fixify.savings import count_bytes, count_parameters
from fixify.training import distributed
from fixify.training.options import FinetuneOptions
from fixify.training.teacher import ReferenceModel

SaveModel = Callable[[nn.Module, Path, dict[str, Any]], object]
"""Write a model to a path, replacing what is there, with the JSON-safe record of its training."""


@dataclass(frozen=True)
class Recorded:
    """What a recipe records of the inputs of the run that wrote it, so that a repetition can check them.

    Attributes:
        checkpoint_sha256: SHA-256 of the checkpoint that was finetuned.
        train_listing, val_listing: SHA-256 of the list of images of each split.
        text_sha256: SHA-256 of the text of a language model.
        images_a_step: Images per step of all processes together.
    """

    checkpoint_sha256: str | None = None
    train_listing: str | None = None
    val_listing: str | None = None
    text_sha256: str | None = None
    images_a_step: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Recorded:
        """Read what `to_dict` returned; None and missing keys mean that nothing was recorded."""
        values = values or {}
        return cls(**{each.name: values.get(each.name) for each in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Return the values that were recorded, JSON-safe.

        >>> Recorded(train_listing="ab", images_a_step=64).to_dict()
        {'train_listing': 'ab', 'images_a_step': 64}
        """
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_inputs(self, now: Recorded) -> None:
        """Refuse to repeat a run on other inputs.

        Args:
            now: The inputs of the run that is about to start; only those that it has are compared.

        Raises:
            TrainingError: an input has changed since the recipe was written.
        """
        for name, subject in _RECORDED_INPUTS.items():
            was, found = getattr(self, name), getattr(now, name)
            if was is not None and found is not None and found != was:
                raise TrainingError(
                    f"{subject} not what this recipe recorded (SHA-256 {was[:12]}... then, {found[:12]}... now). The "
                    "run would not repeat.",
                    hint="Restore the original input; or drop `recorded` from the recipe to train on the new one.",
                )

    def check_batches(self, options: FinetuneOptions) -> None:
        """Refuse to repeat a run with another number of images per step.

        Raises:
            TrainingError: all processes together would have more or fewer images per step than the recorded run.
        """
        processes, together = distributed.world_size(), self.images_a_step
        if together is None or together == options.batch_size * processes:
            return
        divides = together % processes == 0
        raise TrainingError(
            f"The run that wrote this recipe had {counted(together, 'image')} per step. This one would have "
            f"{options.batch_size * processes} ({processes} x {options.batch_size}) and would not repeat it.",
            hint=(f"Add --set {options.section}.batch_size={together // processes}, or start" if divides else "Start")
            + " as many processes with --nproc-per-node; or drop `recorded.images_a_step` from the recipe.",
        )


_RECORDED_INPUTS = {
    "checkpoint_sha256": "The checkpoint is",
    "train_listing": "The training images are",
    "val_listing": "The validation images are",
    "text_sha256": "The text is",
}


@dataclass(frozen=True)
class Inputs:
    """What a run reads, as a person named it on the command line or in a recipe.

    Attributes:
        data: Name or folder of the data; see `fixify.data.open_data`.
        checkpoint: The slim checkpoint to finetune; None when training from scratch.
        against: The original, a checkpoint or a model name, for its top-1.
        distill: The teacher, a checkpoint or a model name.
        class_map: A file that says which class has which label; see `fixify.data.DataOptions`.
        recorded: What the recipe that is repeated recorded of these inputs.
    """

    data: str
    checkpoint: Path | str | None = None
    against: Path | str | None = None
    distill: Path | str | None = None
    class_map: Path | str | None = None
    recorded: Recorded = field(default_factory=Recorded)

    def to_recipe(self) -> dict[str, str]:
        """Return the lines of a recipe that name these inputs.

        Paths of existing files become absolute, because a recipe may be read from another folder.
        """
        given = {
            "checkpoint": self.checkpoint,
            "data": self.data,
            "against": self.against,
            "distill": self.distill,
            "class_map": self.class_map,
        }
        return {name: absolute_if_found(value) for name, value in given.items() if value is not None}


def absolute_if_found(given: Path | str) -> str:
    """Return the absolute path if it names an existing file or folder, else the name as it was given.

    >>> absolute_if_found("torch/cifar10")
    'torch/cifar10'
    """
    path = Path(given).expanduser()
    return str(path.resolve()) if path.exists() else str(given)


@dataclass(frozen=True)
class OpenedInputs:
    """What the inputs of a run opened to.

    Attributes:
        train, val: The images; see `fixify.data.open_train_val`. Their classes have been matched to the model's.
        preprocessing: timm's data configuration of the model that is trained.
        original: The model whose top-1 is the goal; evaluated once before training.
        teacher: The model to learn from, beside the labels or, with `options.unlabelled`, alone. If `val` has no
            labels, its answers are what validation compares with.
        given: The names that were opened; None for data in memory.
        teacher_note: A sentence for a person if the teacher was chosen by default.
    """

    train: OpenedData
    val: OpenedData
    preprocessing: Preprocessing
    original: ReferenceModel | None = None
    teacher: ReferenceModel | None = None
    given: Inputs | None = None
    teacher_note: str | None = None

    @property
    def taught_by_start(self) -> bool:
        """Whether the teacher is the checkpoint that training starts from."""
        given = self.given
        return given is not None and given.distill is not None and given.distill == given.checkpoint

    def check(self, options: FinetuneOptions) -> None:
        """Check that the options and the data have the reference models that they need.

        Raises:
            UsageError: a model is missing, was given twice, or takes images with other channels.
        """
        self._check_original(options)
        self._check_teacher(options)

    def _check_original(self, options: FinetuneOptions) -> None:
        if options.original_top1 is not None and self.original is not None:
            raise UsageError(
                f"The original's top-1 was given ({options.original_top1:g} %), and also {self.original.name} to "
                "measure it.",
                hint="Give --against or --original-top1, not both.",
            )
        if options.max_drop is not None and options.original_top1 is None and self.original is None:
            raise UsageError(
                f"--max-drop {options.max_drop:g} needs the original's top-1 on the validation data.",
                hint="Add --against ORIGINAL to measure it, or --original-top1 97.8 if you know it.",
            )

    def _check_teacher(self, options: FinetuneOptions) -> None:
        if self.teacher is None and (options.unlabelled or not (self.train.labelled and self.val.labelled)):
            raise UsageError("Images without labels need a teacher.", hint="Add --distill ORIGINAL, or use labels.")
        if not self.train.labelled and not options.unlabelled:
            raise UsageError(
                "The training images have no labels.", hint="Add --unlabelled to learn from the teacher alone."
            )
        if self.teacher is not None:
            theirs, ours = channels_of(self.teacher.preprocessing), channels_of(self.preprocessing)
            if theirs != ours:
                raise UsageError(
                    f"{self.teacher.name} takes images with {counted(theirs, 'channel')}, and the trained model "
                    f"takes {ours}.",
                    hint="The teacher gets the same images as the model. Use the checkpoint that was converted.",
                )


@dataclass(frozen=True)
class NamedFile:
    """A file or model that identifies a run: its name without folders, and its SHA-256 (64 hexadecimal digits)."""

    name: str
    sha256: str

    @classmethod
    def of(cls, path: Path | str) -> NamedFile:
        """Hash a file."""
        return cls(Path(path).name, sha256_of(Path(path)))


_TEACHER_LABELS = "the teacher's answers"


@dataclass(frozen=True)
class RunFacts:
    """What identifies a run: it is written to run.json and the state, and compared when the run is resumed.

    Attributes:
        data: Name of the data.
        class_names: In label order; None if neither the data nor the checkpoint names its classes.
        train_images, val_images: Number of images per split.
        train_listing, val_listing: SHA-256 of the list of images per split.
        checkpoint: The slim checkpoint that is finetuned.
        architecture: The network that is trained from scratch, as it is spelled in recipes.
        class_map: The file that assigns labels to classes.
        original, teacher: The reference models.
        teacher_labels_val: Whether the validation images have no labels, and the teacher's answers stand for them.
    """

    data: str
    class_names: tuple[str, ...] | None
    train_images: int
    val_images: int
    train_listing: str
    val_listing: str
    checkpoint: NamedFile | None = None
    architecture: str | None = None
    class_map: NamedFile | None = None
    original: NamedFile | None = None
    teacher: NamedFile | None = None
    teacher_labels_val: bool = False

    @classmethod
    def of(cls, opened: OpenedInputs) -> RunFacts:
        """Collect the facts of opened inputs."""
        original, teacher = (
            None if model is None else NamedFile(model.name, model.sha256)
            for model in (opened.original, opened.teacher)
        )
        return cls(
            data=opened.train.name,
            class_names=None if opened.train.numbered else tuple(opened.train.class_names),
            train_images=len(opened.train),
            val_images=len(opened.val),
            train_listing=listing_digest(opened.train),
            val_listing=listing_digest(opened.val),
            original=original,
            teacher=teacher,
            teacher_labels_val=not opened.val.labelled,
        )

    @property
    def title(self) -> str:
        """What the run is about, for a person: "net.fixed.safetensors on digits"."""
        return self.data if self.checkpoint is None else f"{self.checkpoint.name} on {self.data}"

    def recorded(self, options: FinetuneOptions) -> Recorded:
        """Return what a recipe of this run records of its inputs."""
        return Recorded(
            checkpoint_sha256=None if self.checkpoint is None else self.checkpoint.sha256,
            train_listing=self.train_listing,
            val_listing=self.val_listing,
            images_a_step=options.batch_size * distributed.world_size(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as run.json and state.pt hold them; what does not apply is left out."""
        facts: dict[str, Any] = {
            "data": self.data,
            "class_names": None if self.class_names is None else list(self.class_names),
            "train_images": self.train_images,
            "val_images": self.val_images,
            "train_listing": self.train_listing,
            "val_listing": self.val_listing,
        }
        if self.checkpoint is not None:
            facts |= {"checkpoint": self.checkpoint.name, "checkpoint_sha256": self.checkpoint.sha256}
        if self.architecture is not None:
            facts["architecture"] = self.architecture
        for name in ("class_map", "original", "teacher"):
            file: NamedFile | None = getattr(self, name)
            if file is not None:
                facts[name] = asdict(file)
        if self.teacher_labels_val:
            facts["val_labels"] = _TEACHER_LABELS
        return facts

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> RunFacts:
        """Read what `to_dict` returned.

        Raises:
            KeyError, TypeError: a fact is missing or of another type.
        """
        names, checkpoint = facts["class_names"], facts.get("checkpoint")
        files = {
            name: NamedFile(**facts[name])
            for name in ("class_map", "original", "teacher")
            if facts.get(name) is not None
        }
        return cls(
            data=facts["data"],
            class_names=None if names is None else tuple(names),
            train_images=facts["train_images"],
            val_images=facts["val_images"],
            train_listing=facts["train_listing"],
            val_listing=facts["val_listing"],
            checkpoint=None if checkpoint is None else NamedFile(checkpoint, facts["checkpoint_sha256"]),
            architecture=facts.get("architecture"),
            teacher_labels_val="val_labels" in facts,
            **files,
        )


@dataclass(frozen=True)
class Machine:
    """The versions and the device of a run; a difference may change its numbers in the last digits.

    Nothing in it identifies a person or a computer. A value of None was not stored.

    Attributes:
        fixify, python, torch, torchvision, timm, numpy: Versions.
        device: Name of the device.
        processes: World size.
    """

    fixify: str | None = None
    python: str | None = None
    torch: str | None = None
    torchvision: str | None = None
    timm: str | None = None
    numpy: str | None = None
    device: str | None = None
    processes: int = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Machine:
        """Read what `to_dict` returned; missing keys become None, unknown ones are ignored."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def to_dict(self) -> dict[str, Any]:
        """Return the values, JSON-safe."""
        return asdict(self)

    def changes_to(self, now: Machine) -> str | None:
        """Describe what differs from this machine; None if nothing does.

        >>> Machine(torch="2.9.0").changes_to(Machine(torch="2.13.0"))
        'torch 2.9.0 then, 2.13.0 now'
        """
        values = now.to_dict()
        different = {key: was for key, was in self.to_dict().items() if was is not None and was != values[key]}
        return ", ".join(f"{key} {was} then, {values[key]} now" for key, was in different.items()) or None


def this_machine(device: torch.device) -> Machine:
    """Describe this machine and a device of it."""
    return Machine(
        fixify=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),  # its own class cannot be loaded from a state
        torchvision=torchvision.__version__,
        timm=timm.__version__,
        numpy=np.__version__,
        device=_device_name(device),
        processes=distributed.world_size(),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


@dataclass(frozen=True)
class RunOutput:
    """Where a run goes, and how it deals with a run that is there already.

    Attributes:
        folder: Folder of the run; created if it is missing.
        save: Writes a checkpoint.
        suffix: File suffix of the checkpoints that `save` writes.
        resume: Continue the run in the folder. The final weights are those of a run that was never stopped.
        force: Replace the run in the folder.
        command: What was typed to start the run; recorded in run.json.
    """

    folder: Path
    save: SaveModel
    suffix: str = SUFFIX
    resume: bool = False
    force: bool = False
    command: str | None = None

    @property
    def best_path(self) -> Path:
        """The checkpoint of the best validation."""
        return self.folder / f"best{self.suffix}"

    @property
    def last_path(self) -> Path:
        """The checkpoint of the last validation."""
        return self.folder / f"last{self.suffix}"


def describe_model(model: nn.Module, architecture: str | None = None) -> dict[str, Any]:
    """Count the parameters and bytes of a model and of its classifier, for run.json.

    Args:
        model: Any classifier.
        architecture: Its name; None takes that of its slim checkpoint, or the name of its class.

    Returns:
        JSON-safe: `architecture`, `head` (the kind of its fixed head, or "learned"), `num_features` and `num_classes`
        (None if no classifier is found), `parameters`, `bytes` (of all stored tensors), `classifier_parameters`,
        `classifier_bytes`, and `savings` (see `fixify.savings.Savings`) if the model was converted.
    """
    info = getattr(model, "fixify_info", None)
    fixed = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    layers: list[nn.Module] = [*fixed]
    head = "learned"
    num_features: int | None = None
    num_classes: int | None = None
    if fixed:
        spec = fixed[0].spec
        head, num_features, num_classes = spec.kind, spec.num_features, spec.num_classes
    else:
        try:
            sites = find_classifiers(model)
        except NoClassifierError:
            sites = []
        layers = [model.get_submodule(site.path) for site in sites]
        if sites:
            num_features, num_classes = sites[0].num_features, sites[0].num_classes
    if architecture is None:
        architecture = type(model).__name__ if info is None else info.architecture.ref
    return {
        "architecture": architecture,
        "head": head,
        "num_features": num_features,
        "num_classes": num_classes,
        "parameters": count_parameters(model),
        "bytes": count_bytes(model.state_dict().values()),
        "classifier_parameters": sum(count_parameters(layer) for layer in layers),
        "classifier_bytes": sum(count_bytes(layer.state_dict().values()) for layer in layers),
        **({} if info is None else {"savings": info.savings}),
    }
