"""How images become the input of a model: timm's data configuration, and changes to it for single checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from fixify._values import counted
from fixify.errors import DataError
from fixify.models.architectures import Preprocessing


def override(
    preprocessing: Preprocessing, *, img_size: int | None = None, crop_pct: float | None = None
) -> Preprocessing:
    """Return the preprocessing with another image size (both sides) or crop; None keeps the checkpoint's.

    Checkpoints of models that were trained on images of an unusual size often carry only weights, and then the
    architecture's default size is assumed.

    >>> override({"input_size": [3, 224, 224], "crop_pct": 0.875}, img_size=288)
    {'input_size': [3, 288, 288], 'crop_pct': 0.875}
    """
    changed = preprocessing.copy()
    if img_size is not None:
        changed["input_size"] = [preprocessing["input_size"][0], img_size, img_size]
    if crop_pct is not None:
        changed["crop_pct"] = crop_pct
    return changed


def channels_of(preprocessing: Preprocessing) -> int:
    """Return the number of image channels: 1 (gray) or 3 (RGB).

    Raises:
        DataError: it is another number, or the configuration lacks input_size, mean or std.
    """
    missing = [key for key in ("input_size", "mean", "std") if key not in preprocessing]
    if missing:
        raise DataError(f"The checkpoint does not say how images are preprocessed. Missing: {', '.join(missing)}.")
    channels = int(preprocessing["input_size"][0])
    if channels not in (1, 3):
        raise DataError(
            f"The model takes images of {counted(channels, 'channel')}. Image files have 1 (gray) or 3 (RGB)."
        )
    return channels


def normalization(preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std with one number per channel each.

    Raises:
        DataError: as `channels_of`.

    >>> normalization({"input_size": [1, 28, 28], "mean": [0.25, 0.5, 0.75], "std": [0.5]})
    ((0.5,), (0.5,))
    """
    channels = channels_of(preprocessing)
    return _per_channel(preprocessing["mean"], channels), _per_channel(preprocessing["std"], channels)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    # A gray model derived from an RGB model has three means. By convention (timm's too) their average is used.
    numbers = [float(value) for value in values]
    return tuple(numbers) if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels
