"""Parse the names of architectures, and look up how images are prepared for them.

The names are looked up in a registry: that of the installed libraries (`fixify.models.architectures`), or the index
that ships with fixify. Importing this module needs neither torch nor timm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol, cast

from fixify._values import parse_json
from fixify.catalogue.shipped import Names, is_current, load_index
from fixify.description import (
    LARGEST_SIDE,
    LIBRARIES,
    LONGEST_NAME,
    Architecture,
    Preprocessing,
    check_arguments,
    check_preprocessing,
)
from fixify.errors import ArchitectureError


class Registry(Protocol):
    """Where the names of the libraries' architectures are looked up."""

    def names(self, library: str) -> Collection[str]:
        """Return the names of a library's architectures."""

    def tags(self, library: str, name: str) -> Collection[str]:
        """Return the tags of an architecture's pretrained weights; "" can be among them."""

    def renamed(self) -> Mapping[str, str | None]:
        """Return timm's old names and the names of today, with tag; None for an architecture that is gone."""

    def enum(self, name: str) -> tuple[str, Mapping[str, str]]:
        """Return the name of torchvision's enum of weights of an architecture, and alias -> member."""

    def unknown(self, text: str, name: str, libraries: tuple[str, ...]) -> ArchitectureError:
        """Make the error for a name that none of the libraries has."""


def parse(text: str, kwargs: Mapping[str, Any], registry: Registry) -> Architecture:
    """Parse the name of an architecture; see `fixify.models.architectures.parse_architecture`.

    Raises:
        ArchitectureError: the name is unknown, or an argument is not allowed.
    """
    if len(text) > 100 * LONGEST_NAME:
        raise ArchitectureError(f"{text[:LONGEST_NAME]!r}... is too long for the name of an architecture.")
    spelled, _, arguments = text.strip().partition(",")
    kwargs = {**_arguments(text, arguments), **kwargs}
    prefix, slash, rest = _of_weights(spelled, registry).partition("/")
    if slash and prefix not in LIBRARIES:
        raise ArchitectureError(
            f"Unknown library {prefix!r} in {text!r}; known: {', '.join(LIBRARIES)}.",
            hint=f"Type timm/{rest} or torchvision/{rest}.",
        )
    name, _, tag = (rest if slash else spelled).partition(".")
    kwargs = check_arguments(text, kwargs)
    if prefix == "timm" and slash and name in registry.names("fixify"):
        prefix = "fixify"  # fixify registers its networks with timm, so timm/NAME is accepted for them
    libraries = (prefix,) if slash else LIBRARIES
    if "timm" in libraries and name in registry.renamed():
        current = registry.renamed()[name]
        if current is None:
            raise ArchitectureError(f"timm has removed {name} without a replacement.")
        name, _, current_tag = current.partition(".")
        tag = tag or current_tag
    for library in libraries:
        if name in registry.names(library):
            return Architecture(library, name, kwargs, checked_tag(library, name, tag, registry))
    raise registry.unknown(text, name, libraries)


def parse_known(text: str, /, **kwargs: Any) -> Architecture | None:
    """Parse the name of an architecture with the shipped index alone.

    Args:
        text: See `fixify.models.architectures.parse_architecture`.
        **kwargs: See there.

    Returns:
        None if the index does not have it, or is not that of the installed libraries.

    >>> known = parse_known("resnet50.a1_in1k")
    >>> known is None or known.ref == "timm/resnet50.a1_in1k"  # None with other versions of the libraries
    True
    >>> parse_known("no_such_network") is None
    True
    """
    if not is_current():
        return None
    try:
        return parse(text, kwargs, _Shipped(load_index().names))
    except ArchitectureError:  # the libraries know which names are near, and what else they have
        return None


def checked_tag(library: str, name: str, tag: str | None, registry: Registry) -> str | None:
    """Return a tag as the library spells it; None for no tag.

    Raises:
        ArchitectureError: the architecture has no such weights.
    """
    if tag and library == "torchvision":
        enum, aliases = registry.enum(name)
        tag = tag.removeprefix(f"{enum}.")
        tag = aliases.get(tag, tag)
    known = registry.tags(library, name)
    if not tag or tag in known:
        return tag or None
    raise ArchitectureError(
        f"{library} has no weights {tag!r} for {name}.",
        hint=f"It has: {', '.join(known)}." if any(known) else f"Type {library}/{name} without a tag.",
    )


def known_preprocessing(arch: Architecture) -> Mapping[str, Any] | None:
    """Return the preprocessing of an architecture's weights from the shipped index, its arguments not counted.

    Returns:
        None if the index does not have it, or is not that of the installed libraries.
    """
    names = load_index().names
    tags = names.tags.get(arch.library, {}).get(arch.name, {})
    place = tags.get(arch.tag or "", tags.get(""))
    return None if place is None or not is_current() else names.preprocessings[place]


def adapted_preprocessing(
    known: Mapping[str, Any], arch: Architecture, cfg: Mapping[str, Any] | None = None
) -> Preprocessing:
    """Adapt the preprocessing of an architecture's weights to its arguments and to what came with the weights.

    Args:
        known: The preprocessing of the library's weights.
        arch: The architecture; its arguments count.
        cfg: Preprocessing that came with the weights. Its values take precedence.

    Raises:
        ArchitectureError: a value is not one that images can be prepared with.
    """
    found = dict(known)
    found.update({key: value for key, value in (cfg or {}).items() if key in found and value is not None})
    size = arch.kwargs.get("img_size", arch.kwargs.get("image_size"))
    if size is not None:
        if not isinstance(size, int) and not (isinstance(size, (list, tuple)) and len(size) == 2):
            raise ArchitectureError(f"{arch.ref}: img_size must be one number or two, got {size!r}.")
        height, width = (size, size) if isinstance(size, int) else size
        found["input_size"] = (found["input_size"][0], height, width)
    channels = arch.kwargs.get("in_chans", found["input_size"][0])
    if type(channels) is not int or not 0 < channels <= LARGEST_SIDE:
        raise ArchitectureError(f"{arch.ref}: in_chans must be from 1 to {LARGEST_SIDE}, got {channels!r}.")
    found["input_size"] = (channels, *found["input_size"][1:])
    for key in ("mean", "std"):
        values = tuple(found[key])
        # RGB statistics do not apply to other channels. Their average suits grey images.
        found[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    check_preprocessing(plain)
    return cast(Preprocessing, plain)


class _Shipped:
    """The registry of the shipped index."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def names(self, library: str) -> Collection[str]:
        return self._names.tags[library]

    def tags(self, library: str, name: str) -> Collection[str]:
        return self._names.tags[library][name]

    def renamed(self) -> Mapping[str, str | None]:
        return self._names.renamed

    def enum(self, name: str) -> tuple[str, Mapping[str, str]]:
        return self._names.enums[name]

    def unknown(self, text: str, name: str, libraries: tuple[str, ...]) -> ArchitectureError:
        return ArchitectureError(f"The index has no architecture {text!r} in {' or '.join(libraries)}.")


def _arguments(text: str, arguments: str) -> dict[str, Any]:
    """Parse "img_size=[96,128],in_chans=1". Values are JSON; a value that is not JSON is a string."""
    found: dict[str, Any] = {}
    for argument in re.split(r",(?=\s*\w+=)", arguments) if arguments else ():
        key, equals, value = argument.strip().partition("=")
        if not equals:
            raise ArchitectureError(
                f"Not an argument: {argument!r} in {text!r}; expected name=value.",
                hint="For example: vit_base_patch16_224,img_size=384,in_chans=1",
            )
        try:
            found[key] = parse_json(value)
        except ValueError:
            found[key] = value
    return found


def _of_weights(text: str, registry: Registry) -> str:
    """Translate a member of torchvision's weights enums into "torchvision/MODEL.MEMBER"; return other text as it is."""
    enum, dot, member = text.removeprefix("torchvision/").partition(".")
    if dot and enum.endswith("_Weights"):
        for name in registry.names("torchvision"):
            if registry.enum(name)[0] == enum:
                return f"torchvision/{name}.{member}"
    return text
