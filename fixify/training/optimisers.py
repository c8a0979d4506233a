"""Decide which parameters learn and how fast: layers and stages, freezing, groups, optimiser and schedule (timm's)."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixify._values import counted
from fixify.errors import HeadSpecError, UsageError
from fixify.heads import FixedClassifier
from fixify.models.classifiers import find_classifiers
from fixify.training.options import FinetuneOptions
from fixify.training.parallel import clip_sharded_gradients_

# Layers and stages.

# Matches up to the first part of a dotted name that has a digit; group 2 is the next part if that is a number.
_NUMBERED = re.compile(r"((?:[^.\d]+\.)*[^.]*\d[^.]*)(\.\d+(?=\.))?")


def number_groups(model: nn.Module, *, coarse: bool, option: str) -> dict[str, int]:
    """Assign the parameters to layers or stages, numbered from the input; fixed heads are last.

    They are in the last group, or in one of their own.

    timm's models define their groups (`group_matcher`). torchvision's do not; their groups follow from the names of
    their modules, whose order is that of the computation. A group extends to the first name with a number in it
    (`layer1`, `features.3`, `encoder.layers.encoder_layer_0`), and unless `coarse` to a number after it (`layer1.0`).
    Everything before the first such name is one group, and a norm belongs to the group before it.

    Args:
        model: The whole model.
        coarse: Stages instead of layers.
        option: The option that needs the groups, as it is typed.

    Returns:
        The group of each parameter, by name.

    Raises:
        UsageError: the model is neither timm's nor torchvision's.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        found: dict[str, int] = group_parameters(model, matcher(coarse=coarse), reverse=True)
        return found
    if not type(model).__module__.startswith("torchvision."):
        raise UsageError(
            f"{type(model).__name__} does not define its layers as timm's models do (group_matcher), and is not "
            "torchvision's.",
            hint=f"Leave out {option}.",
        )
    return _groups_by_name(model, coarse=coarse)


def _groups_by_name(model: nn.Module, *, coarse: bool) -> dict[str, int]:
    head = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, FixedClassifier)
        for name, _ in module.named_parameters()
    }
    numbers: dict[str, int] = {}
    number, last = -1, ""
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        match = _NUMBERED.match(f"{module}.")
        own = "head" if name in head else "" if match is None else match[1] + ("" if coarse else match[2] or "")
        if number < 0 or (own != last and (name in head or _has_matrix(model, module, own))):
            number, last = number + 1, own
        numbers[name] = number
    return numbers


def _has_matrix(model: nn.Module, module: str, group: str) -> bool:
    """Check whether a group is more than a norm."""
    return any(parameter.ndim > 1 for parameter in model.get_submodule(group or module).parameters())


# Freezing the first stages.


@dataclass(frozen=True)
class Frozen:
    """The parts of a model that do not learn.

    Attributes:
        stages: Names of the frozen stages, the first at the input.
        modules: The largest modules that are frozen as a whole, and the batch norms that keep their statistics. They
            stay in eval mode, so that nothing is dropped either.
    """

    stages: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def train(self, model: nn.Module) -> None:
        """Put a model into training mode, except for the frozen modules."""
        model.train()
        for module in self.modules:
            module.eval()


def freeze_(model: nn.Module, depth: int, *, statistics: bool = False) -> Frozen:
    """Freeze the first stages of a model: its coarse groups from the stem on, without the classifier.

    Args:
        model: Its parameters in those stages no longer require gradients.
        depth: How many stages to freeze; 0 freezes nothing.
        statistics: Keep the running statistics of all batch norms and fixed heads too. Their weights and biases learn.

    Raises:
        UsageError: the model has fewer stages, or does not define them (see `number_groups`).
    """
    for head in _heads(model):
        head.keeps_statistics = statistics
    norms = tuple(module for module in model.modules() if statistics and isinstance(module, _BatchNorm))
    if depth == 0:
        return Frozen(modules=norms)
    stages = _stages(model)
    labels = _stage_labels(stages)
    if depth > len(stages):
        listed = "\n".join(f"  {number} {label}" for number, label in enumerate(labels, start=1))
        raise UsageError(
            f"The model has {counted(len(stages), 'stage')} that can be frozen, not {depth}:\n{listed}",
            hint=f"Give --freeze a number from 0 to {len(stages)}.",
        )
    parameters = dict(model.named_parameters())
    for names in stages[:depth]:
        for name in names:
            parameters[name].requires_grad_(False)
    return Frozen(tuple(labels[:depth]), (*_frozen_modules(model), *norms))


def _stages(model: nn.Module) -> list[list[str]]:
    """List the parameter names of each stage before the classifier."""
    groups = number_groups(model, coarse=True, option="--freeze")
    heads = [path for path, module in model.named_modules() if isinstance(module, FixedClassifier)]
    heads = heads or [site.path for site in find_classifiers(model)]
    end = min(number for name, number in groups.items() if name.rpartition(".")[0] in heads)
    stages: list[list[str]] = [[] for _ in range(end)]
    for name, number in groups.items():
        if number < end:
            stages[number].append(name)
    return stages


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    """List the largest modules that have parameters of which none learns."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [found for child in module.children() for found in _frozen_modules(child)]


def _stage_labels(stages: Sequence[Sequence[str]]) -> list[str]:
    """Find the shortest names that belong to one stage alone: `layer1`, `blocks.3`, or `conv1, bn1`."""
    labels = []
    stages = [[_module_name(name, stage, stages) for name in stage] for stage in stages]
    for stage in stages:
        others = [name for other in stages if other is not stage for name in other]
        deepest = max(name.count(".") for name in stage)
        for depth in range(1, deepest + 2):
            own = dict.fromkeys(_shortened(name, depth) for name in stage)
            if not own.keys() & {_shortened(name, depth) for name in others}:
                break
        labels.append(", ".join(own))
    return labels


def _module_name(name: str, stage: Sequence[str], stages: Sequence[Sequence[str]]) -> str:
    """Name the module of a parameter; the parameter if that module is in other stages too (`encoder.pos_embedding`)."""
    module = name.rpartition(".")[0]
    others = (other for each in stages if each is not stage for other in each)
    return name if not module or any(other.startswith(f"{module}.") for other in others) else module


def _shortened(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


# Parameter groups, optimiser and schedule.


def parameter_groups(
    model: nn.Module, options: FinetuneOptions, *, part: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters: decayed, not decayed, those of fixed heads; per layer with `options.layer_decay`.

    Vectors, scalars, biases, and what the model's `no_weight_decay()` names are not decayed (timm's rule). The scale of
    a fixed head only sets the temperature of the softmax, so it is not decayed either, unless `options.decay_alpha`
    asks for the paper's way. Latent weights of signs are left out: see `make_sign_optimiser`.

    Args:
        model: The whole model, which defines names and layers.
        options: Rates and decays.
        part: Take only the parameters that this module has too; None takes all.

    Raises:
        UsageError: `layer_decay` for a model that does not define its layers (see `number_groups`).
    """
    heads = _head_parameters(model)
    wanted = None if part is None else {id(parameter) for parameter in part.parameters()}
    no_weight_decay: Any = getattr(model, "no_weight_decay", tuple)
    patterns = no_weight_decay()
    layer_scales = _layer_scales(model, options)
    scales = {id(head.scale) for head in _heads(model)} if options.decay_alpha else set()
    latents = _latents(model)
    decayed, plain, head, alpha = range(4)
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (wanted is not None and id(parameter) not in wanted):
            continue
        if id(parameter) in latents:
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


def _head_parameters(model: nn.Module) -> set[int]:
    return {id(parameter) for head in _heads(model) for parameter in head.parameters()}


def _latents(model: nn.Module) -> set[int]:
    return {id(head.latent) for head in _heads(model) if head.latent is not None}


def _heads(model: nn.Module) -> list[FixedClassifier]:
    return [module for module in model.modules() if isinstance(module, FixedClassifier)]


def _layer_scales(model: nn.Module, options: FinetuneOptions) -> dict[int, float]:
    """Compute layer_decay to the power of each parameter's distance from the top, by the parameter's id."""
    if options.layer_decay is None:
        return {}
    groups = number_groups(model, coarse=False, option="--layer-decay")
    top = max(groups.values())
    return {id(parameter): options.layer_decay ** (top - groups[name]) for name, parameter in model.named_parameters()}


def clip_gradients(model: nn.Module, options: FinetuneOptions) -> None:
    """Clip the gradients by `options.clip_grad` and `clip_mode`; do nothing without `clip_grad`.

    Adaptive clipping leaves heads alone, as in the paper (Brock et al. 2021, section 4) and in timm. It would limit
    each step of a fixed head's scale to a part of the scale, which defeats `head_lr_scale`. The gradients of latent
    weights of signs are never clipped, and do not count.
    """
    if options.clip_grad is None:
        return
    if options.shard:
        clip_sharded_gradients_(model, options.clip_grad)
        return
    exempt = _head_parameters(model) if options.clip_mode == "agc" else _latents(model)
    dispatch_clip_grad(
        [parameter for parameter in model.parameters() if id(parameter) not in exempt],
        options.clip_grad,
        mode=options.clip_mode,
    )


def learn_signs_(model: nn.Module) -> None:
    """Make the signs of all fixed heads of a model learnable, before its optimiser is made.

    Raises:
        UsageError: it has no fixed head, or one without stored signs.
    """
    heads = _heads(model)
    if not heads:
        raise UsageError("--learn-signs needs a binary head; this model has a learned classifier.")
    for head in heads:
        try:
            head.learn_signs_()
        except HeadSpecError as error:
            raise UsageError(f"--learn-signs is not possible. {error.message}", hint=error.hint) from error


def hold_signs_(model: nn.Module) -> None:
    """Store the signs that were learned, and hold them."""
    for head in _heads(model):
        head.hold_signs_()


def make_optimiser(
    model: nn.Module, options: FinetuneOptions, *, part: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Create timm's optimiser of the name `options.opt`, over `parameter_groups`."""
    groups = parameter_groups(model, options, part=part)
    return create_optimizer_v2(
        groups, opt=options.opt, lr=options.peak_rate, momentum=options.momentum, weight_decay=0.0
    )


def take_over_state(optimiser: torch.optim.Optimizer, previous: torch.optim.Optimizer) -> None:
    """Give a new optimiser what a previous one knows of the parameters that both have: moments and counts of updates.

    Learning rates are left out: they follow from the schedule.

    Args:
        optimiser: The new one, which has not made an update.
        previous: One of the same class and options.
    """
    group_of = {id(parameter): group for group in previous.param_groups for parameter in group["params"]}
    for group in optimiser.param_groups:
        known = [parameter for parameter in group["params"] if id(parameter) in group_of]
        if known:
            before = group_of[id(known[0])]
            group.update({name: before[name] for name in before if name not in ("params", "lr", "initial_lr")})
        optimiser.state.update({each: previous.state[each] for each in known if each in previous.state})


def make_sign_optimiser(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Create the optimiser of the latent weights of signs that are learned: Adam, whatever the network's is.

    Only the signs of these weights count. Adam moves all of them by about its rate, however small their gradients are.

    Args:
        model: The model, after `learn_signs_`.
        rate: Peak learning rate; see `schedule_signs`.
    """
    latents = [head.latent for head in _heads(model) if head.latent is not None]
    return torch.optim.Adam(latents, lr=rate)


def schedule_signs(signs: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of signs, which follows the schedule of the network's."""
    for group in signs.param_groups:
        group["lr"] = rate


def base_rate(optimiser: torch.optim.Optimizer) -> float:
    """Return the learning rate before the groups' own factors."""
    group = optimiser.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def make_schedule(optimiser: torch.optim.Optimizer, options: FinetuneOptions, updates_per_epoch: int) -> Scheduler:
    """Create timm's schedule, to be stepped after every update with `schedule.step_update(updates)`.

    It holds no state: the rate is a function of the number of updates, so resuming needs nothing else.
    """
    warmup = math.ceil(options.warmup_epochs * updates_per_epoch)
    schedule: Scheduler
    if options.sched == "multistep":
        schedule = MultiStepLRScheduler(
            optimiser,
            # timm decays one update before a milestone, as its docstring says; a milestone of 82 means after 82 epochs.
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
        num_epochs=max(options.epochs, 1),  # timm divides by it, also when only the last blocks are trained
        warmup_epochs=warmup / updates_per_epoch,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    schedule.step_update(0)
    return schedule
