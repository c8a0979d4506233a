"""Find lists of class names that lie beside a checkpoint, and say how to use them.

A list in the same folder may belong to another model, so none is ever used unless the user names it.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from fixify._values import counted
from fixify.checkpoints.labels import read_class_map
from fixify.errors import SourceError

# The names that training scripts, Keras, timm and transformers give to such files.
_NAMES = re.compile(
    r"(?:.*[_\-.])?(?:class(?:es|_?names?|_to_idx|_indices|_labels|_list|_map)|labels?(?:_?names?|_?map|_list)?"
    r"|idx_to_class|idx2class|class2idx|id2label|label2id|categories|synsets?|config)\.(?:txt|json|ya?ml)",
    re.IGNORECASE,
)
_LARGEST = 1 << 20  # bytes; a list of 21,841 names has about 500 KB
_MOST = 8  # files that are looked at


def class_lists_beside(path: Path) -> tuple[Path, ...]:
    """Return the files in the folder of a checkpoint whose names are those of lists of class names.

    Args:
        path: The checkpoint, or the folder that holds it.
    """
    folder = path if path.is_dir() else path.parent
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if _NAMES.fullmatch(entry.name) and entry.is_file())
    except OSError:  # whoever reads the checkpoint says what is wrong
        return ()
    return tuple(folder / name for name in names)


def remark_on_class_lists(found: tuple[Path, ...], num_classes: int) -> str | None:
    """Say which of the files has a name for each class of a checkpoint, and what to type to use it; None if none has.

    Args:
        found: What `class_lists_beside` returned.
        num_classes: Number of classes of the checkpoint.
    """
    fitting = fitting_lists(found, num_classes)
    if not fitting:
        return None
    names = counted(num_classes, "class name")
    if len(fitting) > 1:
        listed = " and ".join(path.name for path in fitting)
        return (
            f"The checkpoint has no class names. Beside it are {listed}, each with {names}; none is read. Name the one "
            f"that belongs to it: --class-map FILE (eval, finetune), or --labels FILE (predict)."
        )
    typed = shlex.quote(str(fitting[0]))
    return (
        f"The checkpoint has no class names. {fitting[0].name} beside it has {names} and is not read. If it belongs to "
        f"the checkpoint: --class-map {typed} (eval, finetune), or --labels {typed} (predict)."
    )


def fitting_lists(found: tuple[Path, ...], num_classes: int) -> list[Path]:
    """Return the files of `class_lists_beside` that have a name for each class; only the first few are looked at."""
    return [path for path in found[:_MOST] if _num_names(path) == num_classes]


def _num_names(path: Path) -> int | None:
    try:
        return len(read_class_map(path)) if path.stat().st_size <= _LARGEST else None
    except (SourceError, OSError):
        return None
