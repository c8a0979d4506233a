"""`fixify convert --agree`: the frontier it prints, its exit code and its plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fixify.agreement import AgreementNotReached, Candidate, Choice
from fixify.demo.glyphs import face_images
from fixify.demo.run import SHIPPED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    folder = tmp_path / "glyphs"
    folder.mkdir()
    for number, image in enumerate(next(iter(face_images("val", "DejaVuSerif-BoldItalic")))[:200]):
        Image.fromarray(image).save(folder / f"{number}.png", compress_level=1)
    made = ["convert", SHIPPED, "--calibrate", folder, "--calibrate-images", 128, "--device", "cpu"]
    return [*made, "-o", tmp_path / "a.fixed.safetensors", "--agree", 80]


def test_json_and_plot(run: Run, arguments: list[object], tmp_path: Path) -> None:
    code, out, err = run(*arguments, "--plot", tmp_path / "a.png", "--json")
    assert code == 0, err
    found = json.loads(out)["choice"]
    assert found["target"] == 80 and found["chosen"]["bound"] >= 80
    assert found["chosen"] in found["walked"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("as_json", [False, True])
def test_exit_code_3_if_no_head_reaches_it(
    run: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def none_reached(*args: object) -> None:
        raise AgreementNotReached(Choice(80, (Candidate("--head binary", 33, 9, 10, 60.6, False),)))

    monkeypatch.setattr("fixify.conversion.choose_head", none_reached)
    code, out, err = run(*arguments, *(["--json"] if as_json else []))
    assert code == 3
    assert "9 of 10" in err
    if as_json:
        assert json.loads(out)["choice"]["chosen"] is None
    else:
        assert "90.00 % of 10" in out and "below 80 %" in out
    assert not (tmp_path / "a.fixed.safetensors").exists()


def test_a_plot_needs_heads_that_were_tried(run: Run, tmp_path: Path) -> None:
    assert run("convert", "x.pth", "--plot", tmp_path / "a.png")[0] == 2
    assert run("convert", "x.pth", "--calibrate", ".", "--agree", 90, "--plot", tmp_path / "a.txt")[0] == 2
