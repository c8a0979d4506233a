"""Find the classifier layers of a model, and list which architectures have one.

A classifier layer is a linear map (a Linear or a 1x1 convolution) from features to one logit per class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fixify._values import counted
from fixify.catalogue.skeleton import ClassifierSite
from fixify.errors import ArchitectureError, NoClassifierError
from fixify.models.architectures import (
    Architecture,
    build,
    list_architectures,
    output_widths,
    parse_architecture,
)
from fixify.models.projection import ProjectedClassifier, behind

# torchvision has no function that returns the classifier. Each of its classifiers, including the auxiliary ones of
# GoogLeNet and Inception v3, is under one of these names, and the last linear layer there gives the logits.
_TORCHVISION_HEADS = ("fc", "classifier", "head", "heads")
_TORCHVISION_AUXILIARY = ("aux1", "aux2", "AuxLogits")
_SOME_CLASSES = 1000


def find_classifiers(model: nn.Module, arch: Architecture | None = None) -> list[ClassifierSite]:
    """Find every classifier layer of a model, in the order of `model.named_modules()`.

    Most models have one. Distilled and multi-scale models (DeiT with two heads, CrossViT, EfficientViM) and models with
    auxiliary classifiers have several. The site is the linear layer itself: in `NormLinear` (LeViT, RepViT) the
    BatchNorm before it belongs to the backbone, and in MetaFormer's `MlpHead` only the last layer counts.

    Args:
        model: The model; one on the meta device will do. Models with `get_classifier()` are searched as timm's, others
            as torchvision's.
        arch: The name to use in error messages; the model's class name if None.

    Raises:
        NoClassifierError: the model is an encoder, was built with `num_classes=0`, is the image tower of a CLIP model
            (`refuse_projection`), or has a classifier that fixify cannot find.

    >>> [site.path for site in find_classifiers(build(parse_architecture("resnet18"), meta=True))]
    ['fc']
    """
    refuse_projection(model, arch)
    return find_heads(model, arch)


def find_heads(model: nn.Module, arch: Architecture | None = None) -> list[ClassifierSite]:
    """Find what `find_classifiers` finds, and the projection of a CLIP model's image tower.

    Raises:
        NoClassifierError: the model has neither.
    """
    name = arch.ref if arch is not None else type(model).__name__
    attached = _behind_projection(model)
    if attached is not None:
        layers = attached
    elif hasattr(model, "get_classifier"):
        layers = _timm_layers(model, name)
    elif hasattr(model, "forward_features") or hasattr(model, "reset_classifier"):
        raise NoClassifierError(
            f"{name} is an encoder that takes no classifier: it has none, whatever its number of classes.",
            hint="A classifier of its features can be converted alone: fixify convert FILE (a matrix of C x N)",
        )
    else:
        layers = _torchvision_layers(model, name)
    return [_site(path, layer) for path, layer in layers.items()]


def _behind_projection(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the classifier behind a projection by its path; None for models without such a projection."""
    for path, module in model.named_modules():
        if isinstance(module, ProjectedClassifier):
            return dict(_linear_layers_at(behind(path), module.classifier))
    return None


def _linear_layers_at(path: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((_join(path, inner), found) for inner, found in _linear_layers(layer))


@dataclass(frozen=True)
class Coverage:
    """What fixify can do with one architecture, as its library builds it by default.

    Attributes:
        ref: "library/name".
        sites: Its classifier layers; empty if it has none.
        reason: Why it cannot be converted as it is; None if it can.
        takes_classes: Whether it has a classifier when it is built with a number of classes.
        num_parameters: Number of elements of all parameters.
    """

    ref: str
    sites: tuple[ClassifierSite, ...]
    reason: str | None
    takes_classes: bool
    num_parameters: int

    @property
    def convertible(self) -> bool:
        """Whether fixify converts its checkpoints."""
        return bool(self.sites)

    @property
    def head_parameters(self) -> int:
        """Number of weights and biases of all its classifier layers."""
        return sum(site.num_parameters for site in self.sites)


def coverage(refs: Iterable[str] | None = None) -> Iterator[Coverage]:
    """Build architectures on the meta device, one after the other, and find their classifiers.

    Args:
        refs: Names of architectures; None for all that the libraries have, which takes some minutes.
    """
    for ref in list_architectures() if refs is None else refs:
        arch = parse_architecture(ref)
        model = build(arch, meta=True)
        size = sum(parameter.numel() for parameter in model.parameters())
        try:
            yield Coverage(arch.ref, tuple(find_classifiers(model, arch)), None, True, size)
        except NoClassifierError:
            takes_classes = _takes_classes(arch)
            reason = "a CLIP image tower" if is_projection(model) else "an encoder"
            reason += ": no classifier unless built with num_classes" if takes_classes else ""
            yield Coverage(arch.ref, (), reason, takes_classes, size)


def _takes_classes(arch: Architecture) -> bool:
    try:
        model: nn.Module = build(arch, num_classes=_SOME_CLASSES, meta=True)
        return bool(find_classifiers(model, arch))
    # timm's encoders refuse the argument with different errors.
    except (NoClassifierError, ArchitectureError, TypeError, ValueError, AssertionError, RuntimeError):
        return False


def _timm_layers(model: Any, name: str) -> dict[str, nn.Module]:
    """Find the linear layers below `get_classifier()`, and those that `pretrained_cfg["classifier"]` names.

    Neither is enough alone: `get_classifier()` omits VOLO's auxiliary head, and the configuration omits one of the two
    heads of levit_384_s8. Where both name the same head, the configuration decides, because the hidden layer of an MLP
    head can be as wide as the number of classes.
    """
    num_classes = getattr(model, "num_classes", 0)
    if not num_classes:
        raise NoClassifierError(
            f"{name} has no classifier: it is an encoder, or was built with num_classes=0.",
            hint="fixify replaces an existing classifier. Give it one: --classifier FILE (a matrix of C x N). Or train "
            "one first: timm.create_model(name, num_classes=...)",
        )
    heads = _timm_heads(model, name)
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    declared = [path for path in _declared(model) if path in modules]
    layers: dict[str, nn.Module] = {}
    for head in heads:
        if head not in paths:
            raise NoClassifierError(
                f"{name}: get_classifier() returns a {type(head).__name__} that is not a module of the model."
            )
        inside = [(_join(paths[head], path), layer) for path, layer in _linear_layers(head)]
        if inside and _is_by_hand(head, num_classes):
            layers |= dict(inside[-1:])
            continue
        below = {path: layer for path, layer in inside if _width(layer) == num_classes}
        layers |= {path: layer for path, layer in below.items() if path in declared} or below
    layers |= {
        _join(path, inner): layer
        for path in declared
        if not any(path == paths[head] for head in heads)
        for inner, layer in _linear_layers(modules[path])
        if _width(layer) == num_classes
    }
    if not layers:
        kinds = ", ".join(type(head).__name__ for head in heads)
        raise NoClassifierError(
            f"{name}: its classifier is a {kinds}, which contains no linear layer with {num_classes} outputs."
        )
    return _in_order(model, layers)


def has_hand_made_head(model: Any) -> bool:
    """Return whether a timm model's classifier was replaced by hand, as with `model.fc = nn.Sequential(...)`.

    A layer of another width than `model.num_classes` counts as well. Only a forward pass shows whether the last linear
    layer of such a head produces the logits.
    """
    if not hasattr(model, "get_classifier"):
        return False
    return any(_is_by_hand(head, model.num_classes) for head in _timm_heads(model, type(model).__name__))


def is_auxiliary(path: str) -> bool:
    """Return whether a classifier is one of torchvision's auxiliary ones, which are unused in eval mode."""
    return path.split(".")[0] in _TORCHVISION_AUXILIARY


def refuse_projection(model: nn.Module, arch: Architecture | None = None) -> None:
    """Refuse the image tower of a CLIP model, whose last layer projects to an embedding.

    timm builds these towers with the width of the embedding as `num_classes`.

    Raises:
        NoClassifierError: the model is such a tower, with the width that its pretrained weights have.
    """
    if not is_projection(model):
        return
    (site, *_) = find_heads(model, arch)
    cfg: Any = model.pretrained_cfg
    name = arch.ref if arch is not None else f"{type(model).__name__} ({cfg.get('architecture')}.{cfg.get('tag')})"
    raise NoClassifierError(
        f"{name} is the image tower of a CLIP model: {site.path} is a projection to an embedding of "
        f"{counted(site.num_classes, 'value')}, not a classifier.",
        hint=f"Put text embeddings behind it: --classifier FILE (a matrix of C x {site.num_classes}). Or fine-tune it "
        "on labels first: timm.create_model(name, pretrained=True, num_classes=...)",
    )


def is_projection(model: nn.Module) -> bool:
    """Return whether a model is the image tower of a CLIP model, with the width that its pretrained weights have."""
    if _behind_projection(model) is not None:
        return False
    width = tower_width(model)
    return width is not None and width == getattr(model, "num_classes", None)


def tower_width(model: nn.Module) -> int | None:
    """Return the width of a model's last layer with which its pretrained weights are the image tower of a CLIP model.

    Returns:
        None if they are something else.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not is_tower(str(cfg.get("architecture") or ""), str(cfg.get("tag") or "")):
        return None
    return cfg.get("num_classes") or None


def tower_tags(architecture: Architecture, width: int) -> tuple[str, ...]:
    """List timm's weights of an architecture that are a CLIP tower with an embedding of a width, by their tags.

    Args:
        architecture: An architecture; with a tag, it says itself what it is, and none is listed.
        width: Number of outputs of its last layer.

    >>> tower_tags(parse_architecture("convnext_xxlarge"), 1024)
    ('clip_laion2b_rewind', 'clip_laion2b_soup')
    """
    if architecture.library != "timm" or architecture.tag is not None:
        return ()
    name = architecture.name
    return tuple(tag for tag, own in output_widths(name).items() if own == width and is_tower(name, tag))


def unnamed_tower(architecture: Architecture, width: int) -> tuple[str, tuple[str, ...]] | None:
    """Return the last layer of an architecture, and timm's weights of it that are a CLIP tower of that width.

    Returns:
        The layer's path and the weights' tags (`tower_tags`); None if there are none, or they are its default.
    """
    tags = tower_tags(architecture, width)
    if not tags:
        return None
    model = build(architecture, num_classes=width, meta=True)
    return None if is_projection(model) else (find_heads(model, architecture)[0].path, tags)


def is_tower(name: str, tag: str) -> bool:
    """Return whether weights are an image tower as they were trained beside a text tower.

    The Perception Encoder (vit_pe_core_...) is a CLIP model too. Weights that were then tuned for a label set have "ft"
    in their tag.
    """
    return ("clip" in f"{name}.{tag}" or "_pe_core_" in name) and "_ft_in" not in tag


def _is_by_hand(head: nn.Module, num_classes: int) -> bool:
    """Return whether a head is one that timm does not build: timm's classes count their classes, and are no Sequential.

    A ModuleList holds the heads of a multi-scale model.
    """
    if isinstance(head, nn.Sequential):
        return True
    return isinstance(head, (nn.Linear, nn.Conv2d)) and _width(head) != num_classes


def _timm_heads(model: Any, name: str) -> tuple[nn.Module, ...]:
    try:
        found = model.get_classifier()
    except AttributeError as error:  # it looks for a part of the head that timm built
        raise NoClassifierError(
            f"{name}: its head was replaced by one in which timm's get_classifier() finds no classifier ({error}).",
            hint="Replace only the linear layer in it: model.reset_classifier(num_classes) shows where that is.",
        ) from error
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _declared(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _torchvision_layers(model: nn.Module, name: str) -> dict[str, nn.Module]:
    children = dict(model.named_children())
    layers: dict[str, nn.Module] = {}
    for attribute in (*_TORCHVISION_AUXILIARY, *_TORCHVISION_HEADS):
        if attribute in children:
            for path, layer in list(_linear_layers(children[attribute]))[-1:]:
                layers[_join(attribute, path)] = layer
    widths = {_width(layer) for layer in layers.values()}
    if not any(path.split(".")[0] in _TORCHVISION_HEADS for path in layers) or len(widths) != 1:
        raise NoClassifierError(
            f"{name} has no classifier that fixify can find.",
            hint="fixify looks for timm's get_classifier() and for torchvision's fc, classifier, head or heads.",
        )
    return _in_order(model, layers)


def _in_order(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {path: layers[path] for path, _ in model.named_modules() if path in layers}


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        ):
            yield path, layer


def _width(layer: Any) -> int:
    return int(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features)


def _join(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


def _site(path: str, layer: Any) -> ClassifierSite:
    convolution = isinstance(layer, nn.Conv2d)
    return ClassifierSite(
        path=path,
        layer_type=type(layer).__name__,
        num_features=int(layer.in_channels if convolution else layer.in_features),
        num_classes=_width(layer),
        channel_dim=1 if convolution else -1,
        num_parameters=sum(parameter.numel() for parameter in layer.parameters(recurse=False)),
        has_bias=layer.bias is not None,
    )
