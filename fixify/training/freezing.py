"""Leaving the first stages of a model as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.training.layers import groups_of
from fixify.zoo.classifiers import find_classifiers


@dataclass(frozen=True)
class Frozen:
    """What does not learn.

    Attributes:
        stages: Names of the frozen stages, the first at the input.
        modules: The largest modules that are frozen whole; to be kept in eval mode, so that batch norms keep their
            statistics and nothing is dropped.
    """

    stages: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def train(self, model: nn.Module) -> None:
        """Put the model into training mode, except for what is frozen."""
        model.train()
        for module in self.modules:
            module.eval()


def freeze_(model: nn.Module, depth: int) -> Frozen:
    """Freeze the first stages of a model: its coarse groups, of which the stem is one and the classifier the last.

    Args:
        model: Its parameters in those stages no longer require gradients.
        depth: How many stages; 0 freezes nothing.

    Raises:
        UsageError: the model does not tell its stages (see `groups_of`), or has fewer.
    """
    if depth == 0:
        return Frozen()
    stages = _stages(model)
    labels = _labels(stages)
    if depth > len(stages):
        listed = "\n".join(f"  {number} {label}" for number, label in enumerate(labels, start=1))
        raise UsageError(
            f"The model has {len(stages)} stages that can be frozen, not {depth}:\n{listed}",
            hint=f"Give --freeze a number from 0 to {len(stages)}.",
        )
    parameters = dict(model.named_parameters())
    for names in stages[:depth]:
        for name in names:
            parameters[name].requires_grad_(False)
    return Frozen(tuple(labels[:depth]), tuple(_frozen_modules(model)))


def _stages(model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each stage before the classifier."""
    groups = groups_of(model, coarse=True, option="--freeze")
    heads = [path for path, module in model.named_modules() if isinstance(module, FixedClassifier)]
    heads = heads or [site.path for site in find_classifiers(model)]
    end = min(number for name, number in groups.items() if name.rpartition(".")[0] in heads)
    stages: list[list[str]] = [[] for _ in range(end)]
    for name, number in groups.items():
        if number < end:
            stages[number].append(name)
    return stages


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The largest modules that have parameters, none of which learn."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [found for child in module.children() for found in _frozen_modules(child)]


def _labels(stages: Sequence[Sequence[str]]) -> list[str]:
    """The shortest names that are of one stage alone: `layer1`, `blocks.3`, or `conv1, bn1`."""
    found = []
    stages = [[_module(name, stage, stages) for name in stage] for stage in stages]
    for stage in stages:
        others = [name for other in stages if other is not stage for name in other]
        deepest = max(name.count(".") for name in stage)
        for depth in range(1, deepest + 2):
            own = dict.fromkeys(_start(name, depth) for name in stage)
            if not own.keys() & {_start(name, depth) for name in others}:
                break
        found.append(", ".join(own))
    return found


def _module(name: str, stage: Sequence[str], stages: Sequence[Sequence[str]]) -> str:
    """Of the parameter; its own name if parts of that module are in another stage (`encoder.pos_embedding`)."""
    module = name.rpartition(".")[0]
    others = (other for each in stages if each is not stage for other in each)
    return name if not module or any(other.startswith(f"{module}.") for other in others) else module


def _start(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])
