"""`fixify convert` of a classifier without a network, and `fixify classes`, as a person types them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(run: Run) -> str:
    """Text embeddings of 64 classes of 96 values, in the current folder."""
    rows = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    np.save("text.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    np.save("asked.npy", rows)
    return "text.npy"


def test_a_classifier_without_a_network(run: Run, text: str) -> None:
    code, out, err = run("convert", text, "--logit-scale", 100)
    assert code == 0 and "6,144" in out and "fixify export text.fixed.safetensors --head-only" in err
    assert run("inspect", "text.fixed.safetensors")[0] == 0
    assert run("verify", "text.fixed.safetensors", "--source", text)[0] == 0
    assert run("convert", text)[0] == 1  # it exists
    assert run("eval", "text.fixed.safetensors", "--data", ".")[0] == 1
    assert run("convert", text, "--force", "--calibrate", ".")[0] == 2


def test_a_matrix_that_could_be_either(run: Run, text: str) -> None:
    code, _, err = run("convert", "asked.npy")
    assert code == 2 and "64" in err and "96" in err and "--rows features" in err
    assert run("convert", "asked.npy", "--rows", "features")[0] == 0


def test_classes(run: Run, text: str) -> None:
    assert run("convert", text, "--logit-scale", 100)[0] == 0
    code, out, err = run("classes", "keep", "text.fixed.safetensors", 5, 6, 7, "-o", "a.fixed.safetensors", "--json")
    assert code == 0 and json.loads(out)["classes"] == 3 and "64 classes before" in err
    names = [f"n{number}" for number in range(3)]
    with open("names.txt", "w") as file:
        file.write("\n".join(names))
    assert run("classes", "rename", "a.fixed.safetensors", "--labels", "names.txt")[0] == 0
    code, out, _ = run("classes", "rename", "a-classes.fixed.safetensors", "n1=new", "-o", "b.safetensors", "--json")
    assert code == 0 and json.loads(out)["labels"] == ["n0", "new", "n2"]
    code, out, err = run("classes", "add", "b.safetensors", "x", "-o", "c.safetensors", "--json")
    assert code == 0 and json.loads(out)["labels"][-1] == "x" and "next:" in err
    code, out, _ = run("classes", "merge", "c.safetensors", "n0", "n2", "--into", "n", "-o", "d.safetensors", "--json")
    assert code == 0 and json.loads(out)["labels"] == ["n", "new", "x"]


def test_usage(run: Run, text: str) -> None:
    assert run("convert", text)[0] == 0
    assert run("classes", "keep", "text.fixed.safetensors")[0] == 2
    assert run("classes", "keep", "text.fixed.safetensors", 1, 2, "--labels", "names.txt")[0] == 2
    assert run("classes", "rename", "text.fixed.safetensors", "no pair")[0] == 2
    assert run("classes", "keep", "text.fixed.safetensors", 1, 2, "-o", "text.fixed.safetensors")[0] == 1
