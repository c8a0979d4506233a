"""Options of surgery and of `fixify convert`.

Importing this module needs neither torch nor timm, because the command line builds its help from these classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fixify._options import CheckedOptions, Conflict, refuse

MIN_IMAGES = 8
"""Fewest images that a head is calibrated on."""


class HeadConfig(CheckedOptions):
    """Say which fixed head replaces a classifier. The defaults are those of `fixify convert`.

    A config holds for every classifier layer of a model; `make_heads` derives one `HeadSpec` per layer from it.

    >>> HeadConfig(head="binary", bits_per_class=64).bits_per_class
    64
    """

    section: ClassVar[str] = "convert"
    machine: ClassVar[tuple[str, ...]] = ("device",)

    head: Literal["auto", "hadamard", "orthogonal", "simplex", "binary", "identity"] = Field(
        default="auto",
        description="Kind of head; auto is hadamard where a matrix of that order is known, else orthogonal.",
    )
    seed: int = Field(
        default=0, ge=0, lt=1 << 64, description="Seed of the codebook; the same seed gives the same codes."
    )
    bits_per_class: int | None = Field(
        default=None, ge=1, description="Signs that a binary head stores per class; as many as features if not given."
    )
    match: bool = Field(
        default=True, description="Give each class the Hadamard code nearest to its old class vector, not the next one."
    )
    alpha: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Initial scale alpha; softmax reaches 0.95 at cosine 1 if not given.",
    )
    fixed_scale: bool = Field(default=False, description="Keep alpha as it is; do not learn it (paper, figure 3).")
    bias: bool | None = Field(default=True, description="Keep one learned bias per class.")
    standardize: bool = Field(
        default=True, description="Standardise each feature by its running mean and std before normalising."
    )

    def _conflicts(self) -> Iterator[Conflict]:
        if self.bits_per_class is not None and self.head != "binary":
            yield Conflict(
                ("bits_per_class", "head"),
                f"bits_per_class belongs to head binary, not {self.head}",
                "Add --head binary.",
            )
        if self.head == "binary" and not self.match:
            yield Conflict(
                ("match", "head"),
                "A binary head takes its signs from the old classifier and has no codes in class order",
                "Drop --no-match, or take --head hadamard.",
            )


class ConvertOptions(HeadConfig):
    """Options of `convert`: which head, what the source is, and how the result is calibrated and stored.

    >>> ConvertOptions.create(head="binary", bits_per_class=64).calibrate_images
    512
    """

    bias: bool = Field(default=True, description="Keep one learned bias per class.")
    arch: str | None = Field(
        default=None,
        description="Architecture, such as resnet50, timm/resnet50 or torchvision/resnet50; recognised if not given.",
    )
    num_classes: int | None = Field(
        default=None, ge=1, description="Number of classes of a new label set; the classes of SOURCE if not given."
    )
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = Field(
        default=None, description="Store the backbone as float32, float16 or bfloat16; unchanged if not given."
    )
    labels: str | None = Field(
        default=None, description="A file of class names, or imagenet; the names that came with SOURCE if not given."
    )
    ema: bool = Field(default=False, description="Take the averaged (EMA) weights of a training checkpoint.")
    calibrate: str | None = Field(
        default=None,
        description="A folder of images like those that the model is for (no labels needed), or a data name as for "
        "finetune: set mean and std of the features, and fit codes, scale and bias to the original's answers.",
    )
    calibrate_images: int = Field(
        default=512,
        ge=MIN_IMAGES,
        description="Images drawn to calibrate; a quarter of them is held out to count agreement.",
    )
    device: str | None = Field(
        default=None, description="Device that calibrates: cpu, cuda, cuda:1, mps; the first accelerator if not given."
    )

    @field_validator("calibrate", "labels", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="before")
    @classmethod
    def _old_name_of_alpha(cls, values: Any) -> Any:
        """Read `scale` as `alpha`: recipes that were written before it was renamed say so."""
        if isinstance(values, dict) and "scale" in values:
            values = dict(values)
            values["alpha"] = values.pop("scale")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> ConvertOptions:
        """Refuse options that do not go together, both given here: the other one may come by the command line."""
        refuse(each for each in self._conflicts() if set(each.options) <= self.model_fields_set)
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        yield from super()._conflicts()
        if self.calibrate is None and self.device is not None:
            yield Conflict(
                ("device", "calibrate"),
                "Only calibrating runs the model on a device",
                "Add --calibrate FOLDER, or drop --device.",
            )
        if self.calibrate is not None and self.num_classes is not None:
            yield Conflict(
                ("calibrate", "num_classes"),
                "Calibrating fits the head to the original's answers, and a new label set has none",
                "Drop --calibrate: fixify finetune takes mean and std from its training images.",
            )
        if self.head == "binary" and self.num_classes is not None:
            yield Conflict(
                ("head", "num_classes"),
                "A binary head takes its signs from the old classifier, and a new label set has none",
                "Drop --head binary: the codes of a Hadamard head need no old classifier.",
            )
