"""timm's record of how images are prepared for a network, for those here."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# Of the 50,000 training images, per channel.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def cifar_cfg(num_classes: int, **changes: Any) -> dict[str, Any]:
    """32 x 32 images as they are; CIFAR-10's statistics for 10 classes, else CIFAR-100's."""
    small = num_classes == 10
    return {
        "num_classes": num_classes,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN if small else CIFAR100_MEAN,
        "std": CIFAR10_STD if small else CIFAR100_STD,
        "first_conv": "stem.conv",
        "classifier": "fc",
    } | changes


def imagenet_cfg(**changes: Any) -> dict[str, Any]:
    """224 x 224 from the middle of 256 x 256, ImageNet's statistics."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "fc",
    } | changes
