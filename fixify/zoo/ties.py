"""Architectures with the same names and shapes: which of them are one network, and what sets the others apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fixify.zoo.architectures import Architecture, preprocessing
from fixify.zoo.traits import Trait

_LAST = {".class"}  # long, and mostly a consequence of what is said better by another trait
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Facts:
    """What is known of one architecture besides its shapes.

    Attributes:
        library: The traits that are plain attributes of modules (".num_heads") mean the same only within it.
        values: Its traits, and its preprocessing.
    """

    library: str
    values: Mapping[str, Trait]

    @classmethod
    def of(cls, arch: Architecture, traits: Mapping[str, Trait]) -> Facts:
        """The facts of an architecture of which the traits are known."""
        images = {key: _readable(value) for key, value in preprocessing(arch).items()}
        return cls(arch.library, dict(traits) | {key: (text, text) for key, text in images.items()})


def merge(facts: Sequence[Facts]) -> list[list[int]]:
    """Group architectures that nothing sets apart: the same network with the same preprocessing, under two names.

    Networks of different libraries are never merged: that they are the same cannot be seen from their modules.
    """
    groups: list[list[int]] = []
    for index, found in enumerate(facts):
        for group in groups:
            if facts[group[0]] == found:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def set_apart(facts: Sequence[Facts]) -> list[dict[str, str]]:
    """For each architecture, its values of the traits that are not the same for all, the telling ones first."""
    shown = []
    for name in dict.fromkeys(name for found in facts for name in found.values):
        own = name.startswith(".")
        values = {(found.library if own else "", found.values.get(name, ("", ""))[0]) for found in facts}
        if len(values) > (len({library for library, _ in values}) if own else 1):
            shown.append(name)
    texts = {name: {found.values[name][1] for found in facts if name in found.values} for name in shown}
    shown.sort(key=lambda name: (len(texts[name]) == 1, name in _LAST, name.startswith("."), name))
    return [
        {
            name.lstrip("."): found.values[name][1] + (" (placed differently)" if len(texts[name]) == 1 else "")
            for name in shown[:_MOST_SHOWN]
            if name in found.values
        }
        for found in facts
    ]


def in_words(differences: Mapping[str, str]) -> str:
    """What sets one architecture apart, for a person: "padding even; mean 0.5 0.5 0.5"."""
    return "; ".join(f"{trait} {value}" for trait, value in differences.items())


def _readable(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
