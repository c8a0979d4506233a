"""The architectures that fixify knows, timm's, torchvision's and the paper's: by name, classifier, and a file's shapes.

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
