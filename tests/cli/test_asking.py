"""Asking on a terminal which architecture a checkpoint is of."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.cli import common as asking
from fixify.cli.output import Output
from fixify.errors import AmbiguousArchitectureError
from fixify.models import build, parse_architecture

CHOICES = {"timm/efficientnet_lite0": "padding even", "timm/tf_efficientnet_lite0": "padding as TensorFlow"}


def ambiguous(arch: str | None) -> str:
    if arch is None:
        raise AmbiguousArchitectureError("model.pth fits several architectures:\n  ...", choices=CHOICES)
    return arch


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def answer(*answers: str) -> None:
        given = iter(answers)

        def read() -> str:
            try:
                return next(given)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        for stream in (sys.stdin, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)

    return answer


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["2"], "timm/tf_efficientnet_lite0"),
        (["0", "3", "resnet", "", " 1 "], "timm/efficientnet_lite0"),
        (["timm/tf_efficientnet_lite0"], "timm/tf_efficientnet_lite0"),
    ],
)
def test_answers(
    terminal: Callable[..., None], capsys: pytest.CaptureFixture[str], answers: list[str], chosen: str
) -> None:
    terminal(*answers)
    assert asking.with_architecture(ambiguous, None, Output()) == chosen
    out, err = capsys.readouterr()
    assert out == ""  # results only
    assert "timm/tf_efficientnet_lite0" in err and ": padding as TensorFlow\n" in err
    assert err.count("is none of them") == len(answers) - 1


def test_no_answer_is_the_error(terminal: Callable[..., None]) -> None:
    terminal()
    with pytest.raises(AmbiguousArchitectureError):
        asking.with_architecture(ambiguous, None, Output())


def test_nobody_is_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda: pytest.fail("asked"))
    with pytest.raises(AmbiguousArchitectureError):
        asking.with_architecture(ambiguous, None, Output())
    assert asking.with_architecture(ambiguous, "resnet18", Output()) == "resnet18"


def test_on_a_terminal(tmp_path: Path) -> None:
    """A real process on a pseudo-terminal: the question goes there, the result to stdout."""
    arch = parse_architecture("efficientnet_lite0")
    shapes = build(arch, num_classes=9, meta=True).state_dict()
    path = tmp_path / "lite.safetensors"
    safetensors.torch.save_file(
        {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}, path
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fixify", "plan", str(path), "--json"]
    child = subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    seen = ""
    while "or a name:" not in seen and select.select([ours], [], [], 120)[0]:
        seen += os.read(ours, 4096).decode()
    os.write(ours, b"2\n")
    out, _ = child.communicate(timeout=120)
    os.close(ours)
    assert child.returncode == 0, seen
    assert "timm/efficientnet_lite0" in seen and "padding" in seen
    assert '"architecture": "timm/tf_efficientnet_lite0"' in out
