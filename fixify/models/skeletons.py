"""Describe networks by building them without values: what they have, and what the shipped index keeps of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from fixify.catalogue.shipped import Network, is_statistic
from fixify.catalogue.signature import is_counter
from fixify.catalogue.skeleton import ClassifierSite, Skeleton
from fixify.models.architectures import Architecture, build, preprocessing, tags_of
from fixify.models.built import shapes_of
from fixify.models.classifiers import find_classifiers, find_heads, is_tower, tower_width
from fixify.savings import count_parameters


def build_skeleton(architecture: Architecture, num_classes: int) -> Skeleton:
    """Build an architecture on the meta device, and describe it.

    Raises:
        NoClassifierError: it has no classifier, or is the image tower of a CLIP model.
    """
    model = build(architecture, num_classes=num_classes, meta=True)
    return skeleton_of(model, find_classifiers(model, architecture))


def skeleton_of(model: nn.Module, sites: list[ClassifierSite]) -> Skeleton:
    """Describe a model, which may be on the meta device.

    Args:
        model: The model.
        sites: Its classifier layers.
    """
    return Skeleton(
        shapes=shapes_of(model),
        floats=frozenset(key for key, tensor in model.state_dict().items() if tensor.is_floating_point()),
        num_parameters=count_parameters(model),
        sites=tuple(sites),
    )


def network_of(architecture: Architecture, model: nn.Module) -> Network | None:
    """Describe an architecture for the index.

    Args:
        architecture: The architecture.
        model: What it builds, on the meta device.

    Returns:
        None if what the index keeps would not give the network back: it has to be built.
    """
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    names = sorted(key for key in state if not is_counter(key))
    skeleton = skeleton_of(model, find_heads(model, architecture))
    network = Network(
        sites=tuple((site.path, site.layer_type) for site in skeleton.sites),
        odd=tuple(place for place, key in enumerate(names) if (key in parameters) is is_statistic(key)),
        integers=tuple(place for place, key in enumerate(names) if not state[key].is_floating_point()),
        tower=tower_width(model),
        tags=_other_networks(architecture),
    )
    if any(f"{path}.weight" not in skeleton.shapes for path, _ in network.sites):
        return None
    return network if network.skeleton(skeleton.shapes) == skeleton else None


def _other_networks(architecture: Architecture) -> tuple[str, ...]:
    """Return the tags with which an architecture is built otherwise than without, or is the tower of a CLIP model."""
    if architecture.library == "fixify":
        return ()
    usual = _built_from(architecture, None)
    tags = [tag for tag in tags_of(architecture.library, architecture.name) if tag]
    return tuple(tag for tag in tags if _built_from(architecture, tag) != usual or is_tower(architecture.name, tag))


def _built_from(architecture: Architecture, tag: str | None) -> object:
    """Return what a library's builder takes of the configuration of pretrained weights."""
    if architecture.library == "torchvision":
        return preprocessing(Architecture("torchvision", architecture.name, tag=tag))["input_size"]
    cfg = get_pretrained_cfg(f"{architecture.name}.{tag}" if tag else architecture.name, allow_unregistered=True)
    values: Mapping[str, Any] = {} if cfg is None else cfg.to_dict()
    size = values.get("input_size") or (3,)
    fixed = size if values.get("fixed_input_size") else size[:1]
    return [*fixed, values.get("global_pool"), values.get("classifier")]
