"""Options of a fixed head and of converting a checkpoint.

Importing this module needs neither torch nor timm, because the command line builds its help from these classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from fixify._options import CheckedOptions, Conflict, option, refuse
from fixify.heads.levels import RATES

MIN_IMAGES = 8
"""The fewest images that calibrate a head; a quarter of them is held out."""


class HeadConfig(CheckedOptions):
    """Say which fixed head replaces a classifier. The defaults are those of `fixify convert`.

    A config holds for every classifier layer of a model; `fixify.surgery.make_heads` derives one `HeadSpec` per layer.

    >>> HeadConfig(head="binary", bits_per_class=64).bits_per_class
    64
    """

    section: ClassVar[str] = "convert"
    machine: ClassVar[tuple[str, ...]] = ("device",)

    head: Literal["auto", "hadamard", "orthogonal", "simplex", "binary", "identity"] = option(
        "auto",
        "Kind of the fixed head; auto is hadamard where such a matrix is known, else orthogonal; "
        "binary for a classifier without a network.",
    )
    seed: int = option(0, "Seed of the codebook; the same seed gives the same codes.", ge=0, lt=1 << 64)
    bits_per_class: int | None = option(
        None, "Signs per class that a binary head stores. Default: one per feature.", ge=1
    )
    project: bool = option(
        True,
        "With --bits-per-class, --calibrate and more classes than features, store a projection of the features and "
        "finer levels of fewer coordinates in the same bytes, if that is nearer to the original's answers on a quarter "
        "of the images. Signs that fine-tuning shall learn (--learn-signs) need --no-project.",
    )
    bits_per_weight: float | None = option(
        None,
        f"Bits that a binary head stores for each weight: {', '.join(f'{rate:g}' for rate in RATES)}; above 1 they "
        "are levels instead of signs. Fewer than 1: --bits-per-class. Default: 1.",
    )
    gains: bool = option(True, "Store a length of each class's code, one byte, in a binary head.", flags=())
    match: bool = option(True, "Give each class the code nearest to its old class vector, not the next one.")
    wide_search: bool = option(
        False,
        "With more classes than features, search thousands of blocks for each class's code: nearer to its old class "
        "vector, but the head then multiplies with all codes at once, and is no faster than a learned one.",
    )
    alpha: float | None = option(
        None,
        "Initial scale alpha of the logits. Default: softmax reaches 0.95 at cosine 1.",
        hidden=("--scale",),
        ge=0,
        allow_inf_nan=False,
    )
    fixed_scale: bool = option(False, "Hold alpha; do not learn it (paper, figure 3).")
    bias: bool | None = option(True, "Keep one learned bias per class.")
    standardize: bool = option(True, "Standardise each feature by its running mean and std before normalising.")
    normalize: bool = option(
        True,
        "Divide each image's features by their norm (paper, equation 1). Without it, fine-tune at a fifth of the rate. "
        "Binary heads divide only with --bits-per-class and --calibrate.",
    )

    @field_validator("bits_per_weight")
    @classmethod
    def _known_rate(cls, value: float | None) -> float | None:
        if value is not None and value not in RATES:
            allowed = ", ".join(f"{rate:g}" for rate in RATES)
            hint = "; fewer than one bit per weight are set with bits_per_class" if value < 1 else ""
            raise ValueError(f"must be one of {allowed}, not {value:g}{hint}")
        return value

    def _conflicts(self) -> Iterator[Conflict]:
        if self.bits_per_class is not None and self.head != "binary":
            yield Conflict(
                ("bits_per_class", "head"),
                f"bits_per_class belongs to head binary, not {self.head}",
                "Add --head binary.",
            )
        if self.bits_per_weight is not None and self.head != "binary":
            yield Conflict(
                ("bits_per_weight", "head"),
                f"bits_per_weight belongs to head binary, not {self.head}",
                "Add --head binary.",
            )
        if self.bits_per_weight is not None and self.bits_per_class is not None:
            yield Conflict(
                ("bits_per_weight", "bits_per_class"),
                "bits_per_class counts the signs of a class, and bits_per_weight the bits of each weight",
                "Drop one of them.",
            )
        if self.wide_search and (not self.match or self.head not in ("auto", "hadamard")):
            yield Conflict(
                ("wide_search", "head" if self.match else "match"),
                "Only the codes of a matched Hadamard head are searched",
                "Drop --wide-search.",
            )
        if self.head == "binary" and not self.match:
            yield Conflict(
                ("match", "head"),
                "A binary head takes its signs from the old classifier and has no codes in class order",
                "Drop --no-match, or take --head hadamard.",
            )


class ConvertOptions(HeadConfig):
    """Options of `fixify.convert`: which head, what the source is, and how the result is calibrated and stored.

    >>> ConvertOptions.create(head="binary", bits_per_class=64).calibrate_images
    512
    """

    bias: bool = option(True, "Keep one learned bias per class.")
    arch: str | None = option(
        None, "Architecture, e.g. resnet50, timm/resnet50, torchvision/resnet50. Default: read from SOURCE."
    )
    num_classes: int | None = option(
        None, "Number of classes of a new label set. Default: the classes of SOURCE.", ge=1
    )
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = option(
        None, "Type in which the backbone is stored. Default: unchanged."
    )
    labels: str | None = option(None, "A file of class names, or imagenet. Default: the names that came with SOURCE.")
    ema: bool = option(False, "Take the averaged (EMA) weights of a training checkpoint.")
    classifier: str | None = option(
        None,
        "A classifier without a network, such as text embeddings of class names (.npy, .npz, .safetensors): put it "
        "onto SOURCE, in the place of its classifier or behind the projection of a CLIP model.",
        metavar="FILE",
        panel="bare",
    )
    key: tuple[str, ...] = option(
        (),
        "Name of the matrix in its file, and of the bias if it has an unusual name; can be repeated. Default: the only "
        "matrix, and the bias beside it.",
        metavar="NAME",
        panel="bare",
    )
    rows: Literal["classes", "features"] | None = option(
        None, "What a row of the matrix is. Default: decided by labels, bias and widths, or asked.", panel="bare"
    )
    logit_scale: float | None = option(
        None,
        "Logits are this times the cosine of features and class vector, as those of CLIP (100). Default: W x + b.",
        panel="bare",
        gt=0,
        le=1e6,
        allow_inf_nan=False,
    )
    calibrate: str | None = option(
        None,
        "A folder of images like those that the model is for (no labels needed), or a data name as for finetune: set "
        "mean and std of the features, and fit codes, scale and bias to the original's answers.",
        metavar="DATA",
    )
    calibrate_images: int = option(
        512, "Images drawn to calibrate; a quarter of them is held out to count agreement.", ge=MIN_IMAGES
    )
    agree: float | None = option(
        None,
        "Take the smallest head of all kinds that gives the original's answer on at least this percentage of images, "
        "shown with 95 % confidence on further images that are held out (1,196 for 99, if there are so many). Exit "
        "code 3 if none does.",
        metavar="PERCENT",
        gt=0,
        lt=100,
    )
    device: str | None = option(
        None, "Device that calibrates: cpu, cuda, cuda:1, mps. Default: the first accelerator, else cpu."
    )

    @field_validator("calibrate", "labels", "classifier", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("key", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

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
        """Refuse conflicts between options that are both given here; a recipe may leave one to the command line."""
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
        if self.agree is not None and self.calibrate is None:
            yield Conflict(
                ("agree", "calibrate"),
                "Agreement with the original is measured on images",
                "Add --calibrate FOLDER, images like those that the model is for.",
            )
        for name in ("head", "bits_per_class", "bits_per_weight", "wide_search"):
            if self.agree is not None and getattr(self, name) not in ("auto", None, False):
                yield Conflict(
                    ("agree", name), f"agree tries all kinds of heads, so {name} cannot be given", "Drop one of them."
                )
        if self.agree is not None and not self.match:
            yield Conflict(
                ("agree", "match"),
                "Codes in class order agree with the original by chance only",
                "Drop --no-match.",
            )
        if self.calibrate is not None and self.num_classes is not None:
            yield Conflict(
                ("calibrate", "num_classes"),
                "Calibrating fits the head to the original's answers, and a new label set has none",
                "Drop --calibrate: fixify finetune takes mean and std from its training images.",
            )
        if self.classifier is not None and self.num_classes is not None:
            yield Conflict(
                ("classifier", "num_classes"), "The classes are those of the classifier", "Drop --num-classes."
            )
        if self.head == "binary" and self.num_classes is not None:
            yield Conflict(
                ("head", "num_classes"),
                "A binary head takes its signs from the old classifier, and a new label set has none",
                "Drop --head binary: the codes of a Hadamard head need no old classifier.",
            )
