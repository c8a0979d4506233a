"""Parse the names of architectures, build them, and look up their preprocessing.

Nothing here downloads anything, except `build(pretrained=True)`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_data_config
from timm.models import get_deprecated_models, get_pretrained_cfg, split_model_name_tag
from torch import nn

from fixify.catalogue.names import adapted_preprocessing, checked_tag, parse
from fixify.catalogue.shipped import library_versions
from fixify.description import LIBRARIES, Architecture, Preprocessing
from fixify.errors import ArchitectureError
from fixify.models.build import Bounds, bounded, build_blank, build_on_meta
from fixify.models.networks import NETWORKS

_SMALL = 1 << 10  # a network whose arguments are smaller is built at once; others first without memory
_TORCHVISION_TASKS = {
    "detection": "object detection",
    "segmentation": "segmentation",
    "video": "video classification",
    "optical_flow": "optical flow",
    "quantization": "quantised inference",
}
# torchvision warns without this argument: its default is slow (it draws from SciPy's truncated normal) and will change.
_TORCHVISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def list_architectures(library: str | None = None) -> list[str]:
    """List the image classification architectures that the installed libraries can build, as "library/name".

    Args:
        library: "timm", "torchvision" or "fixify"; None for all.

    Raises:
        ArchitectureError: unknown library.

    >>> list_architectures("fixify")[:2]
    ['fixify/densenet100_bc_cifar', 'fixify/mobilenet_v1_050']
    """
    if library not in (None, *LIBRARIES):
        raise ArchitectureError(f"Unknown library {library!r}; known: {', '.join(LIBRARIES)}.")
    return [f"{lib}/{name}" for lib in LIBRARIES if library in (None, lib) for name in _names(lib)]


def parse_architecture(text: str, /, **kwargs: Any) -> Architecture:
    """Parse the name of an architecture.

    Args:
        text: "resnet50", "resnet50.a1_in1k", "timm/resnet50", "torchvision/resnet50",
            "torchvision/resnet50.IMAGENET1K_V2" or "ResNet50_Weights.IMAGENET1K_V2". A name without library is looked
            up in timm, then in torchvision, then among fixify's own networks ("resnet56_cifar"). Arguments may follow:
            "vit_base_patch16_224,img_size=384,in_chans=1".
        **kwargs: More arguments for the builder; None values are dropped.

    Raises:
        ArchitectureError: the name is unknown (the message lists the nearest ones) or is a torchvision model for
            another task, or an argument is not allowed.

    >>> parse_architecture("resnet50.a1_in1k").ref
    'timm/resnet50.a1_in1k'
    >>> parse_architecture("ResNet50_Weights.IMAGENET1K_V2").ref
    'torchvision/resnet50.IMAGENET1K_V2'
    >>> parse_architecture("vit_base_patch16_224,img_size=384").kwargs
    {'img_size': 384}
    """
    return parse(text, kwargs, _Installed())


def known_architecture(arch: Architecture) -> Architecture:
    """Return an architecture as the installed libraries call it: timm renames some.

    Raises:
        ArchitectureError: the installed libraries do not have it.

    >>> known_architecture(Architecture("timm", "tf_efficientnet_b0_ns")).ref
    'timm/tf_efficientnet_b0.ns_jft_in1k'
    """
    found = parse_architecture(f"{arch.library}/{arch.name}", **arch.kwargs)
    # A tag that the installed version does not know is kept: only its preprocessing is unavailable.
    return Architecture(found.library, found.name, found.kwargs, arch.tag or found.tag)


def build(
    arch: Architecture,
    *,
    num_classes: int | None = None,
    meta: bool = False,
    blank: bool = False,
    pretrained: bool = False,
    within: Bounds | None = None,
) -> nn.Module:
    """Build an architecture.

    Args:
        arch: The architecture.
        num_classes: None for the library's default (`default_num_classes`).
        meta: Build on the meta device, for names and shapes only. This takes a fraction of a second and no memory. Such
            a model cannot be run, and moving it to a device does not give its buffers their values.
        blank: Skip drawing initial weights, which takes most of the time of a build. For a model whose whole state dict
            is loaded next.
        pretrained: Load the library's weights for `arch.tag`, downloading them if they are not in its cache.
        within: How large it may be, given the tensors of the file that names it; default: larger than any that the
            libraries have.

    Raises:
        ArchitectureError: there is no such architecture, the library refuses the arguments, the network is larger than
            allowed, or there are no weights with that tag.

    >>> build(parse_architecture("resnet18"), num_classes=7, meta=True).get_classifier()
    Linear(in_features=512, out_features=7, bias=True)
    """
    if arch.name not in _name_set(arch.library):
        raise _unknown(arch.ref, arch.name, (arch.library,))
    if pretrained:
        checked_tag(arch.library, arch.name, arch.tag, _Installed())
    if arch.library != "torchvision":
        constructor = _timm_constructor(arch, num_classes, pretrained)
    else:
        constructor = _torchvision_constructor(arch, num_classes, pretrained)
    construct = build_on_meta if meta else build_blank if blank and not pretrained else _construct
    if not arch.kwargs:
        with bounded(within, arch.ref):
            return construct(constructor)
    try:
        if not meta and _largest(list(arch.kwargs.values())) > _SMALL:
            with bounded(within, arch.ref):
                build_on_meta(constructor)
        with bounded(within, arch.ref):
            return construct(constructor)
    # The libraries do not specify what a builder raises for unsuitable arguments; all of these occur.
    except (
        *(TypeError, ValueError, AssertionError, RuntimeError, AttributeError, NameError),
        *(LookupError, ArithmeticError, MemoryError),
    ) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arch.kwargs.items())
        reason = str(error) or type(error).__name__
        raise ArchitectureError(f"{arch.ref} cannot be built with {given}: {reason}") from error


def _construct(constructor: Callable[[], nn.Module]) -> nn.Module:
    # Initial weights are drawn from the global generator; restore its state for whoever seeded it.
    with torch.random.fork_rng(devices=[]):
        return constructor()


def default_num_classes(arch: Architecture) -> int:
    """Return the number of classes that the library builds by default; 0 for an encoder without a classifier."""
    if arch.library == "torchvision":
        return len(_torchvision_weights(arch).meta["categories"])
    cfg = get_pretrained_cfg(timm_name(arch), allow_unregistered=True)
    return 1000 if cfg is None else int(cfg.num_classes)


def preprocessing(arch: Architecture, cfg: Mapping[str, Any] | None = None) -> Preprocessing:
    """Return how images are prepared for the network at evaluation, as plain values.

    Args:
        arch: The architecture; its arguments and tag count.
        cfg: Preprocessing that came with the weights (timm's `pretrained_cfg`). Its values take precedence over the
            library's.

    Returns:
        input_size [channels, height, width], mean and std (of values in 0..1, one per channel), interpolation,
        crop_pct (the share of the resized image that is kept), crop_mode.

    Raises:
        ArchitectureError: a value is not one that images can be prepared with.

    >>> preprocessing(parse_architecture("resnet18"))["input_size"]
    [3, 224, 224]
    """
    known = _torchvision_preprocessing(arch) if arch.library == "torchvision" else _timm_preprocessing(arch)
    return adapted_preprocessing(known, arch, cfg)


@cache
def _names(library: str) -> tuple[str, ...]:
    if library == "fixify":
        return NETWORKS
    if library == "timm":  # fixify's own networks are registered there too, and slim checkpoints (`fixify._timm`)
        return tuple(name for name in timm.list_models(exclude_filters="fixify_*") if name not in NETWORKS)
    return tuple(torchvision.models.list_models(module=torchvision.models))


class _Installed:
    """The registry of the installed libraries."""

    def names(self, library: str) -> Collection[str]:
        return _name_set(library)

    def tags(self, library: str, name: str) -> Collection[str]:
        return tags_of(library, name)

    def renamed(self) -> Mapping[str, str | None]:
        return get_deprecated_models()

    def enum(self, name: str) -> tuple[str, Mapping[str, str]]:
        return weights_enum(name)

    def unknown(self, text: str, name: str, libraries: tuple[str, ...]) -> ArchitectureError:
        return _unknown(text, name, libraries)


def weights_enum(name: str) -> tuple[str, dict[str, str]]:
    """Return the name of torchvision's enum of weights of an architecture, and alias -> member."""
    enum = torchvision.models.get_model_weights(name)
    return enum.__name__, {alias: member.name for alias, member in enum.__members__.items()}


@cache
def _name_set(library: str) -> frozenset[str]:
    return frozenset(_names(library))


def _unknown(text: str, name: str, libraries: tuple[str, ...]) -> ArchitectureError:
    if "torchvision" in libraries and name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__.split(".")
        task = next((text for key, text in _TORCHVISION_TASKS.items() if key in module), "another task")
        return ArchitectureError(
            f"torchvision's {name} is a model for {task}; fixify converts image classifiers.",
            hint="List the architectures that fixify converts: fixify report --all",
        )
    known = [ref for library in libraries for ref in list_architectures(library)]
    short = {ref.partition("/")[2]: ref for ref in reversed(known)}
    near = [short[match] for match in difflib.get_close_matches(name, short, n=5, cutoff=0.6)]
    return ArchitectureError(
        f"No architecture {text!r} in {' or '.join(f'{lib} {library_versions()[lib]}' for lib in libraries)}.",
        hint=f"Nearest: {', '.join(near)}."
        if near
        else "List the architectures that fixify converts: fixify report --all",
    )


def _largest(value: Any) -> float:
    """Return the largest number in nested lists and objects; 0 if there is none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, (int, float)) else 0


def tags_of(library: str, name: str) -> list[str]:
    """Return the tags of an architecture's pretrained weights; "" can be among timm's."""
    if library == "fixify":
        return []
    if library == "timm":
        return [split_model_name_tag(full)[1] for full in timm.list_models(f"{name}.*", include_tags=True)]
    return [member.name for member in torchvision.models.get_model_weights(name)]


def output_widths(name: str) -> dict[str, int]:
    """Return the number of outputs of each of timm's weights of an architecture, by tag.

    >>> output_widths("convnext_base")["clip_laion2b"]
    640
    """
    found = {tag: get_pretrained_cfg(f"{name}.{tag}") for tag in tags_of("timm", name) if tag}
    return {tag: cfg.num_classes for tag, cfg in found.items() if cfg is not None}


def _known_tag(arch: Architecture) -> str | None:
    return arch.tag if arch.tag and arch.tag in tags_of(arch.library, arch.name) else None


def timm_name(arch: Architecture) -> str:
    """Return timm's name of an architecture; a tag that the installed version does not know is left out."""
    tag = _known_tag(arch)
    return f"{arch.name}.{tag}" if tag else arch.name


def _timm_constructor(arch: Architecture, num_classes: int | None, pretrained: bool) -> Callable[[], nn.Module]:
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in arch.kwargs.items()}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return lambda: timm.create_model(timm_name(arch), pretrained=pretrained, **kwargs)


def _timm_preprocessing(arch: Architecture) -> dict[str, Any]:
    cfg = get_pretrained_cfg(timm_name(arch), allow_unregistered=True)
    return dict(resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else {"input_size": (3, 224, 224)}))


def _torchvision_weights(arch: Architecture) -> Any:
    return torchvision.models.get_model_weights(arch.name)[_known_tag(arch) or "DEFAULT"]


def _torchvision_constructor(arch: Architecture, num_classes: int | None, pretrained: bool) -> Callable[[], nn.Module]:
    kwargs = dict(arch.kwargs)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    weights = _torchvision_weights(arch) if pretrained else None
    if weights is None:
        kwargs = {**_torchvision_defaults(arch), **kwargs}
    return lambda: torchvision.models.get_model(arch.name, weights=weights, **kwargs)


def _torchvision_defaults(arch: Architecture) -> dict[str, Any]:
    """Return the arguments that torchvision's builders set themselves when they load weights."""
    defaults = dict(_TORCHVISION_DEFAULTS.get(arch.name, {}))
    if arch.name in _TORCHVISION_DEFAULTS and arch.tag:
        defaults["transform_input"] = True
    if arch.name.startswith("vit_"):  # position embeddings have the image size of the weights' preprocessing
        defaults["image_size"] = _torchvision_preprocessing(arch)["input_size"][1]
    return defaults


def _torchvision_preprocessing(arch: Architecture) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preset = _torchvision_weights(arch).transforms()
    return {
        "input_size": (3, preset.crop_size[0], preset.crop_size[0]),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        "crop_mode": "center",
    }
