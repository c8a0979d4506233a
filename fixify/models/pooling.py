"""Change the pooling of a network to the one that a checkpoint was trained with."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fixify.errors import ArchitectureError
from fixify.models.architectures import Architecture, build
from fixify.models.built import shapes_of


def with_pooling(architecture: Architecture, num_classes: int, pooling: str, name: str) -> Architecture:
    """Return an architecture of timm with another pooling; the same one if it pools like that already.

    Args:
        architecture: The architecture.
        num_classes: Number of classes.
        pooling: timm's name of the pooling.
        name: The checkpoint's name, for the message.

    Raises:
        ArchitectureError: with that pooling, it has other tensors.
    """
    own = build(architecture, num_classes=num_classes, meta=True)
    usual = _pooling_of(own)
    if usual in (None, pooling) or (pooling == "token" and "cls_token" not in own.state_dict()):
        return architecture
    changed = replace(architecture, kwargs={**architecture.kwargs, "global_pool": pooling})
    try:
        other = shapes_of(build(changed, num_classes=num_classes, meta=True))
    except ArchitectureError:
        other = {}
    if other != shapes_of(own):
        raise ArchitectureError(
            f"{name} says that it was trained with global_pool={pooling}; {architecture.ref} pools with {usual}, and "
            f"has other tensors with global_pool={pooling}.",
            hint=f"If it pools with {usual}: --arch {architecture.ref},global_pool={usual}",
        )
    return changed


def _pooling_of(model: nn.Module) -> str | None:
    """Return timm's name of a model's pooling, or None."""
    for module in model.modules():
        pooling = getattr(module, "global_pool", None)
        kind = pooling if isinstance(pooling, str) else getattr(pooling, "pool_type", None)
        if isinstance(kind, str) and kind:
            return kind
    return None
