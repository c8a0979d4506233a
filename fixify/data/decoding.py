"""Bytes to images."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from fixify.errors import DataError


def decode(file: Path | IO[bytes], where: object, *, hint: str | None = None) -> Image.Image:
    """Decode an image.

    Args:
        file: Its file, or an open one.
        where: What to call it in a message.
        hint: What to do if it is damaged.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise SyntaxError and ValueError for files that are damaged inside.
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"Cannot read the image {where}: {reason}.", hint=hint) from error
    return image
