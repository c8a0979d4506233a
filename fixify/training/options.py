"""Everything that decides how a model is finetuned. Names are timm's where timm has one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from timm.optim import list_optimizers

from fixify._options import CheckedOptions, Conflict
from fixify.data import Augmentation, default_workers
from fixify.metrics import resolve_device
from fixify.training import distributed

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE = ("nan_skip", "max_unreadable")
"""Options that say what a run puts up with; a run that was stopped may go on with others."""


class FinetuneOptions(CheckedOptions):
    """Options of a finetuning run. Build it with `FinetuneOptions.create`, which explains every mistake at once.

    Attributes:
        epochs: Passes over the training images; 0 only with `last_block_epochs`, to train nothing but the last blocks.
        batch_size: Images a step of each process, as in timm: with 2 processes and 32 twice as many go into a step.
        lr: Peak learning rate.
        opt: timm's name of the optimiser; "sgd" has Nesterov momentum.
        momentum: For optimisers that have one.
        weight_decay: Not applied to vectors: biases, normalisation layers, and a fixed head's scale and bias.
        decay_alpha: Decay a fixed head's scale alpha by `weight_decay` too, as in all of the paper's experiments
            (section 3.1: "regularized with the same weight decay coefficient used on original classifier").
        loss: "cross-entropy", or the paper's "cosine" (section 2.2, `fixify.training.losses`), for a fixed head whose
            scale is a fixed 1 and that has no bias. The validation loss stays cross-entropy.
        sched: How the rate falls after warming up, updated every step.
        warmup_epochs: Epochs (or a part of one) during which the rate rises linearly from `warmup_lr`.
        warmup_lr: Rate of the first step.
        min_lr: Rate at the end (cosine, linear).
        decay_epochs: Epochs between two decays (step).
        decay_milestones: Epochs after which the rate decays (multistep), rising: 30, 60 and 80 of 90, say.
        decay_rate: Factor of each decay (step, multistep).
        head_lr_scale: The fixed head's scale and bias learn at this multiple of the rate. The scale needs it: it has to
            grow several times over, and one step moves it no further than any weight.
        ema_decay: Decay of an exponential moving average of the weights, which is then what is evaluated and saved.
        layer_decay: Each layer learns at this multiple of the rate of the layer above it, as with timm.
        freeze: So many first stages stay as they are (see `fixify.training.optimisers`: the stem is one, each stage or
            block of a transformer another), the statistics of their batch norms included.
        grad_accum: Steps whose gradients make one update.
        clip_grad: Largest norm of the gradient; other modes clip otherwise.
        clip_mode: timm's: "norm" of all gradients, "value" of each, or "agc", adaptive by the norm of each weight.
        amp: Autocast precision.
        channels_last: Memory format; often faster on CUDA.
        compile: torch.compile the model, whole; a model that cannot be is an error.
        grad_checkpointing: Keep fewer activations for the backward pass, and compute them again; for timm's models.
        sync_bn: Batch norms whose batch is that of all processes; does nothing in one.
        dist_bn: What becomes of the running statistics that the batch norms of several processes have, after each
            update: "reduce" averages them, "broadcast" takes the first process's, "none" leaves each its own, with
            which it then validates, and the first process's are saved.
        shard: Spread weights, gradients and the optimiser's state over the processes (FSDP2).
        img_size: Side of the images that the model gets; None is the checkpoint's.
        crop_pct: Shard of the resized image that the center crop keeps in validation; None is the checkpoint's.
        max_drop: Stop as soon as validation top-1 is at most this many points below the original's; None trains all
            epochs. The schedule stays that of all epochs.
        nan_skip: Leave out at most so many steps of the whole run whose loss (or, except with fp16, gradient) is not
            finite; the next one stops the run. With 0 the first does, and an accelerator need not wait for each loss.
        max_unreadable: Shard of the images (of training and of validation) that may be unreadable. In training the next
            image takes the place of such a one, in validation it is left out. Beyond this share the run stops.
        original_top1: The original's top-1 on the validation data, percent, if it is known; else the original itself
            has to be given.
        val_every: Validate after so many updates too, not only after each epoch.
        distill_weight: Shard of the teacher in the loss, the labels have the rest; only with a teacher.
        distill_temperature: Of the softmaxes that are compared.
        unlabelled: Learn from the teacher alone; labels are not used, and need not exist.
        last_block_epochs: First train only the last blocks, for so many passes over features that are computed once,
            without augmentation, for as many images as fit into 2 GiB; 0 does not.
        class_order, input_key, target_key: How labels are read; see `fixify.data.DataOptions`.
        seed: Fixes order, augmentation and dropout.
        workers: Loader processes; None fits the machine.
        device: "auto", or torch's name of a device.
        save_minutes: Write the state, from which the run can be resumed, when it is that old; None only after each
            validation.
        calibration_images: Training images from which the statistics of an uncalibrated head are taken.

    The rest is `fixify.data.Augmentation`, with two milder defaults than timm's, which are made for hundreds of epochs:
    in the few of a retrofit, crops down to 8 % of the image and colour jitter cost accuracy.
    """

    section: ClassVar[str] = "finetune"
    machine: ClassVar[tuple[str, ...]] = ("workers", "device", "save_minutes")

    epochs: int = Field(default=5, ge=0)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    opt: str = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    decay_alpha: bool = False
    loss: Literal["cross-entropy", "cosine"] = "cross-entropy"
    sched: Literal["cosine", "linear", "step", "multistep", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    warmup_lr: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    min_lr: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    decay_epochs: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    decay_milestones: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    decay_rate: float = Field(default=0.1, gt=0, le=1)
    head_lr_scale: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    freeze: int = Field(default=0, ge=0)
    grad_accum: int = Field(default=1, ge=1)
    clip_grad: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    nan_skip: int = Field(default=0, ge=0)
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    max_drop: float | None = Field(default=None, ge=0, lt=100)
    original_top1: float | None = Field(default=None, gt=0, le=100)
    val_every: int | None = Field(default=None, ge=1)
    last_block_epochs: int = Field(default=0, ge=0)
    distill_weight: float = Field(default=0.5, gt=0, le=1)
    distill_temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    unlabelled: bool = False
    class_order: Literal["natural", "lexical"] | None = None
    input_key: str | None = None
    target_key: str | None = None
    amp: Literal["none", "bf16", "fp16"] = "none"
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    sync_bn: bool = False
    dist_bn: Literal["reduce", "broadcast", "none"] = "reduce"
    shard: bool = False
    img_size: int | None = Field(default=None, ge=1)
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    workers: int | None = Field(default=None, ge=0)
    device: str = "auto"
    save_minutes: float | None = Field(default=10.0, gt=0, allow_inf_nan=False)
    calibration_images: int = Field(default=512, ge=2)

    no_aug: bool = False
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int | None = Field(default=None, ge=1)
    hflip: float = Field(default=0.5, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0)
    auto_augment: str | None = None
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    reprob: float = Field(default=0.0, ge=0, le=1)
    remode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    smoothing: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("opt")
    @classmethod
    def _known_optimiser(cls, opt: str) -> str:
        known = list_optimizers()
        if opt.lower() not in known:
            near = difflib.get_close_matches(opt.lower(), known, n=3)
            nearest = f"; near to it: {', '.join(near)}" if near else ""
            raise ValueError(f"{opt!r} is not an optimiser of timm{nearest}")
        return opt.lower()

    @field_validator("scale", "ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] < float("inf"):
            raise ValueError(f"must be two positive numbers, the smaller first, not {value[0]:g} {value[1]:g}")
        return value

    def _conflicts(self) -> Iterator[Conflict]:
        if self.epochs == 0 and self.last_block_epochs == 0:
            yield Conflict(
                ("epochs", "last_block_epochs"),
                "with epochs 0 only the last blocks are trained; give last_block_epochs as well",
            )
        if self.warmup_epochs >= self.epochs > 0:
            yield Conflict(
                ("warmup_epochs", "epochs"),
                f"warmup_epochs ({self.warmup_epochs:g}) must be less than epochs ({self.epochs})",
            )
        if self.min_lr > self.lr:
            yield Conflict(("min_lr", "lr"), f"min_lr ({self.min_lr:g}) must not be above lr ({self.lr:g})")
        if self.sched == "multistep" and not self.decay_milestones:
            yield Conflict(
                ("sched", "decay_milestones"),
                "sched multistep needs decay_milestones: the epochs after which the rate decays",
            )
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            yield Conflict(
                ("decay_milestones",),
                f"decay_milestones must rise, not be {' '.join(f'{epoch:g}' for epoch in self.decay_milestones)}",
            )
        if self.original_top1 is not None and self.max_drop is None:
            yield Conflict(
                ("original_top1", "max_drop"),
                "original_top1 is what max_drop is measured from; give max_drop as well",
            )
        if self.clip_mode != "norm" and self.clip_grad is None:
            yield Conflict(
                ("clip_mode", "clip_grad"),
                f"clip_mode {self.clip_mode} does nothing without clip_grad; give clip_grad as well",
            )
        if self.loss == "cosine" and self.smoothing > 0:
            yield Conflict(("loss", "smoothing"), "smoothing belongs to the cross-entropy; the cosine loss has none")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            yield Conflict(
                ("batch_size", "mixup", "cutmix"),
                f"batch_size must be even with mixup or cutmix, not {self.batch_size}",
            )

    def augmentation(self) -> Augmentation:
        """The part that concerns training images."""
        return Augmentation(**{name: getattr(self, name) for name in Augmentation.__dataclass_fields__})

    def resolved_device(self) -> torch.device:
        """The device; raises UsageError if it is not on this machine."""
        return resolve_device(self.device)

    def for_this_process(self) -> Self:
        """These options with the device of this process of those that torchrun started, and its share of the workers.

        Raises:
            UsageError: there is no device for each of them.
        """
        if distributed.launched() == 1:
            return self
        device = distributed.device_for(self.device)
        workers = default_workers(torch.device(device)) // distributed.local_world_size()
        return self.replace(device=device, workers=workers if self.workers is None else self.workers)

    def resolved_workers(self) -> int:
        """Loader processes."""
        return default_workers(self.resolved_device()) if self.workers is None else self.workers

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """`recipe()` of the defaults, without what has none."""
        made = cls.model_construct().recipe()
        return {name: made[name] for name, info in cls.model_fields.items() if name in made and not info.is_required()}


# Everything that decides how a network is trained from scratch.


class TrainOptions(FinetuneOptions):
    """Options of training from scratch: what to build, and all of `FinetuneOptions`.

    The defaults are those of an ordinary ImageNet training where finetuning has milder ones: 90 epochs, batches of 256,
    rate 0.1, timm's crops and colour jitter. In the paper the scale learns at the rate of the weights: head_lr_scale 1.

    Attributes:
        model: An architecture of timm or torchvision, as everywhere in fixify: "resnet18", "torchvision/resnet18".
        model_args: Arguments for its builder.
        head: "learned" for the network's own classifier; else a fixed one: "hadamard", "orthogonal", "simplex", or
            "auto", Hadamard where a matrix of that order is known. The rest of the network starts from the same weights
            with either.
        head_standardize: Standardise each feature by its running mean and deviation; not in the paper.
        head_scale: Initial value of alpha; None: where softmax reaches 0.95 at cosine 1.
        head_fixed_scale: Alpha is not learned.
        head_bias: A learned bias; None: as the network's own classifier has.
        head_seed: Of the codebook.
        in_chans: Channels of the images, 1 or 3; None is the network's own number.
        mean, std: Of the images' values, 0 to 1, one a channel; None is what the network's published weights expect.

    For a learned head the other `head_...` options mean nothing.
    """

    section: ClassVar[str] = "train"

    model: str = Field(min_length=1)
    model_args: dict[str, Any] = Field(default_factory=dict)
    head: Literal["learned", "auto", "hadamard", "orthogonal", "simplex"] = "auto"
    head_standardize: bool = True
    head_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    head_fixed_scale: bool = False
    head_bias: bool | None = None
    head_seed: int = Field(default=0, ge=0, lt=1 << 64)
    in_chans: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    epochs: int = Field(default=90, ge=0)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    scale: tuple[float, float] = (0.08, 1.0)
    color_jitter: float = Field(default=0.4, ge=0)

    def _conflicts(self) -> Iterator[Conflict]:
        yield from super()._conflicts()
        if (self.mean is None) != (self.std is None):
            yield Conflict(("mean", "std"), "mean and std go together; give both")
        if self.std is not None and min(self.std) <= 0:
            yield Conflict(("std",), f"std must be positive, not {min(self.std):g}")
