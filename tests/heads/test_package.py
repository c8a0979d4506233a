"""The package's public names, and imports that point downwards only."""

import ast
import shutil
from pathlib import Path

import pytest

from fixify import heads
from fixify.heads import kernels

FOLDER = Path(heads.__file__).parent
# From the bottom to the top: a module may import those before it, at its top level only. `LIGHT` ones are imported
# without NumPy, so they import what builds codes when they need it.
LIGHT = {"base_kind", "kinds", "spec", "__init__"}
ORDER = [
    "streams", "constructions", "levels", "matrices", "projection", "codes", "base_kind", "kinds", "spec", "signs",
    "normalisation", "kernels", "product", "statistics", "training_step", "level_search", "answer_search",
    "projection_search", "encoding", "learned_signs", "prepared", "pair_sums", "loss", "top_k", "state_dict", "layer",
    "cosines", "matching", "fitting", "projection_choice", "editing", "__init__",
]  # fmt: skip


def test_every_module_has_its_place():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_downwards(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    below = ORDER[: ORDER.index(name)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fixify"):
            continue
        assert node in tree.body or name in LIGHT, "not inside functions, nor under TYPE_CHECKING"
        if node.module == "fixify.heads":
            assert {alias.name for alias in node.names} <= set(below)
        else:
            small = ("fixify.errors", "fixify._lazy", "fixify._values", "fixify._watch")
            assert node.module in small or node.module.removeprefix("fixify.heads.") in below


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")
def test_kernels_are_compiled_where_there_is_a_compiler():
    assert kernels.is_compiled(), "install fixify again: `pip install .` compiles fixify/heads/kernels.c"


def test_public_names_are_there():
    assert heads.__all__ == sorted(heads.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(getattr(heads, name) is not None for name in heads.__all__)
