"""Leave out what the help does not need.

`typer.rich_utils` imports rich's Markdown and tracebacks, with parsers of Markdown and of programming languages: a
quarter of the time of `fixify --help`. Help in rich's markup uses neither, and fixify prints no such traceback.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_LEFT_OUT = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
"""Module -> the class that `typer.rich_utils` imports from it."""


class _Deferred(type):
    """The type of a class that stands for another one, which is imported when it is first used."""

    _module: str

    def _imported(cls) -> Any:
        return getattr(importlib.import_module(cls._module), cls.__name__)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._imported()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._imported(), name)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls._imported())


def defer_unused_imports() -> None:
    """Import `typer.rich_utils` without the modules that the help does not need.

    It gets classes in their place that import the real ones when they are used. Everybody else imports the real ones.
    """
    if "typer.rich_utils" in sys.modules:
        return
    absent = {name: kind for name, kind in _LEFT_OUT.items() if name not in sys.modules}
    for name, kind in absent.items():
        module: Any = ModuleType(name)
        setattr(module, kind, _Deferred(kind, (), {"_module": name}))
        sys.modules[name] = module
    try:
        importlib.import_module("typer.rich_utils")
    finally:
        for name in absent:
            del sys.modules[name]
