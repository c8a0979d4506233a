"""Whatever a file holds, reading it gives a valid result or a FixifyError, soon, in bounded memory, and runs no code.

The number of inputs is fixed, not the time. More of them: `FIXIFY_FUZZ=100000 pytest -m slow FILE`. The limit of the
processor time here only finds what never ends; `python -m fuzzing` reports the times.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fuzzing.fallen import FALLEN
from fuzzing.judge import MEGABYTES, Outcome, judge, run
from fuzzing.kinds import Kind, all_kinds
from fuzzing.seeds import in_folder

_NAMES = (
    *("slim-header", "bare-header", "slim-bytes", "safetensors", "zip", "pickle", "legacy", "matrix", "hub", "model"),
    *("classes", "recipe", "run", "language-run", "state", "language-state", "language", "image"),
)
_FEW = 2_000
_MANY = int(os.environ.get("FIXIFY_FUZZ", "20000"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return all_kinds(in_folder(tmp_path_factory.mktemp("fuzz")))


def _bad(outcomes: list[Outcome]) -> list[str]:
    return [str(each) for each in outcomes if each.fell or each.megabytes > MEGABYTES]


def _check(kind: Kind, numbers: range, folder: Path) -> None:
    outcomes = list(run(kind, numbers, folder))
    assert [each.number for each in outcomes] == list(numbers)
    assert not _bad(outcomes), "\n".join(_bad(outcomes))


def test_the_names_are_complete(kinds: dict[str, Kind]) -> None:
    assert tuple(kinds) == _NAMES
    assert sum(kind.share for kind in kinds.values()) == 1000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _NAMES)
def test_some_inputs(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    _check(kinds[name], range(_FEW * kinds[name].share // 1000), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _NAMES)
def test_many_inputs(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    _check(kinds[name], range(10_000, 10_000 + _MANY * kinds[name].share // 1000), tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "200,000 entries" else []) for name in FALLEN]
)
def test_what_fell_once(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    kind, make = FALLEN[name]
    write = make()
    fallen = Kind(name, 0, lambda _rng, folder: write(folder), kinds[kind].read)
    (outcome,) = run(fallen, range(1), tmp_path)
    assert not _bad([outcome]), str(outcome)


def test_an_input_is_made_again_from_its_number(kinds: dict[str, Kind], tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        judge(kinds["image"], 7, folder)
        made.append((folder / "image").read_bytes())
    assert made[0] == made[1]


def _fail(folder: Path) -> None:
    number = int((folder / "number").read_text())
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise ZeroDivisionError
    if number == 3:
        (folder / "code-ran").touch()


def test_a_process_that_dies_is_one_finding(tmp_path: Path) -> None:
    numbers = iter(range(5))
    made = {number: str(number) for number in numbers}

    class Numbered:
        """Stands for a generator of inputs that knows the number of the next one."""

        def __init__(self) -> None:
            self.path = tmp_path / "count"

        def __call__(self, _rng: object, folder: Path) -> None:
            number = int(self.path.read_text()) + 1 if self.path.exists() else 0
            self.path.write_text(made[number])
            (folder / "number").write_text(made[number])
            (folder / "code-ran").unlink(missing_ok=True)

    folder = tmp_path / "files"
    folder.mkdir()
    verdicts = [each.verdict for each in run(Kind("made", 0, Numbered(), _fail), range(5), folder)]
    assert [verdicts[0], verdicts[4]] == ["read", "read"]
    assert "SIGKILL" in verdicts[1] and "ZeroDivisionError" in verdicts[2] and "ran code" in verdicts[3]
