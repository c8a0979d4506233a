"""Which architectures have a classifier that fixify can replace, and how much of them it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from fixify.errors import ArchitectureError, NoClassifierError
from fixify.zoo.architectures import Architecture, build, list_architectures, parse_architecture
from fixify.zoo.classifiers import ClassifierSite, find_classifiers

_ANY_NUMBER = 1000


@dataclass(frozen=True)
class Coverage:
    """One architecture, as its library builds it by default.

    Attributes:
        ref: "library/name".
        sites: Its classifier layers; empty if it has none.
        reason: Why it cannot be converted as it is; None if it can.
        takes_classes: Whether it has a classifier once it is built with a number of classes.
        num_parameters: Of the whole network, learned ones.
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
        """Weights and biases of all its classifier layers."""
        return sum(site.num_parameters for site in self.sites)


def coverage(refs: Iterable[str] | None = None) -> Iterator[Coverage]:
    """Build architectures on the meta device, one after the other, and look for their classifiers.

    Args:
        refs: Which; default: all of both libraries, which takes some minutes.
    """
    for ref in list_architectures() if refs is None else refs:
        arch = parse_architecture(ref)
        model = build(arch, meta=True)
        size = sum(parameter.numel() for parameter in model.parameters())
        try:
            yield Coverage(arch.ref, tuple(find_classifiers(model, arch)), None, True, size)
        except NoClassifierError:
            takes_classes = _takes_classes(arch)
            reason = "an encoder" + (": no classifier unless built with num_classes" if takes_classes else "")
            yield Coverage(arch.ref, (), reason, takes_classes, size)


def _takes_classes(arch: Architecture) -> bool:
    try:
        model: nn.Module = build(arch, num_classes=_ANY_NUMBER, meta=True)
        return bool(find_classifiers(model, arch))
    # The encoders of timm differ in how they refuse the argument.
    except (NoClassifierError, ArchitectureError, TypeError, ValueError, AssertionError, RuntimeError):
        return False
