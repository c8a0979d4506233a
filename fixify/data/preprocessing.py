"""Changing how images are preprocessed, for checkpoints that do not say it right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def override(
    preprocessing: Mapping[str, Any], *, img_size: int | None = None, crop_pct: float | None = None
) -> dict[str, Any]:
    """The preprocessing with another image size (both sides) or crop; None leaves the checkpoint's.

    A checkpoint of an architecture that was trained on images of an unusual size often carries only weights, and the
    architecture's own size is then assumed.
    """
    changed = dict(preprocessing)
    if img_size is not None:
        changed["input_size"] = [preprocessing["input_size"][0], img_size, img_size]
    if crop_pct is not None:
        changed["crop_pct"] = crop_pct
    return changed
