from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fixify.errors import UsageError
from fixify.recipes.parsing import MAX_BYTES, Place, RecipeError, dotted, parse, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # PyYAML alone: text
        ("3E5", 3e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1.0e-05", 1e-5),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("12", 12),
        ("-3", -3),
        ("010", 10),  # PyYAML alone: 8
        ("0x1F", 31),
        ("0o17", 15),
        ("9" * 400, math.inf),  # more digits than an integer may have here
        ("1:30", "1:30"),  # PyYAML alone: 90
        ("1_000", "1_000"),
        ("2026-11-24", "2026-11-24"),  # PyYAML alone: a date
        ("no", "no"),  # PyYAML alone: False
        ("True", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("'3'", "3"),
        ('"true"', "true"),
        ("[0.8, 1]", [0.8, 1]),
        ("rand-m9-mstd0.5", "rand-m9-mstd0.5"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse(text)
    assert (parsed.values, parsed.problems) == (value, [])
    assert type(parsed.values) is type(value)
    assert math.isnan(parse(".nan").values)


@given(st.one_of(st.floats(allow_nan=False), st.integers(-(2**63), 2**64), st.booleans(), st.none()))
def test_what_pyyaml_writes_is_read_as_it_was(value: object) -> None:
    assert parse(yaml.safe_dump({"a": value})).values == {"a": value}


def test_lines_are_those_of_the_keys() -> None:
    parsed = parse("# comment\nfinetune:\n  lr:\n    1e-4\n  scale:\n  - 0.8\n  - 1\n")
    assert parsed.values == {"finetune": {"lr": 1e-4, "scale": [0.8, 1]}}
    lines = {dotted(path): place.line for path, place in parsed.places.items()}
    assert lines == {
        "": 2,
        "finetune": 2,
        "finetune.lr": 3,
        "finetune.scale": 5,
        "finetune.scale[0]": 6,
        "finetune.scale[1]": 7,
    }


def test_a_value_alone_has_the_place_that_is_given() -> None:
    place = Place(override="finetune.scale=[1, *x]")
    parsed = parse("[1, *x]", place, ("finetune", "scale"))
    assert set(parsed.places.values()) == {place}
    (problem,) = parsed.problems
    assert problem.place == place and "finetune.scale[1]" in problem.message and "*x" in problem.message


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("a: 1\nb: 2\na: 3", {3: "a line 1"}),
        ("a: &x 1\nb: *x", {2: "b *x"}),
        ("a: !!python/object/apply:os.system [ls]", {1: "a !!python/object/apply:os.system"}),
        ("a: 1\nb: !!int 3", {2: "b !!int"}),
        ("a:\n  [x]: 1", {2: "a name"}),
        ('a: "\\ud800"', {1: "a surrogate"}),
        ("a: 1\nb: c: d", {2: "YAML colon quotes"}),
        ("a: [1\nb: 2", {2: "YAML ']' ':'"}),
        ("a: 1\n---\nb: 2", {2: "YAML document"}),
        ("a: 1\nb: \x01", {2: "'\\x01'"}),
        ("a: " + 9 * "[", {1: "YAML nested"}),
        ("a: *x\nb: *y", {1: "*x", 2: "*y"}),
    ],
)
def test_mistakes_have_their_line(text: str, problems: dict[int, str]) -> None:
    found = {problem.place.line: problem.message for problem in parse(text).problems}
    assert found.keys() == problems.keys()
    assert all(word in found[line] for line, words in problems.items() for word in words.split()), found


def test_of_a_key_given_twice_the_first_is_kept_and_the_rest_is_read() -> None:
    parsed = parse("a: 1\na: 2\nb: *x\nc: 3\n")
    assert parsed.values == {"a": 1, "c": 3}
    assert len(parsed.problems) == 2


@pytest.mark.parametrize(
    "text",
    [
        # Nine lines that a careless loader makes 10^9 items of.
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
        "[" * MAX_BYTES,
        "{a: " * 10_000,
        "- " * 30_000,
        "? " * 30_000,
    ],
    ids=["laughs", "brackets", "braces", "dashes", "questions"],
)
def test_bombs_are_refused(text: str) -> None:
    assert parse(text).problems


def test_names_that_a_terminal_would_obey_are_escaped() -> None:
    (problem,) = parse('"\\e[31mred": *x').problems
    assert "\x1b" not in str(problem) and "'\\x1b[31mred'" in str(problem)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert parse(read_text(tmp_path / "bom.yaml")).values == {"a": 1}
    with pytest.raises(UsageError, match="65,536"):
        read_text(tmp_path / "big.yaml")
    with pytest.raises(RecipeError, match=r"line 2: .*UTF-8") as caught:
        read_text(tmp_path / "latin.yaml")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=r"none\.yaml.*No such file"):
        read_text(tmp_path / "none.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    with pytest.raises(UsageError, match=r"run/recipe\.yaml"):
        read_text(tmp_path / "run")
