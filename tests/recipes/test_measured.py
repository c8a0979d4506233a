"""The entry `measured` of a recipe: what is refused, and what follows from it."""

from __future__ import annotations

import json

import pytest
import yaml

from fixify.recipes import schema
from fixify.recipes.parsing import parse
from fixify.recipes.schema import Measured

RECIPE = """\
train: {model: resnet20_cifar}
measured:
- data: digits
  num_classes: 10
  conditions: 20 epochs
  set: [train.model=resnet56_cifar]
  seeds: [3, 1]
  learned: {best: [90, 91], last: [90, 89.5]}
  fixed: {best: [91.5, 90], last: [91, 90]}
  held:
    0.1: {best: [80, 81], last: [70, 71]}
    10: {best: [90, 91], last: [90, 91]}
"""


def _problems(text: str) -> list[str]:
    parsed = parse(text)
    assert (schema.check(parsed) is None) == bool(parsed.problems)
    return [str(problem) for problem in parsed.problems]


def test_what_follows_from_it() -> None:
    checked = schema.check(parse(RECIPE))
    assert checked is not None
    (found,) = checked.measured  # type: ignore[attr-defined]
    assert (found.best_gaps, found.last_gaps) == ((1.5, -1), (1, 0.5))
    assert list(found.held) == [0.1, 10.0] and found.held[0.1].last == (70, 71)
    expected = "fixify train mine --compare --compare-scales 0.1,10 --set train.model=resnet56_cifar --set train.seed=3"
    assert found.command("mine") == expected
    assert Measured.model_validate_json(json.dumps(yaml.safe_load(RECIPE)["measured"][0])) == found


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "train: {model: resnet20_cifar}",
            "convert:",
            "line 2: measured is of `fixify train`, and the recipe has neither ",
        ),
        ("  conditions: 20 epochs\n", "", "line 3: measured[0] needs conditions: what that is has no default."),
        ("data: digits", "data: ''", "line 3: measured[0].data must be text that is not empty, not the text ''."),
        (
            "[train.model=",
            "[model=",
            "line 6: measured[0].set must be written as after --set, train.OPTION=VALUE, not ",
        ),
        ("[train.model=", "[convert.seed=", "line 6: measured[0].set must be written as after --set, train.OPTION=V"),
        ("[3, 1]", "[1, 1]", "line 7: measured[0]: seeds must differ, not be 1 1."),
        ("[3, 1]", "[]", "line 7: measured[0].seeds must be a list of 1, not of 0: []."),
        ("seeds:", "seed:", "line 7: measured[0].seed is not an entry here; did you mean 'seeds'?"),
        (
            "learned: {best",
            "learned: {bst",
            "line 8: measured[0].learned.bst is not an entry here; did you mean 'best'?",
        ),
        ("[90, 91], last: [90, 89.5]", "[90], last: [90, 89]", "line 8: measured[0]: learned needs a best and a last "),
        ("91.5, 90]", "100.5, 90]", "line 9: measured[0].fixed.best[0] must be less than or equal to 100, not 100.5."),
        ("last: [91, 90]", "last: [91, 91]", "line 9: measured[0]: fixed has a last top-1 above the best one."),
        ("last: [70, 71]", "last: [70]", "line 10: measured[0]: held 0.1 needs a best and a last top-1 for each of 2 "),
        ("0.1: {", "-1: {", "line 11: measured[0].held.-1 must be greater than 0, not the text '-1'."),
    ],
)
def test_mistakes(old: str, new: str, problem: str) -> None:
    assert RECIPE.count(old) >= 1
    assert any(said.startswith(problem) for said in _problems(RECIPE.replace(old, new, 1))), _problems(
        RECIPE.replace(old, new, 1)
    )


def test_all_that_is_missing_is_told_at_once() -> None:
    said = _problems("train: {model: resnet18}\nmeasured:\n- {data: digits, num_classes: 10, seeds: [0]}\n")
    assert [line.split(": what")[0] for line in said] == [
        f"line 3: measured[0] needs {name}" for name in ("conditions", "learned", "fixed")
    ]


WORDS = """\
language: {words: pmi}
measured:
- data: a text
  num_words: 50
  conditions: 2 epochs
  command: python some.py
  seeds: [0, 1]
  learned: {val: [30, 20], test: [31, 21]}
  others:
    pmi, rank 8: {val: [33, 21], test: [35, 25]}
"""


def test_what_follows_from_perplexities() -> None:
    checked = schema.check(parse(WORDS))
    assert checked is not None
    (found,) = checked.measured  # type: ignore[attr-defined]
    assert found.ratios("pmi, rank 8") == (1.1, 1.05)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("language: {words: pmi}", "train: {model: resnet18}", "line 4: measured[0].num_words is not an entry here."),
        ("  command: python some.py\n", "", "line 3: measured[0] needs command"),
        ("[0, 1]", "[1, 1]", "line 7: measured[0]: seeds must differ, not be 1 1."),
        ("learned: {val", "learned: {best", "line 8: measured[0].learned.best is not an entry here"),
        ("[31, 21]", "[31, 0.5]", "line 8: measured[0].learned.test[1] must be greater than or equal to 1, not 0.5."),
        (
            "[35, 25]",
            "[35]",
            "line 9: measured[0]: pmi, rank 8 needs a perplexity of both texts for each of 2 seeds, an",
        ),
        (
            "8: {val: ",
            "8: {value: ",
            "line 10: measured[0].others.pmi, rank 8.value is not an entry here; did you mean 'val'?",
        ),
    ],
)
def test_mistakes_of_perplexities(old: str, new: str, problem: str) -> None:
    assert WORDS.count(old) == 1
    said = _problems(WORDS.replace(old, new))
    assert any(line.startswith(problem) for line in said), said
