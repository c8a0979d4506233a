"""A slim checkpoint as one of timm's models: its config.json, and the model that `timm.create_model` builds from it.

config.json names the architecture `fixify_slim`, which `fixify._timm` registers, and describes the network and its
heads in `model_args`, since timm hands nothing else to the architecture. The backbone is built and loaded by timm
itself, from a state dict that looks as if the classifier were a learned one. So everything that timm adapts works:
other image sizes and channels, another number of classes, `num_classes=0`, `features_only=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from fixify.catalogue.signature import is_counter
from fixify.checkpoints.files import CONFIG
from fixify.checkpoints.header import FORMAT_VERSION, SLIM_KEY, read_header, read_metadata
from fixify.checkpoints.hub import download
from fixify.checkpoints.locate import SLIM_WEIGHTS
from fixify.checkpoints.slim import Origin, SlimInfo, main_dtype
from fixify.description import BARE, Architecture, HeadRecord, check_arguments
from fixify.errors import ArchitectureError, FormatError
from fixify.models.architectures import build, known_architecture, preprocessing, timm_name
from fixify.models.build import bounded, load_weights
from fixify.models.classifiers import find_heads
from fixify.models.projection import put_classifier_behind_
from fixify.surgery import apply_heads_

ARCHITECTURE = "fixify_slim"
"""Under which `fixify._timm` registers slim checkpoints with timm."""

_MOST_HEADS = 16
_COPIED = ("first_conv", "classifier", "fixed_input_size", "pool_size")
# The place of the weights and what belongs to other weights; the network is built with those that were read already.
_OF_SOURCE = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "label_offset", "label_names")


def config_for_timm(info: SlimInfo, *, licence: str | None = None) -> dict[str, Any]:
    """Describe a slim checkpoint as timm's config.json does.

    Args:
        info: What the checkpoint says about itself.
        licence: An identifier of the Hugging Face hub, if the licence is known.

    Returns:
        timm's keys: `architecture`, `num_classes`, `num_features`, `label_names`, `model_args`, `pretrained_cfg`. Ours:
        `fixify`, with the version of the format and the number of weights that were removed.
    """
    own: Mapping[str, Any] = {}
    if not info.is_bare:
        own = getattr(build(info.architecture, num_classes=info.num_classes, meta=True), "pretrained_cfg", None) or {}
    cfg = {**info.preprocessing, **{key: own[key] for key in _COPIED if own.get(key) is not None}}
    if "classifier" not in cfg or info.projection is not None:
        cfg["classifier"] = [record.path for record in info.heads]
    config: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "num_classes": info.num_classes,
        "num_features": info.heads[0].spec.num_features,
        "model_args": {
            "slim": {
                "architecture": info.architecture.to_dict(),
                "heads": [record.to_dict() for record in info.heads],
                **({} if info.projection is None else {"projection": info.projection}),
            }
        },
        "pretrained_cfg": {**cfg, "num_classes": info.num_classes},
        SLIM_KEY: {"version": FORMAT_VERSION, "removed": info.savings.get("removed")},
    }
    if licence is not None:
        config["pretrained_cfg"]["license"] = licence
    if info.labels is not None:
        config["label_names"] = info.labels
    return config


def build_in_timm(
    *,
    pretrained: bool,
    slim: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the network of a slim checkpoint for `timm.create_model`.

    Args:
        pretrained: Load the weights. Otherwise they are drawn at random, as in timm, and a head that stores its codes
            has none until `load_state_dict`.
        slim: The network and its heads, from config.json.
        pretrained_cfg: timm's description of the weights and of the preprocessing, from config.json.
        pretrained_cfg_overlay: Entries that take precedence over those of `pretrained_cfg`.
        cache_dir: Cache of the Hugging Face hub; None for the default one.
        num_classes: None or the checkpoint's number of classes for the fixed heads. Another number gives a learned
            classifier with random weights, as in timm, and 0 none.
        features_only: Build timm's feature extractor.
        kwargs: Arguments of the network, which take precedence over those in config.json.

    Returns:
        The model, with timm's `pretrained_cfg`; in training mode, as timm builds it.

    Raises:
        FormatError: config.json or the weights are damaged, or do not belong together.
        CodebookMismatchError: A codebook rebuilt here is not the one that the file was written with.
        ArchitectureError: The installed libraries do not have the network, it does not take an argument, or timm is too
            old.
        SourceError: The repository cannot be read.
    """
    cfg = resolve_pretrained_cfg(ARCHITECTURE, pretrained_cfg, dict(pretrained_cfg_overlay or {})).to_dict()
    source_args = kwargs.pop("pretrained_model_args", None)
    tensors: dict[str, Tensor] | None = None
    info: SlimInfo | None = None
    if pretrained:
        tensors, info = _read_weights(_weights_file(cfg, cache_dir))
    if info is not None:
        arch, heads, projection = info.architecture, info.heads, info.projection
    else:
        arch, heads, projection = _described(slim)
    if arch == BARE:
        raise ArchitectureError(
            "This slim checkpoint is a classifier without a network, which is none of timm's models.",
            hint="Load it with fixify.load: it takes features.",
        )
    arch = known_architecture(arch)
    fixed = not features_only and num_classes in (None, heads[0].spec.num_classes)
    classes = heads[0].spec.num_classes if num_classes is None else num_classes
    if arch.library == "torchvision":
        if features_only:
            raise ArchitectureError(f"{arch.ref} is not one of timm's models, and has no features_only.")
        model = _build_of_torchvision(arch, heads if fixed else (), classes, tensors, kwargs)
    else:
        if features_only:
            kwargs["features_only"] = True
        if source_args is not None:
            kwargs["pretrained_model_args"] = dict(arch.kwargs)
        fixed_heads = _Fixed(arch, heads, projection)
        model = _build_of_timm(fixed_heads, cfg, classes, tensors, kwargs, fixed=fixed)
    made: Any = model
    made.pretrained_cfg = made.default_cfg = {**cfg, "architecture": ARCHITECTURE}
    if fixed:
        kwargs.pop("pretrained_model_args", None)
        _remember(made, info, arch, kwargs)
    return model


def _described(slim: Mapping[str, Any] | None) -> tuple[Architecture, tuple[HeadRecord, ...], str | None]:
    """Read what config.json says of the network, its heads, and the layer that they are behind.

    Raises:
        FormatError: it says nothing, or not enough.
    """
    try:
        if not isinstance(slim, Mapping):
            raise ValueError("model_args has no slim")
        heads = tuple(HeadRecord.from_dict(entry) for entry in slim["heads"][:_MOST_HEADS])
        if not heads:
            raise ValueError("it has no heads")
        projection = slim.get("projection")
        if not isinstance(projection, str | None):
            raise ValueError("projection is no name of a layer")
        return Architecture.from_dict(slim["architecture"]), heads, projection
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(
            f"This {CONFIG} does not describe a slim checkpoint: {error}.",
            hint="Write the folder again: fixify push local-dir:FOLDER FILE",
        ) from error


def _weights_file(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> Path:
    """Return the file with the weights that timm's `pretrained_cfg` names."""
    if cfg.get("source") == "hf-hub":
        return download(str(cfg["hf_hub_id"]), cfg.get("hf_hub_filename") or SLIM_WEIGHTS, cache_dir=cache_dir)
    if not cfg.get("file"):
        raise FormatError(
            f"{ARCHITECTURE} has no weights of its own.",
            hint='Name a folder or a repository: timm.create_model("local-dir:FOLDER", pretrained=True)',
        )
    path = Path(cfg["file"])
    return path / SLIM_WEIGHTS if path.is_dir() else path


def _read_weights(path: Path) -> tuple[dict[str, Tensor], SlimInfo | None]:
    """Read the tensors of a file, and its header if it is a slim checkpoint; timm's own copy of one has no header."""
    info = read_header(path).info if SLIM_KEY in read_metadata(path) else None
    try:
        return load_file(path), info
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable .safetensors file: {error}.") from error


@dataclass(frozen=True)
class _Fixed:
    """A network with fixed heads.

    Attributes:
        arch: The network.
        heads: Its heads.
        projection: The layer that its head is behind, or None.
    """

    arch: Architecture
    heads: tuple[HeadRecord, ...]
    projection: str | None

    @property
    def outputs(self) -> int:
        """Number of outputs of the network as timm builds it: of the projection, or of the classifier."""
        spec = self.heads[0].spec
        return spec.num_classes if self.projection is None else spec.num_features


def _build_of_timm(
    network: _Fixed,
    cfg: Mapping[str, Any],
    num_classes: int,
    tensors: Mapping[str, Tensor] | None,
    kwargs: dict[str, Any],
    *,
    fixed: bool,
) -> nn.Module:
    arch = network.arch
    base = get_pretrained_cfg(timm_name(arch), allow_unregistered=True)
    own = {} if base is None else base.to_dict()
    given = {**_as_tuples(arch.kwargs), **kwargs}
    if own.get("fixed_input_size"):
        given.setdefault("img_size", tuple(own["input_size"][-2:]))
    described = {
        **own,
        **{key: value for key, value in cfg.items() if value is not None and key not in _COPIED},
        **dict.fromkeys(_OF_SOURCE),
        "architecture": arch.name,
        "custom_load": False,
        "num_classes": network.outputs,
    }
    if tensors is not None:
        described["state_dict"] = _as_learned(network, tensors)
    with bounded(None, arch.ref):
        model = timm.create_model(
            arch.name,
            pretrained=tensors is not None,
            pretrained_cfg=described,
            num_classes=network.outputs if fixed else num_classes,
            **given,
        )
    if fixed:
        if network.projection is not None:
            put_classifier_behind_(model, network.projection, num_classes)
        _put_heads_(model, network.heads, tensors)
    return model


def _as_learned(network: _Fixed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that the network has with a learned classifier, whose values are zeros.

    The filters of timm's architectures tell their own files from those of other libraries by the classifier's name.
    """
    model = build(network.arch, num_classes=network.outputs, meta=True)
    paths = tuple(f"{record.path}." for record in network.heads)
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith(paths)}
    for key, wanted in model.state_dict().items():
        if key.startswith(paths):
            state[key] = torch.zeros((), dtype=wanted.dtype).expand(wanted.shape)
        elif is_counter(key):
            state.setdefault(key, torch.zeros_like(wanted, device="cpu"))
    return state


def _put_heads_(model: nn.Module, heads: tuple[HeadRecord, ...], tensors: Mapping[str, Tensor] | None) -> None:
    """Replace the classifiers of a model by fixed heads, and load these.

    Raises:
        FormatError: The tensors are not those of the heads.
    """
    apply_heads_(model, heads)
    for record in heads if tensors is not None else ():
        prefix = f"{record.path}."
        state = {key.removeprefix(prefix): value for key, value in (tensors or {}).items() if key.startswith(prefix)}
        try:
            model.get_submodule(record.path).load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise FormatError(f"The tensors of {record.path} are not those of the head: {reason}") from error


def _build_of_torchvision(
    arch: Architecture,
    heads: tuple[HeadRecord, ...],
    num_classes: int,
    tensors: Mapping[str, Tensor] | None,
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """Build one of torchvision's models; it gets the attributes that timm's scripts read.

    Args:
        arch: The architecture.
        heads: The fixed heads; none for a learned classifier.
        num_classes: Number of classes.
        tensors: The weights, or None.
        kwargs: Arguments of `timm.create_model`. timm's scripts always give the channels.
    """
    given = {key: value for key, value in kwargs.items() if (key, value) != ("in_chans", 3)}
    arch = Architecture(arch.library, arch.name, {**arch.kwargs, **given}, arch.tag)
    model = build(arch, num_classes=num_classes, blank=tensors is not None and bool(heads))
    apply_heads_(model, heads)
    if tensors is not None:
        state = dict(tensors)
        if not heads:  # the learned classifier keeps its random weights
            paths = tuple(f"{site.path}." for site in find_heads(model, arch))
            state = {key: value for key, value in tensors.items() if not key.startswith(paths)}
            state |= {key: value for key, value in model.state_dict().items() if key.startswith(paths)}
        try:
            load_weights(model, state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise FormatError(f"The weights are not those of {arch.ref}: {reason}") from error
    model.num_classes = num_classes  # type: ignore[assignment]
    return model


def _remember(model: Any, info: SlimInfo | None, arch: Architecture, kwargs: Mapping[str, Any]) -> None:
    """Attach what `fixify.save` has to know to write the model again."""
    changed = {key: value for key, value in kwargs.items() if (key, value) != ("in_chans", 3) or key in arch.kwargs}
    if info is not None and all(arch.kwargs.get(key) == value for key, value in changed.items()):
        model.fixify_info = info
        return
    try:
        arch = Architecture(arch.library, arch.name, check_arguments(arch.ref, {**arch.kwargs, **changed}), arch.tag)
    except ArchitectureError:
        return  # a class or a function, which no header holds; `fixify.save` will say that it cannot write this model
    prepared = preprocessing(arch, None if info is None else info.preprocessing)
    source = {} if info is None else info.source
    labels = None if info is None else info.labels
    model.fixify_origin = Origin(arch, prepared, labels, source, main_dtype(model.state_dict()))


def _as_tuples(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
