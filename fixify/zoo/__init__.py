"""The architectures that fixify knows, timm's and torchvision's: by name, by classifier, and by a file's shapes."""

from fixify.zoo.architectures import (
    Architecture,
    build,
    default_num_classes,
    list_architectures,
    parse_architecture,
    preprocessing,
)
from fixify.zoo.classifiers import ClassifierSite, find_classifiers

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
