"""Read what a file that fixify wrote says about itself.

For a slim checkpoint this needs neither torch nor timm nor NumPy, whose imports take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fixify.checkpoints.header import LANGUAGE_KEY, SlimInfo, has_metadata, read_header

if TYPE_CHECKING:
    from fixify.language.checkpoint import LanguageInfo


def inspect(file: str | Path) -> SlimInfo | LanguageInfo:
    """Read what a slim checkpoint or a language model says about itself. Only its header is read.

    Whether the installed libraries have the architecture is not asked; `fixify.verify` and `fixify.load` do.

    Raises:
        FormatError: it is neither, is damaged, or was written by a newer version.
    """
    if has_metadata(file, LANGUAGE_KEY):
        from fixify.language.checkpoint import read_language_info

        return read_language_info(file)
    return read_header(file).info
