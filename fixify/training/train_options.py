"""Everything that decides how a network is trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from fixify.training.options import FinetuneOptions
from fixify.validation import Conflict


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
