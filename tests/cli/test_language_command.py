"""`fixify train` and `fixify report` with language models, as a person sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Run = Callable[..., tuple[int, str, str]]
LANGUAGE = {"words": "pmi", "num_features": 16, "epochs": 2, "batch_size": 4, "seq_len": 10, "lr": 0.02}


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": str(text), "language": LANGUAGE}))
    return "mine.yaml"


def test_compare_report_and_repeat(run: Run, recipe: str) -> None:
    code, out, err = run("train", recipe, "--compare", "--device", "cpu", "--json")
    assert code == 0, err
    learned, fixed = json.loads(out)["runs"]
    assert (learned["words"], fixed["words"]) == ("learned", "pmi")
    assert learned["size"]["learned"] == fixed["size"]["parameters"]
    assert fixed["size"]["fixed"] == 2 * 16 * fixed["num_words"]
    assert "epoch 2/2: loss" in err and "learned, 1 of 2 runs" in err

    code, out, err = run("report", "mine/learned", "mine/fixed")
    assert code == 0, err
    assert f"{fixed['perplexity'] / learned['perplexity']:.3f}" in out
    assert "81.2 / 74.1 = 1.096" in out
    assert max(map(len, out.splitlines())) <= 80
    code, other, _ = run("report", "mine")
    assert code == 0 and set(out.split()) == set(other.split())

    code, out, err = run("train", "mine/fixed/recipe.yaml", "--device", "cpu", "--json")
    assert code == 0, err
    (again,) = json.loads(out)["runs"]
    assert again["perplexity"] == fixed["perplexity"]
    code, _, err = run("train", recipe, "--compare", "--device", "cpu")
    assert code == 1 and "mine/learned" in err and "--force" in err
    code, _, err = run("train", recipe, "--compare", "--device", "cpu", "--resume", "--json")
    assert code == 0, err


def test_inspect_and_verify_know_the_file(run: Run, recipe: str) -> None:
    assert run("train", recipe, "--device", "cpu", "--set", "language.words=hadamard")[0] == 0
    file = "mine/best.safetensors"
    code, out, err = run("inspect", file)
    assert code == 0, err
    assert (
        "2-layer LSTM (h=16)" in out
        and "hadamard" in out
        and re.search(r"validation perplexity [0-9.]+ after epoch [12] of 2", out)
    )
    code, out, err = run("inspect", file, "--json")
    assert code == 0 and json.loads(out)["codebook"]["digest"].startswith("sha256:")
    code, out, err = run("verify", file)
    assert code == 0 and out.count("ok ") >= 4
    for command in (("report",), ("convert",), ("predict", file), ("finetune", "--data", "nowhere")):
        code, _, err = run(command[0], file, *command[1:])
        assert code == 1 and "is a language model" in err and "fixify convert" not in err, err
    code, _, err = run("verify", file, "--source", file)
    assert code == 2 and "--source" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare-scales", "1"), "--compare-scales"),
        (("--track", "tensorboard"), "--track"),
        (("-j", "0"), "--workers"),
        (("--set", "finetune.lr=1"), "--set finetune.lr"),
        (("--compare", "--set", "language.words=tied"), "words are tied"),
        (("--data", "nowhere"), "'nowhere'"),
    ],
)
def test_refusals(run: Run, recipe: str, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("train", recipe, *arguments)
    assert code != 0 and not out
    assert message in err


def test_runs_of_both_kinds_are_not_put_side_by_side(run: Run, recipe: str, tmp_path: Path) -> None:
    assert run("train", recipe, "--device", "cpu")[0] == 0
    other = tmp_path / "images"
    other.mkdir()
    (other / "run.json").write_text('{"fixify": "0", "options": {}}\n')
    code, _, err = run("report", "mine", "images")
    assert code == 2 and "images" in err
    code, _, err = run("report", "mine", "-o", "page.html")
    assert code == 2 and "Drop -o" in err
