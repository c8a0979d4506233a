"""Parameter groups, optimiser and schedule, on timm's."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from fixify.heads import FixedClassifier
from fixify.training.options import FinetuneOptions


def parameter_groups(model: nn.Module, options: FinetuneOptions) -> list[dict[str, Any]]:
    """Trainable parameters in up to three groups: decayed, not decayed, and those of fixed heads.

    Not decayed are vectors and scalars, biases, and what the model's `no_weight_decay()` names (timm's rule). The
    scale of a fixed head must not be decayed: it sets the temperature of the softmax, and has nothing to regularise.
    """
    heads = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FixedClassifier)
        for parameter in module.parameters()
    }
    no_weight_decay: Any = getattr(model, "no_weight_decay", tuple)
    patterns = no_weight_decay()
    decayed, plain, head = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in heads:
            head.append(parameter)
        elif parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch.fnmatch(name, p) for p in patterns):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        # timm's schedules multiply the rate of a group by its lr_scale.
        {"params": head, "weight_decay": 0.0, "lr_scale": options.head_lr_scale},
    ]
    return [group for group in groups if group["params"]]


def make_optimiser(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """timm's optimiser of that name over `parameter_groups`."""
    return create_optimizer_v2(
        parameter_groups(model, options), opt=options.opt, lr=options.lr, momentum=options.momentum, weight_decay=0.0
    )


def make_schedule(optimiser: torch.optim.Optimizer, options: FinetuneOptions, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped every update with `schedule.step_update(updates)`.

    It holds no state: the rate is a function of the number of updates, so resuming needs nothing else.
    """
    decays: dict[str, dict[str, Any]] = {
        "cosine": {"sched": "cosine"},
        "linear": {"sched": "poly", "decay_rate": 1.0},
        "step": {"sched": "step", "decay_rate": options.decay_rate, "decay_epochs": options.decay_epochs},
        "constant": {"sched": "step", "decay_rate": 1.0, "decay_epochs": options.epochs},
    }
    schedule, _ = create_scheduler_v2(
        optimiser,
        **decays[options.sched],
        num_epochs=max(options.epochs, 1),  # none is trained with 0, but timm divides by it
        warmup_epochs=math.ceil(options.warmup_epochs * updates_per_epoch) / updates_per_epoch,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    schedule.step_update(0)
    return schedule
