"""Read what a head stores from a state dict, and say what is wrong with it before anything is overwritten."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.projection import Projection
from fixify.heads.spec import HeadSpec


def projection_in(spec: HeadSpec, state_dict: Mapping[str, Any], prefix: str) -> Projection | None:
    """Read the projection of a spec with `planes` from a state dict whose tensors fit; None if it is not there."""
    parts = [state_dict.get(f"{prefix}projection{end}") for end in ("", "_steps")]
    directions, steps = (None if part is None or part.is_meta else part.detach().cpu() for part in parts)
    if spec.planes is None or directions is None or steps is None:
        return None
    return Projection(spec.planes, directions.numpy().copy(), steps.float().numpy())


def stored_problems(spec: HeadSpec, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """List what is wrong with the integer tensors of a state dict, which torch would cast without a message."""
    found = []
    for tensor in spec.stored_tensors:
        stored = state_dict.get(prefix + tensor.name)
        if tensor.name not in ("codes", "gains", "projection", "projection_steps") or stored is None:
            continue
        if tensor.name == "projection_steps":
            if stored.shape != tensor.shape or not stored.is_floating_point():
                found.append(f"{prefix}{tensor.name} must be floating-point numbers of shape {list(tensor.shape)}.")
            elif not stored.is_meta and not bool((stored.isfinite() & (stored > 0)).all()):
                found.append(f"{prefix}{tensor.name} must be positive and finite.")
            continue
        any_integer = tensor.memory_dtype is not None
        if any_integer:
            fits = not (stored.is_floating_point() or stored.is_complex())
        else:
            fits = stored.dtype == getattr(torch, tensor.dtype or "")
        if not fits or stored.shape != tensor.shape:
            wanted, got = "an integer type" if any_integer else tensor.dtype, str(stored.dtype).split(".")[1]
            found.append(
                f"{prefix}{tensor.name} must be {wanted} of shape {list(tensor.shape)}, not {got} {list(stored.shape)}."
            )
        elif tensor.name == "gains" and not stored.is_meta and not bool(stored.all()):
            found.append(f"{prefix}gains must lie in 1 .. {GAIN_STEPS}: a code of length 0 cannot tell its class.")
    return found


def from_reference_code(
    state_dict: dict[str, Any], key: str, num_features: int, own_scale: Tensor | None
) -> dict[str, Any]:
    """Convert the scale of the paper's published code: [1], for codes of norm sqrt(N).

    Args:
        state_dict: As that code wrote it.
        key: Of the scale.
        num_features: N.
        own_scale: The head's scale if it is fixed, which that code does not store; else None.
    """
    stored = state_dict.get(key)
    if stored is not None and stored.shape == (1,):
        return {**state_dict, key: stored[0] * math.sqrt(num_features)}
    if stored is None and own_scale is not None:
        return {**state_dict, key: own_scale}
    return state_dict
