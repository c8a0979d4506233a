"""Activation checkpointing: less memory for a second forward pass, with the same result."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fixify.errors import UsageError


def check_checkpointing(model: Any) -> None:
    """Raise `UsageError` if the model cannot do it."""
    _switch_on(model)
    model.set_grad_checkpointing(False)


def checkpoint_activations_(model: Any) -> None:
    """Have a timm model keep only the activations between its blocks, and compute the rest again in the backward pass.

    The second forward pass of a batch norm would count its batch twice in the running statistics; here it does not, so
    that a run with checkpointing validates as one without.

    Raises:
        UsageError: the model cannot do it.
    """
    _switch_on(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(partial(_track_once, momentum=module.momentum))


def _switch_on(model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # not timm's; timm's way of saying that one cannot
        raise UsageError(
            f"A {type(model).__name__} has no gradient checkpointing (timm's set_grad_checkpointing).",
            hint="Leave out --grad-checkpointing; --batch-size and --grad-accum save memory too.",
        ) from error


def _track_once(module: _BatchNorm, _inputs: Any, *, momentum: float | None) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled graph computes again only what the backward pass needs, and running statistics it does not
    # With other inputs to its kernel the second pass would save other tensors than the first, which torch refuses; so
    # it tracks with momentum 0, which changes no bit. Every pass sets the momentum anew.
    second = torch._C._current_graph_task_id() != -1
    module.momentum = 0.0 if second else momentum
    if second and module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked.sub_(1)
