"""Imports point downwards only, and the light modules stay light. The order is derived from the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tools.headers import outlines_of, write_header

import fixify
from fixify.catalogue.shipped import is_current
from fixify.cli.app import COMMANDS

PACKAGE = Path(fixify.__file__).parent
Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path) -> Graph:
    """Return, for each module of a package, the modules of it that it imports, anywhere in its source."""
    modules = {module_name(path, root): path for path in root.rglob("*.py")}
    return {name: imported(name, ast.parse(path.read_text()), modules) for name, path in modules.items()}


def imported(name: str, tree: ast.Module, modules: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module or "")
    return (found & set(modules)) - {name}


def units(graph: Mapping[str, set[str]]) -> Graph:
    """Return the graph of the packages and modules directly below the root."""
    below: Graph = {}
    for name, targets in graph.items():
        if "." in name:  # the root itself exports lazily what is above it
            unit = name.split(".")[1]
            below.setdefault(unit, set()).update(target.split(".")[1] for target in targets if "." in target)
            below[unit].discard(unit)
    return below


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


# `__init__`s only list what their package exports; a module that imports its own package's `__init__` would be a cycle.
GRAPH = {name: targets for name, targets in import_graph(PACKAGE).items() if name != "fixify"}


def test_no_module_imports_what_imports_it() -> None:
    assert cycle(GRAPH) == []


def test_no_package_imports_what_imports_it() -> None:
    assert cycle(units(GRAPH)) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "import fixed.b", "b": ""}, False),
        ({"a": "import fixed.b", "b": "def late():\n    from fixed.a import x"}, True),
        ({"a": "from fixed import b", "b": "if TYPE_CHECKING:\n    import fixed.a"}, True),
        (
            {"p/__init__": "", "p/a": "from fixed.q import b", "q/__init__": "", "q/b": "", "q/c": "import fixed.p.a"},
            True,
        ),
        ({"p/__init__": "from fixed.p.a import x", "p/a": "from fixed.p import y"}, True),
    ],
)
def test_the_graph_sees_every_import(tmp_path: Path, sources: dict[str, str], found: bool) -> None:
    root = tmp_path / "fixed"
    for name, source in {"__init__": "", **sources}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    graph = {name: targets for name, targets in import_graph(root).items() if name != "fixed"}
    assert bool(cycle(graph) or cycle(units(graph))) is found


def test_a_relative_import_is_refused() -> None:
    with pytest.raises(AssertionError, match="relative"):
        imported("fixed.a", ast.parse("from . import b"), [])


def test_heads_stand_alone() -> None:
    below = {target.split(".")[1] for name, targets in GRAPH.items() if ".heads" in name for target in targets}
    assert below <= {"heads", "errors", "_lazy", "_values", "_watch"}
    for path in (PACKAGE / "heads").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                heavy = {name.split(".")[0] for name in names} & {"timm", "torchvision", "typer", "rich", "safetensors"}
                assert not heavy, path


HEAVY = "{'torch', 'timm', 'torchvision', 'matplotlib', 'numpy', 'scipy'}"
LIGHT = f"""
import contextlib, io, sys
import fixify
from fixify.cli.app import COMMANDS, main
from fixify.cli.options import _complete_recipe
assert not {{'torch', 'timm', 'pydantic'}} & set(sys.modules), "import fixify.cli.app"
assert "retrofit-paper" in _complete_recipe("retrofit-p")
def check(*arguments):
    sys.argv = ["fixify", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            assert not end.code, arguments
    heavy = {HEAVY} & set(sys.modules)
    assert not heavy, (arguments, heavy)
    return out.getvalue()
unused = {{'rich.markdown', 'rich.syntax', 'rich.traceback', 'rich.progress', 'pygments', 'markdown_it'}}
listed = check("--help")
assert not unused & set(sys.modules), unused & set(sys.modules)
check("--version")
assert "pydantic" not in sys.modules, "the list of commands"
assert "retrofit-paper" in check("recipes", "ls")
for command in COMMANDS:
    assert "--help" in check(command, "--help")
assert "Replace the classifier" in listed
check("inspect", SLIM)
check("inspect", SLIM, "--json")
"""


SLIM = Path(__file__).parent / "golden" / "v1-binary.fixed.safetensors"


def test_help_completion_and_inspect_import_neither_torch_nor_timm() -> None:
    done = subprocess.run([sys.executable, "-c", f"SLIM = {str(SLIM)!r}\n{LIGHT}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITHOUT_LIBRARIES = """
import contextlib, io, sys
from fixify.cli.app import main
for arguments in COMMANDS:
    sys.argv = ["fixify", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            assert not end.code, (arguments, said.getvalue())
    heavy = {'torch', 'timm', 'torchvision', 'matplotlib', 'scipy'} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


@pytest.mark.skipif(not is_current(), reason="the shipped index is of other versions of the libraries")
def test_plan_of_a_known_network_imports_neither_torch_nor_timm(tmp_path: Path) -> None:
    """A real process; nor do `report` and `identify`."""
    net = str(write_header(tmp_path / "net.safetensors", outlines_of("mobilenetv4_conv_small", 10)))
    tensors = {f"module.{key}": tensor for key, tensor in outlines_of("torchvision/resnet18", 10).items()}
    wrapped = str(write_header(tmp_path / "wrapped.safetensors", tensors))
    folder = tmp_path / "hub"
    write_header(folder / "model.safetensors", outlines_of("resnet18"))
    (folder / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {"tag": "a1_in1k"}}')
    commands = [["plan", net], ["plan", net, "--json"], ["identify", net], ["report", net], ["plan", str(folder)]]
    commands += [["plan", wrapped, "--arch", "torchvision/resnet18"]]
    program = f"COMMANDS = {commands!r}\n{WITHOUT_LIBRARIES}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_a_public_function() -> None:
    commands = {"evaluate" if name == "eval" else name for name in COMMANDS} - {"demo"}
    objects = {"__version__", "FixedClassifier", "FixifyError", "HeadSpec"}
    classes = {f"{verb}_classes" for verb in ("add", "keep", "merge", "rename")}  # `fixify classes VERB`
    assert set(fixify.__all__) - objects == commands | classes | {"codebook", "fix_classifier_", "load", "save"}
    # A module of that name would replace the function when it is imported.
    assert not {path.stem for path in PACKAGE.iterdir()} & set(fixify.__all__)


def test_public_names_are_there() -> None:
    for name in fixify.__all__:
        assert getattr(fixify, name) is not None
    assert set(fixify.__all__) <= set(dir(fixify))
    with pytest.raises(AttributeError, match="nothing"):
        _ = fixify.nothing
