"""The architectures of timm, torchvision and the paper: parse names, build, find classifiers, identify state dicts.

Importing this package registers the paper's own networks with timm (see `fixify.models.networks`).
"""

from fixify.models.architectures import (
    Architecture,
    build,
    default_num_classes,
    list_architectures,
    parse_architecture,
    preprocessing,
)
from fixify.models.classifiers import ClassifierSite, find_classifiers

__all__ = [
    "Architecture",
    "ClassifierSite",
    "build",
    "default_num_classes",
    "find_classifiers",
    "list_architectures",
    "parse_architecture",
    "preprocessing",
]
