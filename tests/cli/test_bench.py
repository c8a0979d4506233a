"""fixify bench: a library call and printing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fixify.benchmarks import convert, loss, step

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--size", "64x10", "--size", "64x200", "--batch", 1, "--batch", 3, "--threads", 1, "--repeats", 3)


def fits(text: str) -> bool:
    return bool(text) and max(map(len, text.splitlines())) <= 80


def test_heads(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("bench", "head", *SMALL, "--plot", "a.png")
    assert code == 0 and fits(out) and "64x200" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("bench", "head", *SMALL, "--head", "hadamard", "--backward", "--json", "--plot", "a.svg")
    found = json.loads(out)
    assert [row["ratios"].keys() for row in found["rows"]] == [{"hadamard"}] * 4
    assert found["machine"]["versions"].keys() >= {"torch", "timm", "fixify"} and found["machine"]["processor"]
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(("factor", "expected"), [(1e-6, 0), (1e6, 3)])
def test_a_lost_ratio_ends_with_3(run: Run, tmp_path: Path, factor: float, expected: int) -> None:
    found = json.loads(run("bench", "head", *SMALL, "--json")[1])
    for row in found["rows"]:
        row["ratios"] = {kind: ratio * factor for kind, ratio in row["ratios"].items()}
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(found))
    code, out, _ = run("bench", "head", *SMALL, "--against", path, "--json")
    assert code == expected
    assert len(json.loads(out)["against"]["regressions"]) == (16 if expected else 0)
    code, out, err = run("bench", "head", *SMALL, "--against", path)
    assert code == expected and fits(out)
    assert ("reference" in out) is (expected == 3) and "16" in err


def test_what_is_refused_before_measuring(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    for arguments, expected in (
        (["head", "--size", "64"], 2),
        (["head", "--head", "none", "--size", "8x4"], 2),
        (["head", "--plot", "a.jpg"], 2),
        (["head", "--plot", "there.png"], 1),
        (["head", "--against", "missing.json"], 2),
        (["convert", "--head", "hadamard"], 2),
        (["loss", "--head", "none"], 2),
        (["step", "no_such_net"], 1),
    ):
        code, out, err = run("bench", *arguments)
        assert (code, out) == (expected, ""), err


def test_losses(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loss, "run_in_child", lambda *_, **__: {"seconds": 1.234, "peak_bytes": 123_456_789})
    code, out, _ = run("bench", "loss", "--classes", 10_000_000, "--classes", 1000, "--plot", "a.png")
    assert code == 0 and fits(out) and "10,000,000" in out and "needs 46 GB" in out and "123 MB" in out
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(json.loads(run("bench", "loss", "--json")[1])["rows"]) == 4


def test_conversions(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(convert, "run_in_child", lambda *_, **__: {"seconds": 123.4, "peak_bytes": 123_456_789})
    code, out, _ = run("bench", "convert", "--plot", "a.png")
    assert code == 0 and fits(out) and "1280x20000" in out and "binary-64" in out
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(json.loads(run("bench", "convert", "--size", "8x4", "--json")[1])["rows"]) == 3


def test_steps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"head_forward": 1.0, "head_backward": 2.0, "optimiser": 3.0, "all_reduce": 4.0, "rest": 50.0}
    monkeypatch.setattr(step, "run_in_children", lambda *_, **__: [{"learned": parts, "fixed": parts}])
    code, out, _ = run("bench", "step", "test_efficientnet", "--classes", 1000)
    assert code == 0 and fits(out) and "all-reduce" in out and "60000.0" in out
    assert json.loads(run("bench", "step", "test_efficientnet", "--json")[1])["rows"][0]["ratio"] == 1
