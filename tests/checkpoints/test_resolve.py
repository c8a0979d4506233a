"""fixify.checkpoints.resolve: a name is a path that exists, a path that does not, or a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fixify.checkpoints import open_source
from fixify.errors import SourceError

State = dict[str, torch.Tensor]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_existing_path_wins(here: Path, resnet_state: State) -> None:
    torch.save(resnet_state, here / "resnet18")
    (here / "timm").mkdir()
    torch.save(resnet_state, here / "timm" / "resnet18.a1_in1k")
    for ref in ("resnet18", "timm/resnet18.a1_in1k", Path("resnet18")):
        assert open_source(ref).tensors.keys() == resnet_state.keys()


def test_the_home_folder(here: Path, resnet_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    torch.save(resnet_state, here / "w.pth")
    assert open_source("~/w.pth").name == "w.pth"


@pytest.mark.parametrize("ref", ["modle.pth", "./modle.pth", "modle.safetensors", "modle.pth.tar"])
def test_near_file_names(here: Path, resnet_state: State, ref: str) -> None:
    for name in ("model.pth", "model.safetensors", "model.pth.tar", "unrelated.pt", "model.txt"):
        torch.save(resnet_state, here / name)
    with pytest.raises(SourceError, match=re.escape(ref)) as caught:
        open_source(ref)
    assert Path(ref).name.replace("modle", "model") in (caught.value.hint or "") and "model.txt" not in (
        caught.value.hint or ""
    )


def test_other_files_of_the_folder(here: Path, resnet_state: State) -> None:
    torch.save(resnet_state, here / "unrelated.pt")
    with pytest.raises(SourceError, match=r"w\.pth") as caught:
        open_source("w.pth")
    assert "unrelated.pt" in (caught.value.hint or "")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("w.pth", "w.pth"),
        ("nowhere/w.pth", "folder nowhere "),
        ("facebook/convnext", "hf-hub:facebook/convnext"),
        ("/nowhere/w", "folder /nowhere "),
        ("https://example.com/w.pth", "curl -LO https://example.com/w.pth"),
        ("resnt18", "timm/resnet18"),
        ("resnet18.nonesuch", "a1_in1k"),
        ("torchvision/resnt18", "torchvision/resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "object detection"),
        ("", ""),
        ("\0", repr("\0")),
        ("a" * 5000, repr("a" * 100)),
        ("w" * 5000 + ".pth", ".pth"),
    ],
)
def test_names_of_nothing(ref: str, expected: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(ref)
    assert expected in str(caught.value)


def test_a_link_to_nothing(here: Path) -> None:
    (here / "w.pth").symlink_to("gone.pth")
    with pytest.raises(SourceError, match=r"w\.pth"):
        open_source("w.pth")
