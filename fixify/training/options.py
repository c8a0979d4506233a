"""Options of finetuning and of training from scratch. Names are timm's where timm has one.

Importing this module needs neither torch nor timm, because the command line builds its help from these classes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from fixify._options import CheckedOptions, Conflict, option

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from fixify.data import Augmentation

USUAL_RATE, GENTLE_RATE = 0.05, 0.0003
"""Peak learning rates of finetuning: of most heads, and of those that start near the original.

See `fixify.training.starting_point`.
"""
USUAL_TEACHING, GENTLE_TEACHING = 0.5, 1.0
"""The teacher's weight in the loss, for the same heads."""
LAST_BLOCK_EPOCHS = 30
"""Epochs of the last blocks that come first for matched heads with a teacher."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

PATIENCE = ("nan_skip", "max_unreadable")
"""Options that say what a run tolerates; a run may be resumed with other values of them."""


MARGINS = {"cosface": (0.35, 1.0), "arcface": (0.5, math.pi)}
"""Default and limit of each margin; see `fixify.heads.loss`."""


def read_margin(text: str) -> tuple[str, float]:
    """Read `cosface:0.35` or `arcface:0.5`; without a number the default of its paper.

    Raises:
        ValueError: it is neither, or the number is out of range.

    >>> read_margin("arcface")
    ('arcface', 0.5)
    """
    name, colon, number = text.partition(":")
    if name not in MARGINS:
        raise ValueError(f"must be cosface:0.35 or arcface:0.5 (or another number), not {text!r}")
    default, limit = MARGINS[name]
    try:
        margin = float(number) if colon else default
    except ValueError:
        margin = math.nan
    if not 0 < margin < limit:
        raise ValueError(f"{name} takes a number above 0 and below {limit:.3g}, not {number!r}")
    return name, margin


class FinetuneOptions(CheckedOptions):
    """Options of a finetuning run. `FinetuneOptions.create` explains every mistake at once.

    The options from `no_aug` on are those of `fixify.data.Augmentation`. Two defaults are milder than timm's, which are
    made for hundreds of epochs: in the few epochs of a retrofit, crops down to 8 % of the image and colour jitter cost
    accuracy.

    >>> FinetuneOptions.create(epochs=3).replace(lr=0.01).lr
    0.01
    """

    section: ClassVar[str] = "finetune"
    from_scratch: ClassVar[bool] = False
    """Whether a run starts from random weights; else its start is a candidate for the best checkpoint."""
    machine: ClassVar[tuple[str, ...]] = ("workers", "device", "save_minutes", "share_classes")
    follow_from_start: ClassVar[tuple[str, ...]] = ("lr", "distill_weight", "freeze_bn", "last_block_epochs")
    """Options whose None stands for what follows from the head and the teacher; see `starting_point`."""

    epochs: int = option(5, "Passes over the training images; 0 trains only the last blocks.", ge=0)
    batch_size: int = option(64, "Images per step of each process.", flags=("-b", "--batch-size"), ge=1)
    # See `fixify.training.starting_point`.
    lr: Rate | Literal["auto"] | None = option(
        None,
        "Peak learning rate; auto: the best of a few in a short test. "
        f"Default: {USUAL_RATE:g}; {GENTLE_RATE:g} for heads with one bit per weight or more.",
        metavar="RATE|auto",
    )
    opt: str = option("sgd", "Optimiser, by timm's name; sgd has Nesterov momentum.")
    momentum: float = option(0.9, "Momentum, for optimisers that have one.", ge=0, lt=1)
    # Biases, normalisation layers, and a fixed head's bias are never decayed, nor is its scale without `decay_alpha`.
    weight_decay: float = option(1e-4, "Weight decay of matrices.", ge=0, allow_inf_nan=False)
    # Section 3.1 of the paper: "regularized with the same weight decay coefficient used on original classifier".
    decay_alpha: bool = option(False, "Decay the head's scale too, as the paper does.")
    # The validation loss is always cross-entropy. "cosine" needs a head with a scale of 1 that is held, and no bias.
    loss: Literal["cross-entropy", "cosine"] = option("cross-entropy", "Training loss; cosine is the paper's (2.2).")
    # Of the right class, in the cosine (CosFace, CVPR 2018) or in radians (ArcFace, CVPR 2019).
    margin: str | None = option(
        None, "Margin that the right class has to keep: cosface:0.35 or arcface:0.5.", metavar="NAME:MARGIN"
    )
    # With many more classes than features, fixed codes are hard to reach. See `fixify.heads.learned_signs`.
    learn_signs: float | None = option(
        None,
        "Learn the signs of a binary head too: peak rate of their latent weights, which begin at +-1. With many more "
        "classes than features, try 0.1.",
        metavar="RATE",
        gt=0,
        allow_inf_nan=False,
    )
    sched: Literal["cosine", "linear", "step", "multistep", "constant"] = option(
        "cosine", "Schedule of the learning rate after the warmup."
    )
    warmup_epochs: float = option(0.1, "Epochs of linear warmup, also a fraction of one.", ge=0, allow_inf_nan=False)
    warmup_lr: float = option(1e-5, "Learning rate of the first step.", flags=(), ge=0, allow_inf_nan=False)
    min_lr: float = option(0.0, "Learning rate at the end (cosine, linear).", ge=0, allow_inf_nan=False)
    decay_epochs: float = option(30.0, "Epochs between two decays (step).", gt=0, allow_inf_nan=False)
    decay_milestones: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = option(
        (), "Epoch after which the rate decays (multistep); repeat the flag for more, rising."
    )
    decay_rate: float = option(0.1, "Factor of each decay (step, multistep).", gt=0, le=1)
    # The scale has to grow several times over, and one step moves it no further than any weight.
    head_lr_scale: float = option(
        30.0, "Factor on the learning rate of the head's scale and bias.", gt=0, allow_inf_nan=False
    )
    ema_decay: float | None = option(
        None, "Evaluate and save an exponential moving average of the weights, with this decay.", gt=0, lt=1
    )
    layer_decay: float | None = option(
        None, "Factor on each layer's learning rate, relative to the layer above it.", gt=0, le=1
    )
    # The stem is one stage; each stage of a network or block of a transformer is another. See `optimisers`.
    freeze: int = option(0, "Freeze the first N stages and the statistics of their batch norms.", ge=0)
    # See `fixify.training.starting_point`.
    freeze_bn: bool | None = option(
        None,
        "Keep the running statistics of all batch norms and of the head. Default: for heads with one bit per weight or "
        "more, if --lr is not given.",
    )
    grad_accum: int = option(1, "Steps whose gradients make one update.", ge=1)
    clip_grad: float | None = option(
        None, "Largest gradient norm, or value (see --clip-mode).", gt=0, allow_inf_nan=False
    )
    clip_mode: Literal["norm", "value", "agc"] = option("norm", "How gradients are clipped; agc is adaptive.")
    # With 0 an accelerator need not wait for each loss.
    nan_skip: int = option(0, "Skip at most N steps whose loss or gradient is not finite.", ge=0)
    # An unreadable training image is replaced by the next one; an unreadable validation image is left out.
    max_unreadable: float = option(0.01, "Share of the images that may be unreadable.", ge=0, le=1)
    # The schedule stays that of all epochs.
    max_drop: float | None = option(
        None,
        "Stop when top-1 is at most this many points below the original's. If it never is, the exit code is 3.",
        ge=0,
        lt=100,
    )
    original_top1: float | None = option(
        None, "The original's top-1 on this data in percent, if known, for --max-drop.", gt=0, le=100
    )
    val_every: int | None = option(None, "Validate every N updates too, not only after each epoch.", ge=1)
    # Runs over features that are computed once, without augmentation, for as many images as fit into 2 GiB.
    last_block_epochs: int | None = option(
        None,
        f"First train only the last blocks for N epochs, on features computed once. Default: {LAST_BLOCK_EPOCHS} for "
        "matched codes with a teacher, if the features of all images fit into 2 GiB; else 0.",
        ge=0,
    )
    # The images themselves and their copies take turns, one per epoch.
    last_block_copies: int = option(0, "Augmented copies of each image that the last blocks learn from too.", ge=0)
    distill_weight: float | None = option(
        None,
        f"The teacher's weight in the loss; the labels have the rest. Default: {USUAL_TEACHING:g}; {GENTLE_TEACHING:g} "
        "for heads with one bit per weight or more that learn from the original.",
        panel="distillation",
        gt=0,
        le=1,
    )
    distill_temperature: float = option(
        4.0, "Temperature of the softmaxes that are compared.", panel="distillation", gt=0, allow_inf_nan=False
    )
    unlabelled: bool = option(
        False, "Learn from the teacher alone: labels are not used, and DATA may be any images.", panel="distillation"
    )
    class_order: Literal["natural", "lexical"] | None = option(
        None,
        "Order of class folders: natural (timm) or lexical (torchvision). Default: natural, and by name if the "
        "checkpoint has class names.",
        panel="labels",
    )
    input_key: str | None = option(
        None, "Image column (hfds/...) or file extensions, e.g. jpg;png (wds/...).", panel="labels"
    )
    target_key: str | None = option(
        None, "Label column (hfds/...) or field of the JSON files (wds/...).", panel="labels"
    )
    amp: Literal["none", "bf16", "fp16"] = option("none", "Autocast precision.", panel="machine")
    channels_last: bool = option(False, "Use the channels-last memory format, often faster on CUDA.", panel="machine")
    compile: bool = option(False, "Compile the whole model with torch.compile.", panel="machine")
    grad_checkpointing: bool = option(
        False, "Save memory: compute activations again in the backward pass (timm's models).", panel="machine"
    )
    sync_bn: bool = option(False, "Normalise batch norms over all processes (GPUs).", panel="machine")
    # With "none" each process validates with its own statistics, and those of rank 0 are saved.
    dist_bn: Literal["reduce", "broadcast", "none"] = option(
        "reduce",
        "Running statistics of batch norms over processes, after each update: their mean (reduce), or rank 0's "
        "(broadcast).",
        panel="machine",
    )
    shard: bool = option(
        False, "Shard weights, gradients and optimiser state over the processes (FSDP2).", panel="machine"
    )
    # Each process then multiplies with its own codes only, and features and a few numbers per image travel.
    share_classes: bool = option(
        False,
        "Share the classes of a fixed head: each process computes the logits of its own, for the images of all.",
        panel="machine",
    )
    img_size: int | None = option(None, "Side of the images in pixels. Default: the checkpoint's.", ge=1)
    crop_pct: float | None = option(
        None, "Share kept by the center crop in validation. Default: the checkpoint's.", gt=0, le=1
    )
    seed: int = option(0, "Seed of order, augmentation and dropout.", ge=0)
    workers: int | None = option(
        None, "Loader processes. Default: fits the machine.", flags=("-j", "--workers"), panel="machine", ge=0
    )
    device: str = option("auto", "Device: cpu, cuda, mps, ...", panel="machine")
    save_minutes: float | None = option(
        10.0, "Save the resumable state every N minutes, not only after validations.", panel="machine", gt=0,
        allow_inf_nan=False,
    )  # fmt: skip
    calibration_images: int = option(
        512,
        "Training images that give the statistics of an uncalibrated head, or to which a converted one is fitted.",
        flags=(),
        ge=2,
    )

    no_aug: bool = option(False, "Only resize the images.", panel="augmentation")
    scale: tuple[float, float] = option((0.5, 1.0), "Area of the random crop, from and to.", panel="augmentation")
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "Aspect ratio of the random crop, from and to.", panel="augmentation"
    )
    crop_padding: int | None = option(
        None, "For small images, instead: pad by N pixels and crop at random.", panel="augmentation", ge=1
    )
    hflip: float = option(0.5, "Share of the images that are mirrored.", panel="augmentation", ge=0, le=1)
    vflip: float = option(0.0, "Share of the images that are turned upside down.", panel="augmentation", ge=0, le=1)
    color_jitter: float = option(0.0, "Strength of the colour jitter.", panel="augmentation", ge=0)
    auto_augment: str | None = option(
        None, "Policy, for example rand-m9-mstd0.5.", flags=("--aa", "--auto-augment"), panel="augmentation"
    )
    interpolation: Literal["random", "bilinear", "bicubic"] = option(
        "random", "Interpolation of the random crop.", flags=()
    )
    reprob: float = option(0.0, "Share of the images that are partly erased.", panel="augmentation", ge=0, le=1)
    remode: Literal["const", "rand", "pixel"] = option("pixel", "What erased parts are filled with.", flags=())
    mixup: float = option(0.0, "Alpha of mixup.", panel="augmentation", ge=0)
    cutmix: float = option(0.0, "Alpha of CutMix.", panel="augmentation", ge=0)
    mixup_prob: float = option(1.0, "Probability of mixup or CutMix per batch.", flags=(), ge=0, le=1)
    mixup_switch_prob: float = option(0.5, "Probability of CutMix if both are on.", flags=(), ge=0, le=1)
    smoothing: float = option(0.0, "Label smoothing.", panel="augmentation", ge=0, lt=1)

    @field_validator("opt")
    @classmethod
    def _known_optimiser(cls, opt: str) -> str:
        from timm.optim import list_optimizers

        known = list_optimizers()
        if opt.lower() not in known:
            near = difflib.get_close_matches(opt.lower(), known, n=3)
            nearest = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"{opt!r} is not an optimiser of timm{nearest}")
        return opt.lower()

    @field_validator("margin")
    @classmethod
    def _known_margin(cls, margin: str | None) -> str | None:
        return margin if margin is None else "{}:{:g}".format(*read_margin(margin))

    @field_validator("scale", "ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] < float("inf"):
            raise ValueError(f"must be two positive numbers, the smaller first, not {value[0]:g} {value[1]:g}")
        return value

    def _conflicts(self) -> Iterator[Conflict]:
        if self.epochs == 0 and not self.last_block_epochs:
            yield Conflict(
                ("epochs", "last_block_epochs"),
                "epochs 0 trains only the last blocks and needs last_block_epochs",
            )
        if self.warmup_epochs >= self.epochs > 0:
            yield Conflict(
                ("warmup_epochs", "epochs"),
                f"warmup_epochs ({self.warmup_epochs:g}) must be less than epochs ({self.epochs})",
            )
        lr = self.peak_rate
        if self.min_lr > lr:
            yield Conflict(("min_lr", "lr"), f"min_lr ({self.min_lr:g}) must not be above lr ({lr:g})")
        if self.sched == "multistep" and not self.decay_milestones:
            yield Conflict(
                ("sched", "decay_milestones"),
                "sched multistep needs decay_milestones, the epochs after which the rate decays",
            )
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            yield Conflict(
                ("decay_milestones",),
                f"decay_milestones must rise, not be {' '.join(f'{epoch:g}' for epoch in self.decay_milestones)}",
            )
        if self.original_top1 is not None and self.max_drop is None:
            yield Conflict(
                ("original_top1", "max_drop"),
                "original_top1 has no effect without max_drop",
            )
        if self.clip_mode != "norm" and self.clip_grad is None:
            yield Conflict(
                ("clip_mode", "clip_grad"),
                f"clip_mode {self.clip_mode} has no effect without clip_grad",
            )
        if self.loss == "cosine" and self.smoothing > 0:
            yield Conflict(("loss", "smoothing"), "smoothing applies to the cross-entropy only, not to the cosine loss")
        if self.margin is not None:
            reasons = {
                "loss": (self.loss == "cosine", "the cosine loss has a margin of its own"),
                "mixup": (self.mixup > 0, "an image mixed by mixup has two right classes"),
                "cutmix": (self.cutmix > 0, "an image mixed by cutmix has two right classes"),
                "unlabelled": (self.unlabelled, "a teacher alone says no right class"),
                "shard": (self.shard, "a sharded model cannot be checked for it"),
            }
            for name, (applies, why) in reasons.items():
                if applies:
                    yield Conflict(("margin", name), f"margin {self.margin} cannot be combined with {name}: {why}")
        if self.learn_signs is not None:
            reasons = {
                "ema_decay": (self.ema_decay is not None, "an average of signs is no sign"),
                "share_classes": (self.share_classes, "codes that are learned are not shared"),
                "shard": (self.shard, "a sharded model has no whole codes"),
                "compile": (self.compile, "a compiled model must not change"),
            }
            for name, (applies, why) in reasons.items():
                if applies:
                    yield Conflict(("learn_signs", name), f"learn_signs cannot be combined with {name}: {why}")
        for name in ("mixup", "cutmix"):
            if self.share_classes and getattr(self, name) > 0:
                yield Conflict(
                    ("share_classes", name),
                    f"share_classes cannot be combined with {name}: distributions over all classes are not shared",
                )
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            yield Conflict(
                ("batch_size", "mixup", "cutmix"),
                f"batch_size must be even with mixup or cutmix, not {self.batch_size}",
            )

    @property
    def converts(self) -> bool:
        """Whether the run begins with a learned classifier and converts it; see `fixify.training.head_conversion`."""
        return False

    def before_conversion(self) -> Self:
        """Return the options that hold while the classifier is a learned one that the run converts later."""
        return self

    @property
    def peak_rate(self) -> float:
        """The peak learning rate; where it is not a number, the usual one."""
        if self.lr is None or self.lr == "auto":
            default = type(self).model_fields["lr"].default
            return USUAL_RATE if default is None else float(default)
        return self.lr

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return `recipe()` of the defaults; where they depend on the start, those of most heads."""
        found = super().defaults()
        return found | {name: value for name, value in cls.usual_values().items() if found[name] is None}

    @staticmethod
    def usual_values() -> dict[str, Any]:
        """Return the values of `follow_from_start` for most heads."""
        return {"lr": USUAL_RATE, "distill_weight": USUAL_TEACHING, "freeze_bn": False, "last_block_epochs": 0}

    def augmentation(self) -> Augmentation:
        """Return the options that concern training images."""
        from fixify.data import Augmentation

        return Augmentation(**{name: getattr(self, name) for name in Augmentation.__dataclass_fields__})

    def resolved_device(self) -> torch.device:
        """Return the device; raises UsageError if this machine does not have it."""
        from fixify.metrics import resolve_device

        return resolve_device(self.device)

    def for_this_process(self) -> Self:
        """Return these options with the device of this torchrun worker and its share of the loader processes.

        Raises:
            UsageError: there are fewer devices than workers.
        """
        import torch

        from fixify.data import default_workers
        from fixify.training import distributed

        if distributed.launched() == 1:
            return self
        device = distributed.device_for(self.device)
        workers = default_workers(torch.device(device)) // distributed.local_world_size()
        return self.replace(device=device, workers=workers if self.workers is None else self.workers)

    def resolved_workers(self) -> int:
        """Return the number of loader processes."""
        from fixify.data import default_workers

        return default_workers(self.resolved_device()) if self.workers is None else self.workers


class TrainOptions(FinetuneOptions):
    """Options of training from scratch: the network, its head, and all of `FinetuneOptions`.

    The defaults are those of an ordinary ImageNet training where those of finetuning are milder: 90 epochs, batches of
    256, rate 0.1, timm's crops and colour jitter. The paper trains the scale at the rate of the weights, that is with
    head_lr_scale 1.

    With a learned head the other options of a head have no effect: `head_...`, `bits_per_class`, `convert_after` and
    `learn_signs`. The rest of the network starts from the same weights with either head.

    A binary head takes its signs from a learned classifier. So the run begins with one, and converts it after a share
    of the steps, under the same schedule. `learn_signs` and `margin` hold from there on.
    """

    section: ClassVar[str] = "train"
    from_scratch: ClassVar[bool] = True

    model: str = option(..., "Architecture of timm or torchvision: resnet18, torchvision/resnet18.", min_length=1)
    model_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of its builder.")
    head: Literal["learned", "auto", "hadamard", "orthogonal", "simplex", "binary", "identity"] = option(
        "auto",
        "The classifier: learned, or the kind of a fixed one; auto is hadamard where such a matrix is known. binary is "
        "a learned one at first; see convert_after.",
    )
    bits_per_class: int | None = option(None, "Signs per class of a binary head. Default: one per feature.", ge=1)
    convert_after: float = option(
        0.2, "Share of the steps after which a learned classifier becomes the binary head.", gt=0, lt=1
    )
    head_standardize: bool = option(True, "Standardise each feature by its running mean and std; not in the paper.")
    head_scale: float | None = option(
        None, "Initial alpha. Default: softmax reaches 0.95 at cosine 1.", gt=0, allow_inf_nan=False
    )
    head_fixed_scale: bool = option(False, "Hold alpha; do not learn it.")
    head_bias: bool | None = option(None, "Learn a bias. Default: as the network's own classifier.")
    head_seed: int = option(0, "Seed of the codebook.", ge=0, lt=1 << 64)
    in_chans: Literal[1, 3] | None = option(None, "Channels of the images. Default: the network's.")
    mean: tuple[float, ...] | None = option(
        None, "Mean of the images' values (0 to 1), one per channel. Default: that of the network's published weights."
    )
    std: tuple[float, ...] | None = option(None, "Std of the images' values, one per channel. Default: as for mean.")

    epochs: int = option(90, "Passes over the training images.", ge=0)
    batch_size: int = option(256, "Images per step of each process.", flags=("-b", "--batch-size"), ge=1)
    lr: Rate | Literal["auto"] = option(0.1, "Peak learning rate; auto: the best of a few in a short test.")
    distill_weight: float = option(
        USUAL_TEACHING,
        "The teacher's weight in the loss; the labels have the rest.",
        panel="distillation",
        gt=0,
        le=1,
    )
    last_block_epochs: int = option(
        0, "First train only the last blocks for N epochs, on features computed once.", ge=0
    )
    freeze_bn: bool = option(False, "Keep the running statistics of all batch norms and of the head.")
    scale: tuple[float, float] = option((0.08, 1.0), "Area of the random crop, from and to.", panel="augmentation")
    color_jitter: float = option(0.4, "Strength of the colour jitter.", panel="augmentation", ge=0)

    def _conflicts(self) -> Iterator[Conflict]:
        yield from super()._conflicts()
        if self.converts:
            reasons = {
                "loss": (self.loss == "cosine", "the learned classifier of its first steps has no cosines"),
                "compile": (self.compile, "a compiled model must not change"),
                "shard": (self.shard, "a sharded classifier is not converted"),
                "share_classes": (self.share_classes, "the classes of a learned classifier are not shared"),
                "epochs": (self.epochs == 0, "without epochs there is no classifier to convert"),
            }
            for name, (applies, why) in reasons.items():
                if applies:
                    yield Conflict(
                        (name, "head"),
                        f"head binary cannot be combined with {name} {getattr(self, name)}".lower() + f": {why}",
                    )
        elif self.head != "learned":
            for name in ("learn_signs", "bits_per_class"):
                if getattr(self, name) is not None:
                    yield Conflict(
                        (name, "head"),
                        f"{name} needs head binary, whose signs come from a learned classifier, not head {self.head}",
                        "Add head: binary.",
                    )
        if (self.mean is None) != (self.std is None):
            yield Conflict(("mean", "std"), "mean and std belong together; give both")
        if self.std is not None and min(self.std) <= 0:
            yield Conflict(("std",), f"std must be positive, not {min(self.std):g}")

    @property
    def converts(self) -> bool:
        """Whether the run begins with a learned classifier and converts it."""
        return self.head == "binary"

    def before_conversion(self) -> Self:
        """Return the options that hold while the classifier is a learned one, which has neither signs nor cosines."""
        if self.converts:
            return self.replace(learn_signs=None, margin=None)
        return self.replace(learn_signs=None) if self.head == "learned" else self
