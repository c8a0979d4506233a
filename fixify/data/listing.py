"""A fingerprint of which images a data set has: of their list, not of every pixel."""

from __future__ import annotations

import hashlib

from fixify.data.opened import OpenedData


def listing_digest(data: OpenedData) -> str:
    """SHA-256 of the data's list of images, 64 hexadecimal digits.

    Of files the list has the names below the split's folder, sizes and labels, in sorted order, so a copy of the folder
    elsewhere has the same; reading a million names and sizes takes seconds, reading the images would take an hour. What
    is held in memory is taken whole.

    Raises:
        DataError: an image file has gone since the list was made.
    """
    found = hashlib.sha256()
    for entry in (*(name.encode() for name in data.class_names), *sorted(data.images.listing())):
        found.update(len(entry).to_bytes(8, "little") + entry)
    return found.hexdigest()
