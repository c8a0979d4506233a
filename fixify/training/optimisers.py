"""Which parameters make a stage or a layer of a model, in the order of the computation."""

from __future__ import annotations

import fnmatch
import math
import re
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.training.options import FinetuneOptions
from fixify.training.parallel import clip_shards_

# Up to the first part of a dotted name that has a digit, and the part after it if that is a number.
_NUMBERED = re.compile(r"((?:[^.\d]+\.)*[^.]*\d[^.]*)(\.\d+(?=\.))?")


def groups_of(model: nn.Module, *, coarse: bool, option: str) -> dict[str, int]:
    """Number the parameters by groups, from 0 at the input; fixed heads are in the last one, or in one of their own.

    timm's models tell their groups (`group_matcher`). torchvision's do not, and theirs are read off the names of the
    modules, whose order is that of the computation: up to the first name with a number in it (`layer1`, `features.3`,
    `encoder.layers.encoder_layer_0`), and unless `coarse` a number after it too (`layer1.0`). What comes before all of
    these is one group, and a norm is in the group that it follows.

    Args:
        model: All of it.
        coarse: Stages rather than layers.
        option: What they are for, as it is typed.

    Returns:
        Name -> number, of all parameters.

    Raises:
        UsageError: the model is of another library.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        found: dict[str, int] = group_parameters(model, matcher(coarse=coarse), reverse=True)
        return found
    if not type(model).__module__.startswith("torchvision."):
        raise UsageError(
            f"A {type(model).__name__} does not tell its layers, as timm's models do (group_matcher), and it is not "
            "torchvision's.",
            hint=f"Leave out {option}.",
        )
    return _by_names(model, coarse=coarse)


def _by_names(model: nn.Module, *, coarse: bool) -> dict[str, int]:
    head = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, FixedClassifier)
        for name, _ in module.named_parameters()
    }
    ordinals: dict[str, int] = {}
    number, last = -1, ""
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        match = _NUMBERED.match(f"{module}.")
        own = "head" if name in head else "" if match is None else match[1] + ("" if coarse else match[2] or "")
        if number < 0 or (own != last and (name in head or _has_matrix(model, module, own))):
            number, last = number + 1, own
        ordinals[name] = number
    return ordinals


def _has_matrix(model: nn.Module, module: str, group: str) -> bool:
    """Whether the group is more than a norm."""
    return any(parameter.ndim > 1 for parameter in model.get_submodule(group or module).parameters())


# Parameter groups, optimiser and schedule, on timm's.


def parameter_groups(
    model: nn.Module, options: FinetuneOptions, *, part: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: decayed, not decayed, those of fixed heads; with `options.layer_decay` these of
    each layer.

    Not decayed are vectors and scalars, biases, and what the model's `no_weight_decay()` names (timm's rule). The
    scale of a fixed head is not decayed either, since it only sets the temperature of the softmax, unless
    `options.decay_alpha` wants the paper's way.

    Args:
        model: All of it: names and layers are those in here.
        options: Rates and decays.
        part: Only the parameters that this has too; None takes all.

    Raises:
        UsageError: a layer decay for a model that does not tell its layers (see `groups_of`).
    """
    heads = _parameters_of_heads(model)
    wanted = None if part is None else {id(parameter) for parameter in part.parameters()}
    no_weight_decay: Any = getattr(model, "no_weight_decay", tuple)
    patterns = no_weight_decay()
    layer_scales = _layer_scales(model, options)
    scales = {id(head.scale) for head in _heads(model)} if options.decay_alpha else set()
    decayed, plain, head, alpha = range(4)
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (wanted is not None and id(parameter) not in wanted):
            continue
        if id(parameter) in scales:
            kind = alpha
        elif id(parameter) in heads:
            kind = head
        elif parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch.fnmatch(name, p) for p in patterns):
            kind = plain
        else:
            kind = decayed
        groups.setdefault((kind, layer_scales.get(id(parameter), 1.0)), []).append(parameter)
    return [
        {
            "params": groups[kind, scale],
            "weight_decay": options.weight_decay if kind in (decayed, alpha) else 0.0,
            # timm's schedules multiply the rate of a group by its lr_scale.
            "lr_scale": scale * options.head_lr_scale if kind in (head, alpha) else scale,
        }
        for kind, scale in sorted(groups)
    ]


def _parameters_of_heads(model: nn.Module) -> set[int]:
    return {id(parameter) for head in _heads(model) for parameter in head.parameters()}


def _heads(model: nn.Module) -> list[FixedClassifier]:
    return [module for module in model.modules() if isinstance(module, FixedClassifier)]


def _layer_scales(model: nn.Module, options: FinetuneOptions) -> dict[int, float]:
    """Of each parameter, by its id: layer_decay to the power of its distance from the top."""
    if options.layer_decay is None:
        return {}
    groups = groups_of(model, coarse=False, option="--layer-decay")
    top = max(groups.values())
    return {id(parameter): options.layer_decay ** (top - groups[name]) for name, parameter in model.named_parameters()}


def clip_gradients(model: nn.Module, options: FinetuneOptions) -> None:
    """Clip by `options.clip_grad` and `clip_mode`, if there is one.

    Adaptive clipping leaves heads alone, as in the paper (Brock et al. 2021, section 4) and in timm: it would hold each
    step of a fixed head's scale to a share of the scale, which is what `head_lr_scale` is there to avoid.
    """
    if options.clip_grad is None:
        return
    if options.shard:
        clip_shards_(model, options.clip_grad)
        return
    spared = _parameters_of_heads(model) if options.clip_mode == "agc" else set()
    dispatch_clip_grad(
        [parameter for parameter in model.parameters() if id(parameter) not in spared],
        options.clip_grad,
        mode=options.clip_mode,
    )


def make_optimiser(
    model: nn.Module, options: FinetuneOptions, *, part: nn.Module | None = None
) -> torch.optim.Optimizer:
    """timm's optimiser of that name over `parameter_groups`."""
    groups = parameter_groups(model, options, part=part)
    return create_optimizer_v2(groups, opt=options.opt, lr=options.lr, momentum=options.momentum, weight_decay=0.0)


def base_rate(optimiser: torch.optim.Optimizer) -> float:
    """The learning rate that the groups' own scales multiply."""
    group = optimiser.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def make_schedule(optimiser: torch.optim.Optimizer, options: FinetuneOptions, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped every update with `schedule.step_update(updates)`.

    It holds no state: the rate is a function of the number of updates, so resuming needs nothing else.
    """
    warmup = math.ceil(options.warmup_epochs * updates_per_epoch)
    schedule: Scheduler
    if options.sched == "multistep":
        schedule = MultiStepLRScheduler(
            optimiser,
            # timm decays one update before a milestone (its own docstring says so); 82 epochs are all of 82 here.
            decay_t=[round(epochs * updates_per_epoch) + 1 for epochs in options.decay_milestones],
            decay_rate=options.decay_rate,
            warmup_t=warmup,
            warmup_lr_init=options.warmup_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )
        schedule.step_update(0)
        return schedule
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
        warmup_epochs=warmup / updates_per_epoch,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    schedule.step_update(0)
    return schedule
