"""`fixify compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

import fixify

Run = Callable[..., tuple[int, str, str]]


def test_compare(run: Run, tiny: Path, tmp_path: Path) -> None:
    slim = fixify.convert(tiny / "learned.pth", tmp_path / "net.fixed.safetensors", head="binary").path
    given = ("compare", tiny / "learned.pth", slim, "--data", tiny / "data", "--workers", 0, "--device", "cpu")
    code, out, err = run(*given, "--html", "page.html")
    assert code == 0 and "page.html" in err
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(word in out for word in ("original", "int2", slim.name, "to the original"))
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    code, _, err = run(*given, "--html", "page.html")
    assert code == 1 and "--force" in err
    code, out, _ = run(*given, "--json", "--calibrate", tiny / "data")
    found = json.loads(out)
    assert code == 0 and found["num_images"] == 4 and found["rows"][0]["name"] == "original"
    assert "seconds" not in found["rows"][0]["metrics"]


def test_the_wrong_order(run: Run, tiny: Path, tmp_path: Path) -> None:
    slim = fixify.convert(tiny / "learned.pth", tmp_path / "net.fixed.safetensors").path
    code, _, err = run("compare", slim, tiny / "learned.pth", "--data", tiny / "data")
    assert code == 2 and "fixify compare ORIGINAL SLIM" in err


def test_it_says_what_was_read_and_asks_for_the_architecture_by_name(run: Run, tiny: Path, tmp_path: Path) -> None:
    stored = torch.load(tiny / "learned.pth", weights_only=True)
    named = {**stored, "class_to_idx": {f"class{label}": label for label in range(4)}}
    torch.save(named, tmp_path / "named.pth")
    torch.save(stored["state_dict"], tmp_path / "bare.pth")
    slim = fixify.convert(tmp_path / "named.pth", tmp_path / "net.fixed.safetensors").path
    given = (slim, "--data", tiny / "data", "--workers", 0, "--device", "cpu")
    code, _, err = run("compare", tmp_path / "named.pth", *given)
    assert code == 0 and "class_to_idx" in err
    assert run("compare", tmp_path / "bare.pth", *given, "--arch", "test_efficientnet")[0] == 0
