"""Damaged and hostile files in the folder of a run: each is a result or one error that names the file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fixify.errors import FixifyError, FormatError
from fixify.reporting.page import write_page
from fixify.reporting.run_report import report_runs
from fixify.reporting.runs import read_runs, runs_in
from fixify.savings import Savings

Write = Callable[..., Path]
FILES = ("run.json", "metrics.jsonl", "steps.jsonl", "confusions.json")
NAN = float("nan")
SAVINGS = dict.fromkeys((each.name for each in fields(Savings)), 1)
ODD: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, -1e308, NAN, float("inf"), 2**53 + 1, 10**400, "", "x", "\x1b]0;x\x07", "9" * 5000,
    [], {}, [[]], {"a": 1}, 101, -0.5, [1e308] * 3, "x" * 200_000,
]  # fmt: skip
BYTES = [b"[" * 5000, b"\0", b"NaN", b"-Infinity", b"1e999", b"9" * 6000, b'{"a":' * 3000, b'"\\ud800"', b"\xff"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(value: Any, rng: random.Random) -> Any:
    place = rng.choice(places(value))
    if not place:
        return rng.choice(ODD)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and rng.random() < 0.2:
        del inner[place[-1]]
    else:
        inner[place[-1]] = rng.choice(ODD)
    return value


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change a value in a file of JSON, or some of its bytes."""
    if rng.random() < 0.8:
        rows = [json.loads(line) for line in content.splitlines()] if b"\n{" in content.strip()[1:] else None
        if rows is None or b"{\n" in content[:2]:
            return json.dumps(changed(json.loads(content), rng)).encode()
        rows[0] = changed(rows[0], rng)
        return "\n".join(map(json.dumps, rows)).encode()
    at = rng.randrange(len(content))
    return content[:at] + rng.choice([b"", *BYTES]) + content[at + rng.randrange(3) :]


def reported(folder: Path) -> dict[str, Any]:
    """Do all that `fixify report` does."""
    report = report_runs(read_runs(runs_in(folder) or [folder]))
    write_page(report)
    found: dict[str, Any] = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_mutations(write_run_folder: Write, tmp_path: Path, name: str, count: int) -> None:
    original = {"top1": 84.0, "top5": 95.0, "loss": 1.0, "ece": 2.0, "num_images": 600, "seconds": 1.0}
    folder = write_run_folder(tmp_path / "run", fixed=True, original_metrics=original)
    content = (folder / name).read_bytes()
    rng, results = random.Random(name), list[bool]()
    for _ in range(count):
        (folder / name).write_bytes(mutated(content, rng))
        try:
            reported(folder)
            results.append(True)
        except FixifyError as error:
            assert name in str(error) and "\x1b" not in str(error)
            results.append(False)
    assert len(set(results)) == 2  # some are harmless, and not all


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("run.json", "class_names", [3]),
        ("run.json", "class_names", "abc"),
        ("run.json", "train_images", "many"),
        ("run.json", "before", {"top1": 50.0}),
        ("run.json", "model", {"savings": {"parameters_before": 0}}),
        ("run.json", "model", {"savings": {**SAVINGS, "parameters_before": 10**400}}),
        ("run.json", "model", {"savings": {**SAVINGS, "removed": -1}}),
        ("run.json", "model", []),
        ("run.json", "original", {"name": 3}),
        ("run.json", "options", {"epochs": "three"}),
        ("run.json", "options", {"epochs": 10**30}),
        ("run.json", "options", {"original_top1": 1e300}),
        ("run.json", "options", {"anything": [10**400]}),
        ("metrics.jsonl", "val_top1", 1e308),
        ("metrics.jsonl", "val_top1", "90"),
        ("metrics.jsonl", "epoch", True),
        ("metrics.jsonl", "fraction", -1),
        ("steps.jsonl", "step", 10**30),
        ("steps.jsonl", "loss", 1e300),
        ("confusions.json", "right", [51] * 12),
        ("confusions.json", "worst", [{"label": -1, "taken_for": []}]),
        ("confusions.json", "images", [1]),
    ],
)
def test_the_file_and_the_entry_are_named(
    write_run_folder: Write, tmp_path: Path, name: str, entry: str, value: Any
) -> None:
    folder = write_run_folder(tmp_path / "run", fixed=True)
    text = (folder / name).read_text()
    whole = json.loads(text.splitlines()[0] if name.endswith("l") else text)
    (folder / name).write_text(json.dumps({**whole, entry: value}))
    with pytest.raises(FormatError, match=name.replace(".", r"\.")) as caught:
        reported(folder)
    assert entry in caught.value.message or name == "confusions.json"


def test_numbers_that_are_not_finite_become_null(write_run_folder: Write, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", fixed=True, done=1)
    row = json.loads((folder / "metrics.jsonl").read_text())
    # An older version wrote NaN, which is no JSON; this one writes null.
    lines = [json.dumps({**row, "val_loss": value}) for value in (NAN, None, 1.5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = reported(folder)["runs"]
    assert [each["val_loss"] for each in run["history"]] == [None, None, 1.5]
    (read,) = read_runs([folder])
    assert [record.to_dict()["val_loss"] for record in read.history] == [None, None, 1.5]


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_and_a_folder_are_no_files(write_run_folder: Write, tmp_path: Path, name: str) -> None:
    folder = write_run_folder(tmp_path / "run", fixed=True)
    for make in (os.mkfifo, os.mkdir):
        (folder / name).unlink() if not (folder / name).is_dir() else (folder / name).rmdir()
        make(folder / name)
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            reported(folder)


def test_runs_whose_confusions_have_other_classes(write_run_folder: Write, tmp_path: Path) -> None:
    for number, size in enumerate((12, 3)):
        folder = write_run_folder(tmp_path / str(number), fixed=True, class_names=None)
        if size == 3:
            found = {"step": 1, "images": [1] * size, "right": [0] * size, "worst": [{"label": 2, "taken_for": []}]}
            (folder / "confusions.json").write_text(json.dumps(found))
    first, _ = reported(tmp_path)["runs"]
    assert {count for row in first["classes"]["worst"] for count in row["elsewhere"].values()} == {None}
