"""Look architectures up: in the index that ships with fixify, and where that does not know them, in the libraries.

timm, torchvision and torch take seconds to import, so they are imported by the functions that turn to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fixify.catalogue.matches import Candidate, Identification, fit_by_keys, identify_by_keys
from fixify.catalogue.names import adapted_preprocessing, known_preprocessing, parse_known
from fixify.catalogue.signature import Shape
from fixify.catalogue.skeleton import Skeleton
from fixify.description import Architecture, Preprocessing


def parse_architecture(text: str, /, **kwargs: Any) -> Architecture:
    """Parse the name of an architecture; see `fixify.models.architectures.parse_architecture`.

    Raises:
        ArchitectureError: see there.
    """
    known = parse_known(text, **kwargs)
    if known is not None:
        return known
    from fixify.models import architectures

    return architectures.parse_architecture(text, **kwargs)


def identify(shapes: Mapping[str, Shape], *, on_progress: Callable[[int, int], object] | None = None) -> Identification:
    """Find the architectures that a state dict fits; see `fixify.models.identify.identify`.

    Raises:
        ArchitectureError, NoClassifierError: see there.
    """
    found = identify_by_keys(shapes)
    if found is not None:
        return found
    from fixify.models import identify as building

    return building.identify(shapes, on_progress=on_progress)


def fit(architecture: Architecture, shapes: Mapping[str, Shape]) -> Candidate | None:
    """Fit a state dict to a known architecture; see `fixify.models.identify.fit`.

    Raises:
        ArchitectureError, AmbiguousArchitectureError: see there.
    """
    found = fit_by_keys(architecture, shapes)
    if found is not None:
        return found
    from fixify.models import identify as building

    return building.fit(architecture, shapes)


def skeleton_of(candidate: Candidate, shapes: Mapping[str, Shape]) -> Skeleton:
    """Describe the network of a candidate.

    Args:
        candidate: The candidate.
        shapes: The state dict that it fits.

    Raises:
        NoClassifierError: it has no classifier, or is the image tower of a CLIP model.
    """
    if candidate.network is not None:
        return candidate.network.skeleton(shapes)
    from fixify.models.skeletons import build_skeleton

    return build_skeleton(candidate.architecture, candidate.num_classes)


def preprocessing_of(candidate: Candidate, cfg: Mapping[str, Any] | None) -> Preprocessing:
    """Return how images are prepared for a candidate; see `fixify.models.architectures.preprocessing`.

    Raises:
        ArchitectureError: see there.
    """
    known = None if candidate.network is None else known_preprocessing(candidate.architecture)
    if known is not None:
        return adapted_preprocessing(known, candidate.architecture, cfg)
    from fixify.models.architectures import preprocessing

    return preprocessing(candidate.architecture, cfg)
