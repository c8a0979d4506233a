"""Read what a file that fixify wrote says about itself.

For a slim checkpoint this needs neither torch nor timm nor NumPy, whose imports take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fixify.checkpoints.header import LANGUAGE_KEY, SlimInfo, has_metadata, is_onnx, read_header
from fixify.checkpoints.locate import locate_slim

if TYPE_CHECKING:
    from fixify.language.checkpoint import LanguageInfo


def inspect(file: str | Path) -> SlimInfo | LanguageInfo:
    """Read what a slim checkpoint, an ONNX file of `fixify.export` or a language model says about itself.

    Whether the installed libraries have the architecture is not asked; `fixify.verify` and `fixify.load` do.

    Args:
        file: The file; for a slim checkpoint also what `fixify.load` takes.

    Raises:
        FormatError: it is none of these, is damaged, or was written by a newer version.
        SourceError: a repository of the Hugging Face hub cannot be read.
        UsageError: it is an ONNX file, and onnxruntime is not installed.
    """
    if has_metadata(file, LANGUAGE_KEY):
        from fixify.language.checkpoint import read_language_info

        return read_language_info(file)
    if is_onnx(file):
        from fixify.checkpoints.onnx_file import read_onnx_info

        return read_onnx_info(file)[0]
    return read_header(locate_slim(file)).info
