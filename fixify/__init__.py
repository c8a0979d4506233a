"""fixify: the classifier of a pretrained model should cost nothing.

Replaces the learned classifier of a pretrained image model with a fixed orthogonal or Hadamard one that is rebuilt
from a few bytes (Hoffer, Hubara & Soudry, "Fix your classifier", ICLR 2018).

    import fixify

    fixify.convert("model.pth")                            # writes model.fixed.safetensors
    model = fixify.load("model.fixed.safetensors")         # an ordinary nn.Module in eval mode
    fixify.fix_classifier_(timm_model, "hadamard")         # surgery in place, to train as you like
    fixify.report("resnet50").removable                    # 2_048_000 weights that a fixed head makes superfluous

The names below are imported when they are first used, so that `import fixify` needs neither torch nor timm. So timm
knows the paper's own networks (`timm.create_model("resnet56_cifar")`) once `fixify.models` is imported, by yourself or by
any use of an architecture.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fixify._version import __version__

_EXPORTS = {
    "FixedClassifier": "fixify.heads",
    "FixifyError": "fixify.errors",
    "HeadSpec": "fixify.heads",
    "codebook": "fixify.heads",
    "convert": "fixify.conversion",
    "fix_classifier_": "fixify.surgery",
    "load": "fixify.checkpoints.slim",
    "report": "fixify.reporting",
    "save": "fixify.checkpoints.slim",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604, RUF100

if TYPE_CHECKING:
    from fixify.checkpoints.slim import load as load
    from fixify.checkpoints.slim import save as save
    from fixify.conversion import convert as convert
    from fixify.errors import FixifyError as FixifyError
    from fixify.heads import FixedClassifier as FixedClassifier
    from fixify.heads import HeadSpec as HeadSpec
    from fixify.heads import codebook as codebook
    from fixify.reporting import report as report
    from fixify.surgery import fix_classifier_ as fix_classifier_


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fixify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
