"""Describe a network in plain values: its architecture, its preprocessing, and its fixed heads.

These records are what the header of a slim checkpoint holds. Importing this module needs neither torch nor timm nor
NumPy, so that `fixify inspect` is quick. Whether the installed libraries have an architecture is another question; see
`fixify.models.architectures`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fixify.errors import ArchitectureError, FormatError
from fixify.heads.spec import HeadSpec

LIBRARIES = ("timm", "torchvision", "fixify")

# Arguments that make a builder read weights or configuration from somewhere, or that `build` sets itself. They are
# refused, because an `Architecture` can come from an untrusted file.
_RESERVED = {
    *("num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "cache_dir", "weights", "weights_backbone"),
    *("progress", "features_only", "device", "dtype"),
}
# Limits of arguments, which may come from a file. Builders loop over some numbers and multiply others.
_LARGEST_NUMBER = 1 << 16
_LARGEST_SUM = 1 << 17  # of the numbers in one argument: depths are added up
_MANY = 64  # arguments, and values of one argument
LONGEST_NAME = 200
"""Characters of the name of an architecture."""
# timm's names of poolings, for feature maps and for tokens. Some builders take any other name for one of them.
_POOLINGS = (
    *("", "avg", "avgmax", "catavgmax", "max", "fast", "fastavg", "fastavgmax", "fastcatavgmax", "fastmax"),
    *("token", "map", "merge", "align", "prr", "soft", "none"),
)


class Preprocessing(TypedDict, total=False):
    """timm's data configuration, as `timm.data.resolve_data_config` returns it and slim checkpoints store it.

    A checkpoint may lack some of the keys.

    Attributes:
        input_size: Channels, height and width.
        mean: Mean of each channel, subtracted from values between 0 and 1.
        std: Standard deviation of each channel.
        interpolation: "bilinear", "bicubic", ...
        crop_pct: Fraction of the resized image that the evaluation crop keeps.
        crop_mode: "center", "squash", "border", ...
    """

    input_size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float | None
    crop_mode: str | None


def _positive_numbers(values: list[float]) -> list[float]:
    if min(values) <= 0:
        raise ValueError("every std is above 0")
    return values


def _bounded_size(size: list[int]) -> list[int]:
    if math.prod(size) > _LARGEST_INPUT:
        raise ValueError(f"an input of {size} has more than {_LARGEST_INPUT:,} values")
    return size


LARGEST_SIDE = 1 << 14
"""Channels and pixels of an image."""
_LARGEST_INPUT = 1 << 26  # values of one image
_Statistics = Annotated[
    list[Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False, strict=True)]],
    Field(min_length=1, max_length=LARGEST_SIDE),
]


class _PreprocessingRecord(BaseModel):
    """The values that `Preprocessing` may have: what the transforms of timm accept, and no memory ends."""

    model_config = ConfigDict(extra="ignore")

    input_size: Annotated[
        list[Annotated[int, Field(ge=1, le=LARGEST_SIDE, strict=True)]],
        Field(min_length=3, max_length=3),
        AfterValidator(_bounded_size),
    ] = [3, 224, 224]
    mean: _Statistics = [0.0]
    std: Annotated[_Statistics, AfterValidator(_positive_numbers)] = [1.0]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bilinear"
    crop_pct: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False, strict=True)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


def check_preprocessing(values: Mapping[str, Any]) -> None:
    """Check values that may come from a file; see `Preprocessing`.

    Raises:
        ArchitectureError: one is missing its meaning: a name that timm does not know, a std of 0, a huge image.
    """
    try:
        _PreprocessingRecord.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ArchitectureError(
            f"The preprocessing has {name} {str(first['input'])[:60]!r}: {first['msg'].removeprefix('Value error, ')}.",
            hint="The file or its config.json is damaged, or was edited.",
        ) from error


@dataclass(frozen=True)
class HeadRecord:
    """One fixed head of a model, as a slim checkpoint describes it.

    Attributes:
        path: The layer's name in `model.named_modules()`.
        layer_type: Type of the layer that was replaced.
        channel_dim: -1 for features, 1 for feature maps (the layer was a 1x1 convolution).
        spec: The head spec.
    """

    path: str
    layer_type: str
    channel_dim: int
    spec: HeadSpec

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "path": self.path,
            "layer_type": self.layer_type,
            "channel_dim": self.channel_dim,
            "spec": self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadRecord:
        """Read what `to_dict` wrote. The values may come from a file and are checked.

        Raises:
            FormatError: A key is missing or unknown, or a value has the wrong type.
            HeadSpecError: The spec is not valid.
        """
        fields = {"path": str, "layer_type": str, "channel_dim": int, "spec": Mapping}
        if set(values) != set(fields) or not all(isinstance(values[key], kind) for key, kind in fields.items()):
            raise FormatError(f"Not a head record: expected {', '.join(fields)}, got {', '.join(map(str, values))}.")
        return cls(values["path"], values["layer_type"], values["channel_dim"], HeadSpec.from_dict(values["spec"]))


@dataclass(frozen=True)
class Architecture:
    """A network that a library can build: the library, its name there, and the builder's arguments.

    Attributes:
        library: "timm", "torchvision" or "fixify" (the paper's own networks, built through timm).
        name: The library's name for it, without tag.
        kwargs: Arguments of the builder besides the number of classes (`in_chans`, `img_size`, ...), JSON-safe.
        tag: The pretrained weights: timm's tag ("a1_in1k") or the member of torchvision's weights enum
            ("IMAGENET1K_V2"); None for the library's default. The tag determines the preprocessing and the default
            number of classes, never the shapes of the backbone.
    """

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tag: str | None = None

    @property
    def ref(self) -> str:
        """The name that a person types: "timm/resnet50", "timm/resnet50.a1_in1k", "torchvision/resnet50"."""
        return f"{self.library}/{self.name}" + (f".{self.tag}" if self.tag else "")

    @property
    def spelled(self) -> str:
        """`ref` and the arguments: "timm/vit_base_patch16_224,img_size=384". `parse_architecture` reads it back."""
        return ",".join([self.ref, *(f"{key}={json.dumps(value)}" for key, value in self.kwargs.items())])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"library": self.library, "name": self.name, "tag": self.tag, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Read back what `to_dict` returned; the values may come from an untrusted file.

        Whether the installed libraries have the name is not asked: that is `fixify.models.known_architecture`.

        Raises:
            ArchitectureError: a key is missing or unknown, there is no such library, or an argument is not a plain
                value.
        """
        unknown = sorted(set(values) - {"library", "name", "tag", "kwargs"})
        library, name, tag, kwargs = (values.get(key) for key in ("library", "name", "tag", "kwargs"))
        if unknown or not isinstance(library, str) or not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise ArchitectureError(
                f"Not an architecture: {str(dict(values))[:LONGEST_NAME]}; expected library, name, tag and kwargs."
            )
        if library not in LIBRARIES:
            raise ArchitectureError(f"Unknown library {library[:LONGEST_NAME]!r}; known: {', '.join(LIBRARIES)}.")
        if not isinstance(kwargs or {}, Mapping) or not isinstance(tag or "", str) or len(tag or "") > LONGEST_NAME:
            raise ArchitectureError(f"The arguments of {library}/{name} must be an object and its tag a string.")
        return cls(library, name, check_arguments(f"{library}/{name}", kwargs or {}), tag or None)


BARE = Architecture("fixify", "classifier")
"""Stands for the network of a file that holds a classifier alone."""
BARE_PATH = "head"
"""Path of the head in such a file."""
BEHIND_PROJECTION = "classifier"
"""Name of a classifier below the projection whose output it takes."""


def check_arguments(text: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a builder that are not None, if they are plain values of a moderate size.

    Args:
        text: The architecture, for messages.
        kwargs: The arguments. They may come from an untrusted file.

    Raises:
        ArchitectureError: one is not allowed.
    """
    refused = sorted(_RESERVED & set(kwargs))
    if refused:
        raise ArchitectureError(f"{text}: {', '.join(refused)} cannot be an argument of an architecture.")
    if len(kwargs) > _MANY:
        raise ArchitectureError(f"{text}: {len(kwargs)} arguments are more than any architecture has.")
    odd = [key[:LONGEST_NAME] for key, value in kwargs.items() if not (key.isidentifier() and _is_plain(value))]
    if odd:
        raise ArchitectureError(
            f"{text}: the value of {', '.join(sorted(odd))} must be a number up to {_LARGEST_NUMBER:,}, a name, a "
            "boolean or a short list of these."
        )
    pooling = kwargs.get("global_pool")
    if isinstance(pooling, str) and pooling not in _POOLINGS:
        raise ArchitectureError(
            f"{text}: there is no pooling {pooling!r}.", hint=f"timm has {', '.join(filter(None, _POOLINGS))}."
        )
    return {key: value for key, value in kwargs.items() if value is not None}


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple, Mapping)):
        if depth > 4 or len(value) > _MANY:
            return False
        if isinstance(value, Mapping):
            return all(isinstance(key, str) and _is_plain(item, depth + 1) for key, item in value.items())
        numbers = [abs(item) for item in value if isinstance(item, (int, float))]
        return all(_is_plain(item, depth + 1) for item in value) and sum(numbers) <= _LARGEST_SUM
    if isinstance(value, (int, float)):
        return abs(value) <= _LARGEST_NUMBER  # false for NaN
    return value is None or (isinstance(value, str) and len(value) <= LONGEST_NAME)
