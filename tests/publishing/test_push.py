"""`fixify.push` and what can be loaded from where it published, with the hub's own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from tools.stand_in_hub import READER, WRITER, Repository, StandInHub

import fixify
from fixify.checkpoints.open import open_model
from fixify.errors import ArchitectureError, FormatError, OutputError, OutputExistsError, SourceError, UsageError
from fixify.heads import FixedClassifier

# The client itself calls its HTTP library in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"model.safetensors", "config.json", "README.md"}


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images)


def test_what_was_pushed_can_be_loaded(hub: StandInHub, slim: Path, images: torch.Tensor) -> None:
    done = fixify.push("someone/birds", slim, licence="MIT", message="First try")
    assert done.name == "hf-hub:someone/birds"
    assert done.url == f"{hub.address}/someone/birds/commit/{done.commit}"
    assert hub.files("someone/birds").keys() == FILES == done.files.keys()
    assert hub.files("someone/birds")["model.safetensors"] == slim.read_bytes()
    assert hub.repositories["someone/birds"].messages == ["initial commit", "First try"]
    assert hub.repositories["someone/birds"].private is False

    expected = logits(fixify.load(slim), images)
    loaded = fixify.load(done.name)
    assert loaded.fixify_info.labels == [f"thing {number}" for number in range(300)]
    assert torch.equal(logits(loaded, images), expected)
    in_timm = timm.create_model(done.name, pretrained=True, cache_dir=constants.HF_HUB_CACHE)
    assert torch.equal(logits(in_timm, images), expected)
    assert in_timm.pretrained_cfg["label_names"][2] == "thing 2"
    assert in_timm.pretrained_cfg["license"] == "mit"
    assert open_model(done.name).name == "someone/birds"
    assert fixify.inspect(done.name) == fixify.inspect(slim)
    assert fixify.verify(done.name).passed


def test_the_newest_version_is_loaded(
    hub: StandInHub, slim: Path, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixify.push("someone/birds", slim)
    cache = {"cache_dir": constants.HF_HUB_CACHE}
    before = logits(timm.create_model("hf-hub:someone/birds", pretrained=True, **cache), images)
    assert torch.equal(logits(fixify.load("hf-hub:someone/birds"), images), before)
    changed = fixify.load(slim)
    with torch.no_grad():
        changed.get_classifier().bias.add_(1.0)
    fixify.save(changed, tmp_path / "new.safetensors")
    fixify.push("someone/birds", tmp_path / "new.safetensors", force=True)
    after = logits(timm.create_model("hf-hub:someone/birds", pretrained=True, **cache), images)
    torch.testing.assert_close(after, before + 1.0)
    assert torch.equal(logits(fixify.load("hf-hub:someone/birds"), images), after)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(fixify.load("hf-hub:someone/birds"), images), after)  # from the cache


def test_private_and_branches(hub: StandInHub, slim: Path, images: torch.Tensor) -> None:
    done = fixify.push("hf-hub:someone/birds", slim, private=True, revision="v2")
    repository = hub.repositories["someone/birds"]
    assert repository.private is True
    assert repository.messages[-1] == f"Upload with fixify {fixify.__version__}"
    assert hub.files("someone/birds").keys() == set()
    assert hub.files("someone/birds", "v2").keys() == FILES
    assert done.name == "hf-hub:someone/birds@v2"
    for model in (fixify.load(done.name), timm.create_model(done.name, pretrained=True)):
        assert torch.equal(logits(model, images), logits(fixify.load(slim), images))
    with pytest.raises(FormatError, match="someone/birds"):
        fixify.load("hf-hub:someone/birds")


def test_an_existing_repository_is_only_replaced_with_force(hub: StandInHub, slim: Path) -> None:
    hub.repositories["someone/birds"] = Repository()
    hub.repositories["someone/birds"].commit("main", {"pytorch_model.bin": b"weights"}, "of somebody")
    with pytest.raises(OutputExistsError, match=r"someone/birds.*pytorch_model\.bin"):
        fixify.push("someone/birds", slim)
    assert hub.repositories["someone/birds"].messages == ["of somebody"]
    fixify.push("someone/birds@mine", slim)  # a new branch takes nothing away
    assert hub.files("someone/birds").keys() == {"pytorch_model.bin"}
    with pytest.raises(OutputExistsError):
        fixify.push("someone/birds@mine", slim)
    fixify.push("someone/birds", slim, force=True)
    assert hub.files("someone/birds").keys() == {"pytorch_model.bin", *FILES}


def test_an_empty_repository_needs_no_force(hub: StandInHub, slim: Path) -> None:
    hub.repositories["someone/birds"] = Repository()
    hub.repositories["someone/birds"].commit("main", {}, "made on the website")
    fixify.push("someone/birds", slim)
    assert hub.files("someone/birds").keys() == FILES


def test_nothing_goes_to_a_public_repository_that_was_meant_to_be_private(hub: StandInHub, slim: Path) -> None:
    fixify.push("someone/birds", slim)
    with pytest.raises(UsageError, match="public"):
        fixify.push("someone/birds", slim, private=True, force=True)


def test_what_others_send_meanwhile_is_not_replaced(hub: StandInHub, slim: Path) -> None:
    fixify.push("someone/birds", slim)

    def meanwhile(server: StandInHub) -> None:
        server.repositories["someone/birds"].commit("main", {"theirs": b""}, "of somebody else")

    hub.before_commit = meanwhile
    with pytest.raises(OutputError, match="meanwhile"):
        fixify.push("someone/birds", slim, force=True)
    assert hub.files("someone/birds").keys() == {"theirs"}


@pytest.mark.parametrize(
    ("token", "said"), [(None, "no token"), (READER, "may not write"), ("hf_expired", "does not accept the token")]
)
def test_tokens(hub: StandInHub, slim: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=said) as caught:
        fixify.push("someone/birds", slim)
    assert "hf auth login" in (caught.value.hint or "")
    assert hub.repositories == {}


def test_without_network(hub: StandInHub, slim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "https://hub.invalid")
        with pytest.raises(OutputError, match=r"hub\.invalid") as caught:
            fixify.push("someone/birds", slim)
    assert "local-dir:birds" in (caught.value.hint or "") and "hf upload someone/birds" in (caught.value.hint or "")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
            fixify.push("someone/birds", slim)
        with pytest.raises(SourceError, match="someone/birds"):
            fixify.load("hf-hub:someone/birds")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers
        with pytest.raises(OutputError, match=r"127\.0\.0\.1:9"):
            fixify.push("someone/birds", slim)
    assert hub.requests == []


def test_a_connection_that_is_lost_while_a_large_file_is_sent(
    hub: StandInHub, slim: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client wraps this error in a RuntimeError."""

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error while uploading") from ConnectionError("reset by peer")

    fixify.push("someone/birds", slim)
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "create_commit", lost)
        with pytest.raises(OutputError, match="reset by peer"):
            fixify.push("someone/birds", slim, force=True)


def test_what_is_not_there(hub: StandInHub, slim: Path) -> None:
    with pytest.raises(SourceError, match="someone/nothing"):
        fixify.load("hf-hub:someone/nothing")
    fixify.push("someone/birds", slim)
    with pytest.raises(SourceError, match="v9"):
        fixify.load("hf-hub:someone/birds@v9")
    hub.repositories["someone/learned"] = Repository()
    ordinary = {"model.safetensors": (3).to_bytes(8, "little") + b"{ }"}
    hub.repositories["someone/learned"].commit("main", ordinary, "learned")
    with pytest.raises(FormatError, match="someone/learned") as caught:
        fixify.load("hf-hub:someone/learned")
    assert "fixify convert hf-hub:someone/learned" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["birds", "a/b/c", "", "some one/birds", "someone/", "https://huggingface.co/a/b"])
def test_names_that_are_none(hub: StandInHub, slim: Path, name: str) -> None:
    with pytest.raises(UsageError, match="repository"):
        fixify.push(name, slim)
    assert hub.requests == []


@pytest.mark.parametrize(
    "options",
    [
        {"licence": "my own: ''"},
        {"target": "someone/birds@v1", "revision": "v2"},
        {"target": "local-dir:x", "private": True},
    ],
)
def test_bad_usage(hub: StandInHub, slim: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        fixify.push(**{"target": "someone/birds", "checkpoint": slim, **options})
    assert hub.requests == []


def test_only_slim_checkpoints_that_are_whole(hub: StandInHub, slim: Path, small_pth: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        fixify.push("someone/birds", small_pth)
    data = bytearray(slim.read_bytes())
    data[-5] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with pytest.raises(FormatError):
        fixify.push("someone/birds", tmp_path / "damaged.safetensors")
    assert hub.requests == []


def test_the_same_files_in_a_folder(slim: Path, images: torch.Tensor, tmp_path: Path) -> None:
    done = fixify.push(f"local-dir:{tmp_path / 'birds'}", slim)
    folder = tmp_path / "birds"
    assert {path.name for path in folder.iterdir()} == FILES
    assert done.url is done.commit is None
    expected = logits(fixify.load(slim), images)
    for ref in (done.name, folder, str(folder)):
        assert torch.equal(logits(fixify.load(ref), images), expected)
        assert open_model(ref).name == "birds"
    assert torch.equal(logits(timm.create_model(done.name, pretrained=True), images), expected)
    with pytest.raises(OutputExistsError, match=r"README\.md"):
        fixify.push(done.name, slim)
    assert fixify.push(done.name, slim, force=True) == done
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        fixify.push(f"local-dir:{tmp_path / 'file'}", slim)


def test_a_folder_without_slim_checkpoint(tmp_path: Path) -> None:
    for ref in (tmp_path, f"local-dir:{tmp_path}", "local-dir:nowhere"):
        with pytest.raises(FormatError):
            fixify.load(ref)


def test_a_classifier_without_a_network(hub: StandInHub, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 64), dtype=np.float32)
    np.save(tmp_path / "text.npy", rows)
    slim = fixify.convert(tmp_path / "text.npy", tmp_path / "text.fixed.safetensors", logit_scale=10.0).path
    done = fixify.push("someone/names", slim, licence="mit")
    assert done.is_bare
    head = fixify.load(done.name)
    assert isinstance(head, FixedClassifier)
    assert torch.equal(logits(head, torch.from_numpy(rows)), logits(fixify.load(slim), torch.from_numpy(rows)))
    card = hub.files("someone/names")["README.md"].decode()
    assert "without a network" in card and "timm" not in card and "fixify.load('hf-hub:someone/names')" in card
    with pytest.raises(ArchitectureError):
        timm.create_model(done.name, pretrained=True, cache_dir=constants.HF_HUB_CACHE)
    pytest.importorskip("onnxruntime")
    assert fixify.export(done.name, tmp_path / "head.onnx").paths[0].exists()


PROGRAM = """
import fixify, json, sys, timm, torch
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    ours = fixify.load("hf-hub:someone/birds")(images)
    theirs = timm.create_model("hf_hub:someone/birds", pretrained=True).eval()(images)
print(json.dumps([torch.equal(ours, theirs), float(ours.abs().sum())]))
"""


@pytest.mark.slow
def test_processes_with_a_hub_in_their_environment(hub: StandInHub, slim: Path, tmp_path: Path) -> None:
    """The command, then a program of its reader, with HF_ENDPOINT, HF_HOME and HF_TOKEN as a user sets them."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.address, "HF_TOKEN": WRITER}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def start(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=180, cwd=slim.parent
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = json.loads(start("-m", "fixify", "push", "someone/birds", "--license", "apache-2.0", "--json"))
    assert said["name"] == "hf-hub:someone/birds" and said["license"] == "apache-2.0"
    same, total = json.loads(start("-c", PROGRAM))
    assert same and total > 0
