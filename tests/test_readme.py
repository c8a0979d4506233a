"""The README's commands and Python examples work as they are printed."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import fixify
from fixify.cli.app import app, main
from fixify.demo.glyphs import write_dataset
from fixify.demo.run import SHIPPED

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "tests" / "benchmarks" / "README.md"
MAX_LINES = 180
# Two of the demo's twelve typefaces; the README predicts an image of the second.
FACES = {"train": ("DejaVuSerif-Bold",), "val": ("DejaVuSerif-BoldItalic",)}
# Appended to commands: one epoch, and no loader processes, which take longer to start than these few images to load.
SHORTER = {
    "eval": ["--workers", "0"],
    "finetune": ["--workers", "0", "--epochs", "1"],
    "train": ["--workers", "0", "--set", "train.epochs=1"],
}

_FENCE = re.compile(r"(?:^<!-- (?P<comment>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Fence:
    """A fenced block of the README and the HTML comment directly before it."""

    language: str
    body: str
    comment: str

    @property
    def runs(self) -> bool:
        """Whether the tests run it: not the installation, and not what needs data or hardware that is not here."""
        return not self.comment.startswith("not run in tests: ") and "pip install" not in self.body

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of each `fixify` command."""
        lines = [shlex.split(line, comments=True) for line in self.body.splitlines()]
        for line in lines:
            assert line[:1] == ["fixify"], f"not a fixify command: {line}"
        return [line[1:] for line in lines]

    @property
    def name(self) -> str:
        """The first command, to name a test."""
        return " ".join(self.commands[0][:2])


def fences(language: str) -> list[Fence]:
    found = _FENCE.finditer(README.read_text(encoding="utf-8"))
    every = [Fence(match["language"], match["body"], match["comment"] or "") for match in found]
    return [fence for fence in every if fence.language == language]


SHELL = [fence for fence in fences("sh") if "pip install" not in fence.body]
RUN = [fence for fence in SHELL if fence.runs]


def prose() -> str:
    return _FENCE.sub("", README.read_text(encoding="utf-8"))


def spans() -> list[str]:
    """Inline code of the README."""
    return re.findall(r"`([^`\n]+)`", prose())


def leaf(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that the arguments name, and the rest of them."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert arguments and arguments[0] in command.commands, f"no such command: {arguments}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


def options() -> set[str]:
    """Every option of every command."""
    waiting, found = [typer.main.get_command(app)], set()
    while waiting:
        command: Any = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        found |= {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves, as far as the README uses it: the checkpoint, and images of two typefaces."""
    folder = tmp_path_factory.mktemp("readme") / "fixify-demo"
    folder.mkdir()
    write_dataset(folder / "glyphs", faces=FACES)
    shutil.copy(SHIPPED, folder)
    return folder


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], None]:
    """Run a command line in the demo's folder, in this process (tests/cli starts real ones)."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FIXIFY_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def call(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["fixify", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        assert code == 0, f"{shlex.join(arguments)}\n{said.out}\n{said.err}"

    return call


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_test_command_is_where_ci_reads_it() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    at = lines.index("<!-- test command -->")
    assert lines[at + 1] == "```sh"
    assert lines[at + 2].endswith(".venv/bin/pytest -q")
    assert lines[at + 3] == "```"


@pytest.mark.parametrize("fence", [pytest.param(fence, id=fence.name) for fence in SHELL])
def test_commands_parse(fence: Fence) -> None:
    for arguments in fence.commands:
        command, rest = leaf(arguments)
        command.make_context(command.name, list(rest))


def test_commands_and_options_in_the_text_exist() -> None:
    commands = [shlex.split(span)[1:] for span in spans() if span.startswith("fixify ")]
    assert len(commands) >= 12
    for arguments in commands:
        command, rest = leaf(arguments)
        if rest:  # else the text only names the command
            command.make_context(command.name, list(rest))
    named = {option for span in spans() for option in re.findall(r"(?:^|\s)(--[a-z0-9-]+)", span)}
    assert len(named) >= 12
    assert named <= options()


def test_every_command_is_in_the_table() -> None:
    listed = {span.split()[1] for span in spans() if span.startswith("fixify ")}
    assert listed == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fence", [pytest.param(fence, id=fence.name) for fence in RUN])
def test_commands_run(fence: Fence, folder: Path, run: Callable[[list[str]], None]) -> None:
    for arguments in fence.commands:
        run([*arguments, *SHORTER.get(arguments[0], [])])
        if "-o" in arguments:
            assert (folder / arguments[arguments.index("-o") + 1]).exists()


@pytest.mark.parametrize("fence", fences("python"))
def test_python_runs(fence: Fence, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(fence.body, "README.md", "exec"), {})  # noqa: S102


def test_commands_are_library_calls() -> None:
    (line,) = (line for line in prose().splitlines() if line.startswith("Each command is a library call:"))
    names = [name.removeprefix("fixify.") for name in re.findall(r"`([\w.]+)`", line)]
    assert len(names) >= 10
    assert [name for name in names if not hasattr(fixify, name)] == []


@pytest.mark.parametrize("page", [README, BENCHMARKS], ids=["README", "benchmarks"])
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
