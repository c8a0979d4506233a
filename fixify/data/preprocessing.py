"""What a data configuration says, and changing it for checkpoints that do not say it right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fixify.errors import DataError


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


def channels_of(preprocessing: Mapping[str, Any]) -> int:
    """Channels of the images: 1 (gray) or 3 (RGB).

    Raises:
        DataError: another number, or the configuration is incomplete.
    """
    missing = [key for key in ("input_size", "mean", "std") if key not in preprocessing]
    if missing:
        raise DataError(f"The checkpoint does not say how images are preprocessed: {', '.join(missing)} missing.")
    channels = int(preprocessing["input_size"][0])
    if channels not in (1, 3):
        raise DataError(f"The model takes images of {channels} channels; image files have 1 (gray) or 3 (RGB).")
    return channels


def normalization(preprocessing: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, one number a channel each; raises like `channels_of`."""
    channels = channels_of(preprocessing)
    return _per_channel(preprocessing["mean"], channels), _per_channel(preprocessing["std"], channels)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    # A gray model derived from an RGB one has three means: their average is the convention (timm's too).
    numbers = [float(value) for value in values]
    return tuple(numbers) if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels
