"""fixify.reporting.paper: the paper's figures beside those counted."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fixify.cli.app import app
from fixify.recipes import shipped
from fixify.reporting import paper as module
from fixify.reporting.paper import NOT_RUN, Counted, Printed, paper, paper_tables


@pytest.fixture(scope="module")
def found() -> module.Paper:
    return paper()


def test_counts_are_the_printed_ones_or_the_difference_is_explained(found: module.Paper) -> None:
    rows = {row.counted.name: row for row in (*found.table1, *found.table2)}
    assert len(rows) == 6
    for name, row in rows.items():
        assert row.printed is not None
        assert row.counted.parameters == row.printed.parameters - (name == "ShuffleNet")
        assert abs(row.counted.share - float(row.printed.share)) < 0.1
        assert not any("unknown" in note for note in row.notes)
    noted = {name: "".join(row.notes) for name, row in rows.items() if row.notes}
    assert set(noted) == {"DenseNet-BC", "ShuffleNet"}
    assert "4.27 %" in noted["DenseNet-BC"] and "cut off" in noted["DenseNet-BC"]
    assert "1 more" in noted["ShuffleNet"] and "scale" in noted["ShuffleNet"]


def test_other_counts_would_be_said() -> None:
    counted = Counted("Net", "net", "data", 10, 100, 50_000, 1_000)
    note, share = module._row(counted, Printed(49_000, "7.1", "1", "1")).notes
    assert "1,000 fewer" in note and "unknown" in note
    assert "2.00 %" in share and "7.1 %" in share and "unknown" in share


def test_section_4(found: module.Paper) -> None:
    jft, mobilenet, resnet = found.section4
    assert (jft.counted.num_features, jft.counted.num_classes) == (2048, 18_291)
    assert jft.counted.fixed_weights == 2048 * 18_291 > 36e6
    assert jft.counted.share > 60
    assert "does not hold" not in jft.notes[0]
    assert (mobilenet.counted.num_features, resnet.counted.num_features) == (512, 256)


def test_gradients(found: module.Paper) -> None:
    for row in (*found.table1, *found.table2, *found.section4):
        counted = row.counted
        assert counted.gradient_bytes == 4 * counted.parameters
        assert counted.gradient_bytes - counted.gradient_bytes_saved == 4 * counted.learned_left
    shufflenet = found.table1[-1].counted
    assert shufflenet.gradient_bytes_saved == 4 * (960 * 1000 - 1)


def _printed(found: module.Paper) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in paper_tables(found):
        console.print(table)
    return console.export_text()


def test_tables_fit_80_columns(found: module.Paper) -> None:
    text = _printed(found)
    assert max(map(len, text.splitlines())) <= 80
    for number in ("855,770", "1,826,555", "38,312,446", "60,986,291", "93.14", "61.42 %"):
        assert number in text
    assert "…" not in text and text.count(NOT_RUN) == 6


def test_command() -> None:
    done = CliRunner().invoke(app, ["report", "--paper", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [row["counted"]["parameters"] for row in data["table1"]][:2] == [855_770, 800_032]
    assert data["table2"][0]["paper"]["fixed"] == "81.2"
    assert [row["ours"] for row in data["table1"]] == [None] * 5  # no CIFAR, no ImageNet
    heads = {(row["recipe"], row["head"]) for row in data["run_here"]}
    assert {("digits-resnet20", "paper head"), ("glyphs-signs", "64 learned signs")} <= heads


def test_a_row_whose_recipe_was_run_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of Table 1's first row, as if it had been run; and the same network on other data, which is no row."""
    measured = (
        "measured:\n- {data: %s, num_classes: 10, conditions: a minute of a CPU, seeds: [0, 1],\n"
        "   learned: {best: [92.5, 93.5], last: [92, 93]}, fixed: {best: [93, 92.75], last: [91, 92]}}\n"
    )
    row = (shipped.recipes_folder() / "paper-resnet56-cifar10.yaml").read_text()
    (tmp_path / "other.yaml").write_text(row.replace("data: cifar10", "data: digits") + measured % "digits")
    changed = "CIFAR-10, set: [train.head_standardize=true, train.lr=0.02]"
    (tmp_path / "row.yaml").write_text(row + measured % changed)
    monkeypatch.setattr(shipped, "recipes_folder", lambda: tmp_path)
    found = paper()
    first, *others = found.table1
    assert first.ours is not None and first.ours.recipe == "row"
    assert [row.ours for row in (*others, *found.table2, *found.section4)] == [None] * 8
    assert [run.recipe for run in found.run_here] == ["other", "row"]
    text = _printed(found)
    assert re.search(r"ResNet-56 +CIFAR-10 +93.03 +93.14 +92.5 +91.5\n +92.0 to 93.0 +91.0 to 92.0\n", text)
    assert text.count("-1.0 to -1.0") == 2
    assert text.count(NOT_RUN) == 5
    assert re.search(r"\nC = 10, N = 64 +standardised head .*\n +lr=0.02 *\n", text)
    assert found.to_dict()["table1"][0]["ours"]["gap"] == {"best": [0.5, -0.75], "last": [-1, -1]}


def test_a_text_whose_recipe_was_run_has_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(
        "language: {words: pmi}\n"
        "measured:\n- {data: a text, num_words: 50, conditions: a minute, command: python it, seeds: [0, 1],\n"
        "   learned: {val: [30, 20], test: [31, 21]}, others: {tied: {val: [33, 21], test: [35, 25]}}}\n"
    )
    monkeypatch.setattr(shipped, "recipes_folder", lambda: tmp_path)
    found = paper()
    assert found.run_here == ()
    text = _printed(found)
    assert re.search(r"learned +25.0 +26.0 *\n +20.0 to 30.0 +21.0 to 31.0 *\n", text)
    assert re.search(r"tied +27.0 +1.075 +30.0 *\n +21.0 to 33.0 +1.050 to 1.100 +25.0 to 35.0 *\n", text)
    assert "50 words; a minute; seeds 0, 1. python it" in text
    assert found.to_dict()["words_here"][0]["ratios"] == {"tied": [1.1, 1.05]}


@pytest.mark.parametrize("others", [["resnet18"], ["--all"], ["--arch", "resnet18"], ["-o", "page.html"]])
def test_it_goes_alone(others: list[str]) -> None:
    done = CliRunner().invoke(app, ["report", "--paper", *others])
    assert done.exit_code != 0
    assert "--paper" in str(done.exception) and others[0] in str(done.exception)
