"""No word of a file reaches the terminal raw: control characters are shown, whatever command prints them."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from fixify import convert
from fixify.cli.output import Output, SafeConsole, fail, visible
from fixify.errors import SourceError

Run = Callable[..., tuple[int, str, str]]
# The title of the window, the clipboard (OSC 52), a cleared screen, the same in 8-bit controls, reversed text, and a
# byte that is not UTF-8.
EVIL = "\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\x9d0;x\x9c\r\x7f\x08\u202etxt\u2066\u200b\udcff"
EVIL_FILE = "\x1b]0;title\x07\x1b[2J\u009b31m\u202e"
# No output is a terminal in a test, so the program itself writes no sequences here.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_clean(*texts: str) -> None:
    for text in texts:
        found = RAW.search(text)
        assert found is None, repr(text[max(found.start() - 60, 0) : found.end() + 20])


@pytest.mark.parametrize(
    "printed",
    [EVIL, Text(EVIL, style="bold"), Text.assemble(("a" * 70, "bold"), EVIL), Panel(EVIL, title="[b]" + EVIL)],
    ids=["str", "text", "styles", "panel"],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_printed(printed: object, terminal: bool) -> None:
    table = Table("x", EVIL, title=Text(EVIL))
    table.add_row(EVIL, Text(EVIL))
    console = SafeConsole(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None, markup=False)
    for each in (printed, table):
        console.print(each)
    assert_clean(console.file.getvalue())
    assert r"\x1b" in console.file.getvalue() and "title" in console.file.getvalue()


def test_what_is_harmless_stays() -> None:
    assert visible("Grüße, 猫, 👩‍🔬, a\tb\nc, می‌خواهم") == "Grüße, 猫, 👩‍🔬, a\tb\nc, می‌خواهم"


def test_lines_errors_and_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws bars
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("builtins.input", lambda: "")
    output = Output()
    fail(SourceError(EVIL, hint=EVIL))
    output.say(EVIL)
    output.warn(EVIL)
    output.next_step(EVIL, EVIL)
    output.ask(EVIL)
    output.text(EVIL)
    output.result({}, EVIL)
    with output.progress(EVIL, total=2) as advance:
        advance(note=EVIL)
    Output(as_json=True).result({EVIL: EVIL})
    captured = capsys.readouterr()
    own = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # colours and cursor movements of rich
    assert_clean(own.sub("", captured.out), own.sub("", captured.err))
    for stream in captured:
        assert "\x1b]" not in stream and "\x1b[2J" not in stream and "\x9b" not in stream


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files whose names and contents hold escape sequences."""
    folder = tmp_path_factory.mktemp("evil")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=4)
    state = model.state_dict()
    torch.save(state, folder / f"model{EVIL_FILE}.pth")
    (folder / "labels.json").write_text(json.dumps([f"{EVIL_FILE}{label}" for label in range(4)]))
    slim = folder / f"slim{EVIL_FILE}.fixed.safetensors"
    convert(folder / f"model{EVIL_FILE}.pth", slim, arch="test_efficientnet", labels=str(folder / "labels.json"))
    torch.save(OrderedDict([(f"{EVIL_FILE}.weight", torch.ones(4, 8))]), folder / "names.pth")
    torch.save(OrderedDict([(f"{EVIL_FILE}.weight", torch.ones(4, 8).to_sparse())]), folder / "sparse.pth")
    torch.save({EVIL_FILE: 3, "epoch": EVIL_FILE}, folder / "none.pth")
    save_file({f"{EVIL_FILE}.weight": torch.ones(4, 8)}, folder / "names.safetensors")
    weights = {**state, next(iter(state)): torch.ones(1), f"{EVIL_FILE}.weight": torch.ones(2, 2)}
    torch.save(weights, folder / "changed.pth")
    (folder / "global.pth").write_bytes(pickle.PROTO + b"\x02c" + EVIL_FILE.encode() + b"\n\x1b]0;x\x07\n.")
    (folder / "text.pth").write_text("Hello \x1b[2J world, this is no checkpoint")
    for name, map_ in (
        ("outside", {"a": f"../{EVIL_FILE}.safetensors"}),
        ("missing", {EVIL_FILE: f"{EVIL_FILE}.safetensors"}),
        ("lacking", {EVIL_FILE: "names.safetensors"}),
    ):
        (folder / name).mkdir()
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    save_file({"a": torch.ones(1)}, folder / "lacking" / "names.safetensors")
    (folder / f"{EVIL_FILE}.yaml").write_text(f'"{EVIL_FILE.encode("unicode_escape").decode()}": 1\n')
    for label in range(4):
        for split in ("train", "val"):
            path = folder / "data" / split / f"{label}{EVIL_FILE}" / f"{EVIL_FILE}.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (60 * label, 0, 0)).save(path)
            path.with_name(f"broken{EVIL_FILE}.png").write_bytes(b"\x89PNG broken")
    return folder


def _commands(folder: Path) -> list[tuple[object, ...]]:
    slim, model = folder / f"slim{EVIL_FILE}.fixed.safetensors", folder / f"model{EVIL_FILE}.pth"
    image = next((folder / "data" / "val").glob("1*/[!b]*.png"))
    opened = [
        *(folder / name for name in ("names.pth", "sparse.pth", "none.pth", "names.safetensors", "global.pth")),
        *(folder / name for name in ("text.pth", "changed.pth", "outside", "missing", "lacking", f"{EVIL_FILE}.pth")),
        f"resnet{EVIL_FILE}",
    ]
    known = ("--arch", "test_efficientnet")
    return [
        *(("convert", file, *known) for file in [*opened, slim]),
        *(("identify", file) for file in opened if not str(file).endswith("changed.pth")),
        *(("plan", file, *known) for file in opened[-4:]),
        *(("inspect", file) for file in [*opened, slim]),
        *(("verify", file) for file in [*opened, slim]),
        ("verify", slim, "--source", model),
        ("convert", model, *known, "-o", slim),
        ("convert", model, "--arch", EVIL_FILE),
        ("convert", model, *known, "--labels", folder / f"{EVIL_FILE}.yaml"),
        ("predict", slim, image),
        ("predict", slim, image, image.with_name(f"broken{EVIL_FILE}.png")),
        ("predict", model, image, "--arch", "test_efficientnet", "--labels", folder / "labels.json"),
        ("eval", slim, "--data", folder / "data", "--workers", "0"),
        ("eval", slim, "--data", folder / EVIL_FILE),
        ("eval", slim, "--data", folder / "data", "--class-map", folder / f"{EVIL_FILE}.yaml"),
        ("compare", model, slim, "--data", folder / "data", "--workers", "0", "--arch", "test_efficientnet"),
        ("compare", slim, model, "--data", folder / "data"),
        ("push", f"local-dir:{folder}/pushed{EVIL_FILE}", slim),
        ("push", f"org/{EVIL_FILE}", slim),
        ("export", model),
        ("export", slim, "--to", "torch-export", "-o", folder / EVIL_FILE / "no folder.pt2"),
        ("report", slim),
        ("report", folder / EVIL_FILE),
        ("recipes", "show", folder / f"{EVIL_FILE}.yaml"),
        ("recipes", "validate", folder / f"{EVIL_FILE}.yaml"),
        ("recipes", "cp", EVIL_FILE),
        ("train", folder / f"{EVIL_FILE}.yaml"),
        ("inspect", slim, EVIL_FILE),
        ("inspect", f"--{EVIL_FILE}"),
        (EVIL_FILE,),
        ("finetune", slim, "--data", folder / "data", "--epochs", "1", "--workers", "0", "--out", f"run{EVIL_FILE}"),
    ]


@pytest.mark.skipif(os.name != "posix", reason="names of files may hold control characters on POSIX")
def test_every_command(run: Run, evil: Path) -> None:
    done: set[str] = set()
    shown = 0
    for arguments in _commands(evil):
        code, out, err = run(*arguments)
        assert_clean(out, err)
        done.add(str(arguments[0]))
        shown += r"\x1b" in out + err
        assert code in (0, 1, 2, 3)
    assert shown > 40
    from fixify.cli.app import COMMANDS

    assert done >= set(COMMANDS) - {"demo"}  # it reads no file of somebody else


def test_json_is_clean_and_exact(run: Run, evil: Path) -> None:
    slim = evil / f"slim{EVIL_FILE}.fixed.safetensors"
    code, out, _ = run("inspect", slim, "--json")
    assert code == 0
    assert_clean(out)
    assert json.loads(out)["labels"][0] == f"{EVIL_FILE}0" and json.loads(out)["file"] == slim.name
