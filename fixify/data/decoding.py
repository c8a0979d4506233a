"""Decode image files, and convert them to the mode that a model takes: "RGB" or "L", 8 bits per channel.

A decoder may raise anything at all on a damaged file, so here every exception means that the image cannot be read, and
becomes a `DataError` that names it. Where a conversion has to choose, the choice is timm's, and a remark reports it.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fixify.errors import DataError, LoaderError, resource_problem

_FRAMES = "fixify_frames"  # in `Image.info`
_MOST = "fixify_most"  # in `Image.info`: the largest value that the file says it may hold
_BITS, _MAX_SAMPLE = 258, 281  # TIFF tags
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # in these, Pillow's mode "I" (32 bits) holds 16-bit values
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_KEYED = ("1", "L", "P", "RGB")  # modes in which one colour, or one palette entry, may be transparent
_FLOAT_RANGES = (1, 255, 65_535)
_LONGEST_REASON = 200

ROTATED = "has an EXIF rotation, which is not applied (as in timm and torchvision)"
ANIMATED = "has several frames or pages; the first is taken"
TRANSPARENT = "has transparent pixels; transparency is dropped (as in timm and torchvision)"
SIXTEEN_BITS = "has {} bits per pixel; its values, 0 to {}, are scaled to 8 bits"
INTEGERS = "has 32-bit integers from 0 to 65,535, which are scaled to 8 bits"
FLOATS = "has floating-point values from 0 to {}, which are scaled to 8 bits"


def decode(file: Path | IO[bytes], where: object, *, hint: str | None = None) -> Image.Image:
    """Decode the first frame of an image.

    Args:
        file: Its path, or an open file.
        where: How to name it in an error message.
        hint: What to do if it is damaged.

    Raises:
        DataError: the image cannot be decoded, or the path is a pipe or a device.
        LoaderError: too many files are open; the image may be a good one.
    """
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"Cannot read the image {where}: it is not a regular file.", hint=hint)
        with Image.open(file) as image:
            frames = _count_frames(image, file)
            image.load()
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to; see the module
        raise unreadable(error, where, hint) from error
    if 0 in image.size:
        raise DataError(f"Cannot read the image {where}: it has no pixels.", hint=hint)
    if frames > 1:
        image.info[_FRAMES] = frames
    if image.mode.startswith("I") and (most := _stated_most(image)) is not None:
        image.info[_MOST] = most
    return image


def convert_mode(image: Image.Image, mode: str, where: object, *, hint: str | None = None) -> Image.Image:
    """Convert a decoded image to "RGB" or "L".

    8-bit images are converted as Pillow does. 16-bit values keep their upper 8 bits, as Pillow keeps them of 16-bit RGB
    files, unless a TIFF file says that it has fewer bits (BitsPerSample, MaxSampleValue): those are scaled by their
    range. Samples of a PNG file fill the range of their type, whatever its sBIT chunk says of their origin.
    Floating-point values are scaled by the smallest of the ranges 0 to 1, 0 to 255 and 0 to 65,535 that holds them. See
    `remarks_on` for what a conversion leaves out.

    Args:
        image: The image.
        mode: "RGB" or "L".
        where: How to name it in an error message.
        hint: What to do if it cannot be converted.

    Raises:
        DataError: its values have no range that is known, or Pillow cannot convert it.
    """
    if image.mode == mode:
        return image
    try:
        if image.mode == "F":
            image = _scaled_floats(image)
        elif image.mode.startswith("I"):
            image = _scaled_integers(image)
        elif image.mode == "La":
            image = image.convert("LA")
        elif image.mode == "LAB" or (image.mode == "P" and isinstance(image.info.get("transparency"), bytes)):
            # Pillow converts LAB only to RGB, and warns of such palettes unless they become RGBA first.
            image = image.convert("RGB" if image.mode == "LAB" else "RGBA")
        return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # as in `decode`
        raise unreadable(error, where, hint) from error


def remarks_on(image: Image.Image) -> list[str]:
    """Say what `decode` and `convert_mode` leave out or scale of an image; [] for ordinary images.

    Each remark continues a sentence that begins with the image's name.

    >>> remarks_on(Image.new("I;16", (2, 2)))
    ['has 16 bits per pixel; its values, 0 to 65,535, are scaled to 8 bits']
    """
    found = []
    if image.info.get(_FRAMES, 1) > 1:
        found.append(ANIMATED)
    if "exif" in image.info and _orientation(image) not in (None, 1):
        found.append(ROTATED)
    if image.mode == "F":
        if (most := _float_range(np.asarray(image))) is not None:
            found.append(FLOATS.format(f"{most:,}"))
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        most = _most(image, _extrema(image)[1])
        found.append(SIXTEEN_BITS.format(most.bit_length(), f"{most:,}"))
    elif image.mode == "I" and _extrema(image)[1] > 255:
        found.append(INTEGERS)
    elif (image.mode in _ALPHA or (image.mode in _KEYED and "transparency" in image.info)) and _is_transparent(image):
        found.append(TRANSPARENT)
    return found


def _count_frames(image: Image.Image, file: Path | IO[bytes]) -> int:
    """Count the frames of an image before it is loaded; a MPO file is a photo with previews, and counts as one."""
    if image.format == "MPO":
        return 1
    if image.format not in ("GIF", "TIFF"):
        return int(getattr(image, "n_frames", 1))
    # Counting these seeks through the file, so it is done in another image; damage there does not matter.
    try:
        with Image.open(file) as other:
            return int(getattr(other, "n_frames", 1))
    except Exception:  # any decoder's; the first frame was or will be read by itself, and says what is wrong with it
        return 1
    finally:
        if not isinstance(file, Path):
            file.seek(0)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata of a readable image
        return None


def _is_transparent(image: Image.Image) -> bool:
    """Check whether any pixel is not opaque; for a transparent colour, whether any pixel has it."""
    alpha = image if image.mode in _ALPHA else image.convert("RGBA")
    return bool(np.asarray(alpha.getchannel(len(alpha.getbands()) - 1)).min() < 255)


def _extrema(image: Image.Image) -> tuple[int, int]:
    values = np.asarray(image)  # not `getextrema`, which knows fewer modes
    return values.min().item(), values.max().item()


def _scaled_integers(image: Image.Image) -> Image.Image:
    """Scale 16-bit or 32-bit integers to 8 bits."""
    low, high = _extrema(image)
    if image.mode == "I" and image.format not in _SIXTEEN_BIT_FORMATS and low >= 0 and high <= 255:
        return image.convert("L")
    if low < 0 or high > 65_535:
        raise ValueError(f"its integers reach from {low:,} to {high:,}, and only 8 and 16 bits are known")
    values, most = np.asarray(image), _most(image, high)
    scaled = values >> 8 if most == 65_535 else np.rint(values * np.float32(255 / most))
    return Image.fromarray(scaled.astype(np.uint8))


def _stated_most(image: Image.Image) -> int | None:
    """Return the largest value that a TIFF file with more than 8 bits says it may hold; None if it does not say."""
    tags = getattr(image, "tag_v2", {})
    bits, most = (_first(tags.get(tag)) for tag in (_BITS, _MAX_SAMPLE))
    most = most or ((1 << bits) - 1 if bits is not None and 8 < bits < 16 else None)
    return most if most is not None and 255 < most < 65_535 else None


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _most(image: Image.Image, highest: int) -> int:
    """Return the end of the range of a 16-bit image: what the file states, if no value contradicts it."""
    stated = int(image.info.get(_MOST, 65_535))
    return stated if highest <= stated else 65_535


def _scaled_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    most = _float_range(values)
    if most is None:
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"its values reach from {low:g} to {high:g}; known are 0 to 1, to 255 and to 65,535")
    return Image.fromarray(np.rint(values * np.float32(255 / most)).astype(np.uint8))


def _float_range(values: NDArray[np.float32]) -> int | None:
    """Return the end of the smallest known range that holds all values; None if none does, or one is not a number."""
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    return next((most for most in _FLOAT_RANGES if low >= 0 and high <= most), None)


def unreadable(error: Exception, where: object, hint: str | None = None) -> DataError:
    """Make the error that names the image, or the one that says what the machine lacks."""
    problem = resource_problem(error)
    if problem is not None and not isinstance(error, MemoryError):
        return LoaderError(f"Cannot read the image {where}: {problem.what}.", hint=problem.hint)
    return DataError(f"Cannot read the image {where}: {_reason(error)}.", hint=hint)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    # The same words in each process and run: the words identify the image when it is counted.
    text = re.sub(r"0x[0-9a-fA-F]+", "0x...", " ".join(str(error).split())).rstrip(".")
    if not isinstance(error, (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
