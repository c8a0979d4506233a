"""Which parameters make a stage or a layer of a model, in the order of the computation."""

from __future__ import annotations

import re
from typing import Any

from timm.models import group_parameters
from torch import nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier

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
