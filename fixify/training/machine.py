"""On what a run is trained: versions and device, which may change its numbers in the last digits."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import timm
import torch
import torchvision

from fixify import __version__
from fixify.training import distributed


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Versions of what computes, and the device's name; JSON-safe, nothing that identifies a person or a machine."""
    return {
        "fixify": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which is not read back
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "device": _name(device),
        "processes": distributed.count(),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def changed(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What a run that is resumed has different from when it was started: "torch 2.9.0 then, 2.13.0 now"."""
    return ", ".join(f"{key} {was} then, {now[key]} now" for key, was in then.items() if now.get(key) != was) or None
