"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import fixify

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fixify.__path__, "fixify.")
    if module.name != "fixify.__main__"
    and not module.ispkg
    and not (module.name.startswith("fixify.exporting.") and find_spec("onnx") is None)  # an extra from Python 3.11 on
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 40
