"""Register slim checkpoints with timm, under the name of an architecture: `fixify_slim`.

`timm.create_model("local-dir:FOLDER", pretrained=True)` reads config.json, and builds the architecture that it names.
timm has no entry points for plug-ins, and it takes seconds to import, so `import fixify` must not import it. A script
imports fixify first and timm later, and uses nothing of fixify in between. So the import of `timm.models` is watched,
once, and the architecture is registered right after it. That module is found and executed as without fixify, and
keeps its own loader.

Importing this module needs neither timm nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from torch import nn

_WATCHED = "timm.models"


def fixify_slim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the network of a slim checkpoint; timm calls this. See `fixify.checkpoints.in_timm.build_in_timm`.

    Args:
        pretrained: Load the weights.
        kwargs: What timm read from config.json, and arguments of `timm.create_model`.
    """
    from fixify.checkpoints.in_timm import build_in_timm

    return build_in_timm(pretrained=pretrained, **kwargs)


def register_with_timm() -> None:
    """Register `fixify_slim` with timm: now if timm is imported already, otherwise as soon as it is."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from timm.models import is_model, register_model

    if not is_model(fixify_slim.__name__):
        register_model(fixify_slim)


class _Watch:
    """A finder of modules that finds none itself, and registers `fixify_slim` once `timm.models` was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find `timm.models`, and have its loader call `_register` afterwards."""
        if fullname != _WATCHED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the method of the loader's class again
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
