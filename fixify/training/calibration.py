"""Statistics for a standardising head that has none yet, from training images without their labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fixify.evaluation import eval_mode
from fixify.heads import FixedClassifier


def uncalibrated_heads(model: nn.Module) -> list[FixedClassifier]:
    """The fixed heads whose center and spread were never set."""
    return [
        module
        for module in model.modules()
        if isinstance(module, FixedClassifier)
        and module.num_batches_tracked is not None
        and int(module.num_batches_tracked) == 0
    ]


def calibrate_heads_(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device) -> int:
    """Set center and spread of the uncalibrated heads to those of the features of every image of the loader.

    Without this the first steps of training would be spent on whatever center 0 and spread 1 happen to mean for
    the network's features.

    Args:
        model: The model, on `device`. Runs in eval mode; its modes are restored.
        loader: Batches of (images, labels), preprocessed as for evaluation.
        device: Where the model is.

    Returns:
        Images used; 0 if there was nothing to calibrate.
    """
    heads = uncalibrated_heads(model)
    if not heads:
        return 0
    seen: list[list[Tensor]] = [[] for _ in heads]

    def keep(features: list[Tensor], inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0].detach().float().cpu())

    hooks = [
        head.register_forward_pre_hook(lambda _module, inputs, into=into: keep(into, inputs))
        for head, into in zip(heads, seen, strict=True)
    ]
    num_images = 0
    try:
        with eval_mode(model), torch.no_grad():
            for images, _ in loader:
                model(images.to(device))
                num_images += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    for head, features in zip(heads, seen, strict=True):
        if features:  # an auxiliary head is not called in eval mode; training will set its statistics
            head.calibrate_(features)
    return num_images
