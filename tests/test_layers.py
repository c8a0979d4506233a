"""Imports point downwards only, and the light modules stay light."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fixify

PACKAGE = Path(fixify.__file__).parent

# From the bottom to the top. A module may import from its own layer's package and from layers before it.
LAYERS = (
    "errors",
    "_io",
    "validation",
    "heads",
    "zoo",
    "sources",
    "retrofit",
    "counts",
    "checkpoint",
    "ordinary",
    "originals",
    "opening",
    "verification",
    "data",
    "confusions",
    "evaluation",
    "calibrating",
    "conversion",
    "training",
    "language",
    "tracking",
    "recipes",
    "prediction",
    "demo",
    "reporting",
    "cli",
    "__main__",
)


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fixify."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fixify.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("a relative import")
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = _layer(path)
    allowed = set(LAYERS[: LAYERS.index(own) + 1])
    assert _imported(path) <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "heads").rglob("*.py")), ids=lambda path: path.name)
def test_heads_stand_alone(path: Path) -> None:
    assert _imported(path) <= {"heads", "errors"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & {"timm", "torchvision", "typer", "rich", "safetensors"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["finetune", "--help"]])
def test_help_imports_neither_torch_nor_timm(arguments: list[str]) -> None:
    code = (
        "import sys, runpy; sys.argv = ['fixify'] + sys.argv[1:]\n"
        "try: runpy.run_module('fixify', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'timm', 'torchvision', 'matplotlib', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    for name in fixify.__all__:
        assert getattr(fixify, name) is not None
    assert set(fixify.__all__) <= set(dir(fixify))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fixify.nothing


def test_help_is_quick() -> None:
    """Processor time, which does not depend on what else the machine does; the best of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "fixify", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5
