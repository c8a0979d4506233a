"""The entry `measured` of a recipe: what is refused, and what follows from it."""

from __future__ import annotations

import json

import pytest
import yaml

from fixify.recipes import schema
from fixify.recipes.measured import Measured
from fixify.recipes.parsing import parse

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
    ("old", "new", "line", "words"),
    [
        ("train: {model: resnet20_cifar}", "convert:", 2, "measured train: language:"),
        ("  conditions: 20 epochs\n", "", 3, "measured[0] conditions"),
        ("data: digits", "data: ''", 3, "measured[0].data empty ''"),
        ("[train.model=", "[model=", 6, "measured[0].set train.OPTION=VALUE 'model=resnet56_cifar'"),
        ("[train.model=", "[convert.seed=", 6, "measured[0].set train.OPTION=VALUE"),
        ("[3, 1]", "[1, 1]", 7, "measured[0] seeds 1 1"),
        ("[3, 1]", "[]", 7, "measured[0].seeds 1 0"),
        ("seeds:", "seed:", 7, "measured[0].seed 'seeds'"),
        ("learned: {best", "learned: {bst", 8, "measured[0].learned.bst 'best'"),
        ("[90, 91], last: [90, 89.5]", "[90], last: [90, 89]", 8, "measured[0] learned 2"),
        ("91.5, 90]", "100.5, 90]", 9, "measured[0].fixed.best[0] 100 100.5"),
        ("last: [91, 90]", "last: [91, 91]", 9, "measured[0] fixed last best"),
        ("last: [70, 71]", "last: [70]", 10, "measured[0] 0.1 2"),
        ("0.1: {", "-1: {", 11, "measured[0].held.-1 0 '-1'"),
    ],
)
def test_mistakes(old: str, new: str, line: int, words: str) -> None:
    _assert_mistake(RECIPE, old, new, line, words)


def _assert_mistake(recipe: str, old: str, new: str, line: int, words: str) -> None:
    assert recipe.count(old) >= 1
    said = _problems(recipe.replace(old, new, 1))
    here = [problem for problem in said if problem.startswith(f"line {line}: ")]
    assert any(all(word in problem for word in words.split()) for problem in here), said


def test_all_that_is_missing_is_told_at_once() -> None:
    said = _problems("train: {model: resnet18}\nmeasured:\n- {data: digits, num_classes: 10, seeds: [0]}\n")
    assert [line.rstrip(".").split()[-1] for line in said] == ["conditions", "learned", "fixed"]


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
    ("old", "new", "line", "words"),
    [
        ("language: {words: pmi}", "train: {model: resnet18}", 4, "measured[0].num_words"),
        ("  command: python some.py\n", "", 3, "measured[0] command"),
        ("[0, 1]", "[1, 1]", 7, "measured[0] seeds 1 1"),
        ("learned: {val", "learned: {best", 8, "measured[0].learned.best"),
        ("[31, 21]", "[31, 0.5]", 8, "measured[0].learned.test[1] 1 0.5"),
        ("[35, 25]", "[35]", 9, "pmi, rank 8 2"),
        ("8: {val: ", "8: {value: ", 10, "measured[0].others.pmi, rank 8.value 'val'"),
    ],
)
def test_mistakes_of_perplexities(old: str, new: str, line: int, words: str) -> None:
    _assert_mistake(WORDS, old, new, line, words)
