"""fixify.checkpoints.pretrained and hub: models by name, from the libraries' caches and from a server of our own."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.models import get_pretrained_cfg

from fixify.checkpoints import open_source
from fixify.errors import SourceError

State = dict[str, torch.Tensor]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a hub client that is set to offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def cache_repository(cache: Path, repo: str, files: dict[str, Any], *, revision: str = "main") -> None:
    """Put files into a Hugging Face cache with its client's layout: refs, snapshots, and links to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / REVISION
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(REVISION)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(content, blob)
        elif name.endswith(".json"):
            blob.write_text(json.dumps(content))
        else:
            torch.save(content, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))


def random_state(model: torch.nn.Module) -> State:
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def pretrained() -> State:
    """Weights for timm's test_resnet with its 1000 classes."""
    return random_state(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    ("ref", "file"),
    [
        ("test_resnet", "model.safetensors"),
        ("timm/test_resnet", "pytorch_model.bin"),
        ("test_resnet.r160_in1k", "model.safetensors"),
        ("timm/test_resnet.r160_in1k", "pytorch_model.bin"),
    ],
)
def test_timm_names(caches: Path, pretrained: State, ref: str, file: str) -> None:
    cache_repository(caches / "hf", "timm/test_resnet.r160_in1k", {file: pretrained})
    source = open_source(ref)
    assert source.name == source.facts.architecture == "timm/test_resnet.r160_in1k"
    assert source.tensors.keys() == pretrained.keys()
    assert all(torch.equal(source.tensors[key], value) for key, value in pretrained.items())
    assert (
        source.facts.num_classes == 1000
        and source.facts.labels is not None
        and source.facts.labels[0].startswith("tench")
    )
    assert source.facts.pretrained_cfg is not None and source.facts.pretrained_cfg["input_size"] == [3, 160, 160]
    assert source.sha256 is not None and str(caches) not in repr({**vars(source), "tensors": None})
    assert open_source(ref, meta=True).shapes == source.shapes


def test_timm_translates_names_of_the_original_code(caches: Path) -> None:
    """Some files of vision transformers are not in timm's form; timm's own filter translates them."""
    state = random_state(timm.create_model("test_vit"))
    original = dict(state)
    original["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    cache_repository(caches / "hf", "timm/test_vit.r160_in1k", {"model.safetensors": original})
    source = open_source("test_vit")
    assert source.shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert all(torch.equal(source.tensors[key], value) for key, value in state.items())
    assert open_source("test_vit", meta=True).shapes == source.shapes


def test_timm_weights_of_something_else(caches: Path) -> None:
    cache_repository(caches / "hf", "timm/test_resnet.r160_in1k", {"model.safetensors": {"a.weight": torch.ones(2, 2)}})
    with pytest.raises(SourceError, match=r"timm/test_resnet\.r160_in1k"):
        open_source("test_resnet")


def test_timm_without_weights() -> None:
    without = next(
        name for name in timm.list_models("vit_*") if not (cfg := get_pretrained_cfg(name)) or not cfg.has_weights
    )
    with pytest.raises(SourceError, match=without):
        open_source(without)


@pytest.mark.parametrize("ref", ["hf-hub:someone/birds", "hf_hub:someone/birds", "hf-hub:someone/birds@v2"])
def test_a_repository(caches: Path, resnet_state: State, ref: str) -> None:
    config = {"architecture": "test_resnet", "num_classes": 10, "label_names": [f"bird {n}" for n in range(10)]}
    revision = ref.partition("@")[2] or "main"
    files = {"model.safetensors": resnet_state, "config.json": config}
    cache_repository(caches / "hf", "someone/birds", files, revision=revision)
    source = open_source(ref)
    assert source.name == ref.partition(":")[2]
    assert (
        source.facts.architecture == "timm/test_resnet"
        and source.facts.labels is not None
        and source.facts.labels[3] == "bird 3"
    )
    assert source.tensors.keys() == resnet_state.keys()


def test_a_repository_in_shards(caches: Path, resnet_state: State) -> None:
    keys = list(resnet_state)
    parts = {"model-1.safetensors": keys[:9], "model-2.safetensors": keys[9:]}
    files: dict[str, Any] = {name: {key: resnet_state[key] for key in part} for name, part in parts.items()}
    files["config.json"] = {"architecture": "test_resnet"}
    files["model.safetensors.index.json"] = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    cache_repository(caches / "hf", "someone/large", files)
    assert open_source("hf-hub:someone/large").tensors.keys() == resnet_state.keys()


@pytest.mark.parametrize("ref", ["hf-hub:someone/birds", "resnet18", "timm/resnet18.a1_in1k"])
def test_offline_says_what_to_fetch_and_where_to_put_it(caches: Path, ref: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(ref)
    repo = "someone/birds" if "birds" in ref else "timm/resnet18.a1_in1k"
    said = str(caught.value)
    assert f"hf download {repo}" in said and "local-dir:" in said and "HF_HUB_OFFLINE" in said
    assert str(caches / "hf") in said and f"models--{repo.replace('/', '--')}" in said


def test_offline_names_the_revision() -> None:
    with pytest.raises(SourceError) as caught:
        open_source("hf-hub:someone/birds@v2")
    assert "hf download someone/birds --revision v2 --local-dir birds" in str(caught.value)


def test_no_network_is_reported_without_the_retries_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client would retry for 23 seconds."""

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the client was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SourceError, match=r"someone/birds.*hub\.invalid"):
        open_source("hf-hub:someone/birds")


@pytest.mark.parametrize("ref", ["hf-hub:a/b/c", "hf-hub:a b", "hf-hub:", "hf-hub:.."])
def test_no_repository_name(ref: str) -> None:
    with pytest.raises(SourceError, match=re.escape(repr(ref.partition(":")[2]))) as caught:
        open_source(ref)
    assert "hf-hub:organisation/name" in (caught.value.hint or "")


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[str]:
    """The address of a web server on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client needs to download a file, or to learn that it may not."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.requests.append(self.path)
        repo, _, file = self.path.lstrip("/").partition("/resolve/")
        content = self.files.get(f"{repo}/{file.partition('/')[2]}")
        refusals = {"some/gated": (403, "GatedRepo"), "some/private": (401, "RepoNotFound")}
        if file.startswith("v9/"):
            refusals[repo] = (404, "RevisionNotFound")
        if repo in refusals or content is None:
            status, code = refusals.get(repo, (404, "EntryNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


PROGRAM = """
import json
import sys

import torchvision

from fixify.checkpoints import open_source
from fixify.errors import SourceError

torchvision.models.ResNet18_Weights.DEFAULT.value.url = "http://127.0.0.1:9/resnet18-f37072fd.pth"
said = []
for ref in sys.argv[1:]:
    try:
        source = open_source(ref)
        said.append([source.name, source.facts.architecture, len(source.tensors)])
    except SourceError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_process_with_a_hub_and_caches_in_its_environment(
    tmp_path: Path, resnet_state: State, pretrained: State
) -> None:
    """The hub's real client and a server of our own; HF_HOME, HF_ENDPOINT and TORCH_HOME as a user sets them."""
    FakeHub.files = {
        "some/birds/model.safetensors": safetensors.torch.save(resnet_state),
        "some/birds/config.json": json.dumps({"architecture": "test_resnet", "num_classes": 10}).encode(),
        "some/other/README.md": b"no weights",
    }
    cache_repository(tmp_path / "hf" / "hub", "timm/test_resnet.r160_in1k", {"model.safetensors": pretrained})
    repositories = ["some/birds", "some/birds", "some/other", "some/gated", "some/private", "some/birds@v9"]
    refs = [*(f"hf-hub:{name}" for name in repositories), "test_resnet", "torchvision/resnet18"]
    with serving(FakeHub) as address:
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address, "TORCH_HOME": str(tmp_path / "th")}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *refs],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    first, again, other, gated, private, revision, cached, torchvision_file = json.loads(done.stdout)
    assert first == again == ["some/birds", "timm/test_resnet", len(resnet_state)]
    asked = [path for path in FakeHub.requests if "birds" in path and "model.safetensors" in path and "v9" not in path]
    assert len(asked) == 2  # HEAD and GET, once: the second time it came from the cache
    assert "some/other" in other and "model.safetensors" in other
    assert "some/gated" in gated and address in gated and "hf auth login" in gated
    assert "some/private" in private and "hf auth login" in private
    assert "some/birds" in revision and "v9" in revision
    assert cached == ["timm/test_resnet.r160_in1k", "timm/test_resnet.r160_in1k", len(pretrained)]
    assert str(tmp_path / "th" / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in torchvision_file


# torchvision


@pytest.fixture
def shufflenet(caches: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, State]:
    """A file with the name that torchvision would give to weights of its smallest network, and those weights."""
    state = random_state(torchvision.models.shufflenet_v2_x0_5())
    path = caches / "shufflenet.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = path.rename(caches / f"shufflenetv2_x0.5-{digest[:10]}.pth")
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"https://download.pytorch.org/models/{named.name}")
    return named, state


@pytest.mark.parametrize(
    "ref",
    [
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/shufflenet_v2_x0_5:IMAGENET1K_V1",
        "torchvision/shufflenet_v2_x0_5.IMAGENET1K_V1",
        "shufflenet_v2_x0_5",
    ],
)
def test_torchvision_names(caches: Path, shufflenet: tuple[Path, State], ref: str) -> None:
    path, state = shufflenet
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path.rename(folder / path.name)
    source = open_source(ref)
    assert source.name == source.facts.architecture == "torchvision/shufflenet_v2_x0_5.IMAGENET1K_V1"
    assert source.facts.labels is not None and source.facts.labels[0] == "tench" and source.facts.num_classes == 1000
    assert source.facts.pretrained_cfg is not None and source.facts.pretrained_cfg["input_size"] == [3, 224, 224]
    assert all(torch.equal(source.tensors[key], value) for key, value in state.items())


def test_a_file_of_torchvision_that_was_downloaded_by_hand(shufflenet: tuple[Path, State]) -> None:
    path, _ = shufflenet
    source = open_source(path)
    assert source.name == path.name
    assert source.facts.architecture == "torchvision/shufflenet_v2_x0_5.IMAGENET1K_V1"
    assert source.facts.labels is not None and source.facts.labels[0] == "tench"
    torch.save({"other": torch.ones(2)}, path)  # the same name, but another file
    assert open_source(path).facts.architecture is None


def test_a_damaged_download(caches: Path, shufflenet: tuple[Path, State]) -> None:
    path, state = shufflenet
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({**state, "fc.bias": torch.zeros(1000)}, folder / path.name)
    digest = hashlib.sha256((folder / path.name).read_bytes()).hexdigest()
    with pytest.raises(SourceError, match=digest[:8]) as caught:
        open_source("torchvision/shufflenet_v2_x0_5")
    assert path.name in caught.value.message and "https://download.pytorch.org" in (caught.value.hint or "")


def test_torchvision_offline(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    address = "http://127.0.0.1:9/models/resnet50-0676ba61.pth"  # no server listens on that port
    monkeypatch.setattr(weights.value, "url", address)
    with pytest.raises(SourceError) as caught:
        open_source("torchvision/resnet50:IMAGENET1K_V1")
    said = str(caught.value)
    assert address in said
    assert f"{caches / 'torch' / 'hub' / 'checkpoints' / 'resnet50-0676ba61.pth'}" in said


def test_weights_that_torchvision_does_not_have() -> None:
    with pytest.raises(SourceError, match=r"IMAGENET1K_V9.*resnet50") as caught:
        open_source("torchvision/resnet50:IMAGENET1K_V9")
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in str(caught.value)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("torchvision/googlenet", {"transform_input": True}),
        ("torchvision/inception_v3", {"transform_input": True}),
        ("torchvision/vit_b_16:IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}),
        ("torchvision/vit_b_16", {}),
    ],
)
def test_what_torchvision_builds_differently_for_its_weights(
    caches: Path, monkeypatch: pytest.MonkeyPatch, ref: str, expected: dict[str, Any]
) -> None:
    from fixify.models.architectures import parse_architecture

    architecture = parse_architecture(ref.replace(":", "."))
    enum = torchvision.models.get_model_weights(architecture.name)
    weights = enum[architecture.tag or "DEFAULT"]
    monkeypatch.setattr(weights.value, "url", "https://download.pytorch.org/models/tiny.pth")
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"a": torch.ones(1)}, folder / "tiny.pth")
    assert open_source(ref).facts.architecture_kwargs == expected


# downloading


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Quiet) as address:
        yield address, folder


def test_a_download_is_kept_and_used_again(
    caches: Path, server: tuple[str, Path], shufflenet: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    path, _ = shufflenet
    served = path.rename(folder / path.name)
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"{address}/{served.name}")
    first = open_source("torchvision/shufflenet_v2_x0_5")
    served.unlink()
    again = open_source("torchvision/shufflenet_v2_x0_5")
    assert first.sha256 == again.sha256
    kept = list((caches / "torch" / "hub" / "checkpoints").iterdir())
    assert [file.name for file in kept] == [served.name]


def test_a_download_with_another_hash_is_not_kept(
    caches: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    torch.save({"a": torch.ones(1)}, folder / "model-01234567.pth")
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"{address}/model-01234567.pth")
    with pytest.raises(SourceError, match=r"model-01234567\.pth"):
        open_source("torchvision/shufflenet_v2_x0_5")
    assert not list((caches / "torch" / "hub" / "checkpoints").iterdir())


def test_timm_weights_that_are_not_on_the_hub(
    caches: Path, server: tuple[str, Path], pretrained: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    torch.save(pretrained, folder / "test_resnet.pth")
    cfgs = timm.models._registry._model_pretrained_cfgs  # there is no public way to change an entry
    name = "test_resnet.r160_in1k"
    monkeypatch.setitem(cfgs, name, dataclasses.replace(cfgs[name], hf_hub_id=None, url=f"{address}/test_resnet.pth"))
    assert open_source(name).tensors.keys() == pretrained.keys()
    monkeypatch.setitem(cfgs, name, dataclasses.replace(cfgs[name], hf_hub_id=None, url=f"{address}/weights.npz"))
    with pytest.raises(SourceError, match=r"weights\.npz"):
        open_source(name)
