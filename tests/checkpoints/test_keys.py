"""Models by name, from the libraries' caches; without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
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
    """Empty caches, and no network: the hub's client is told so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def cache_repository(cache: Path, repo: str, files: dict[str, Any], *, revision: str = "main") -> None:
    """Put files into a Hugging Face cache as its client lays it out: refs, snapshots, and links to blobs."""
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
def published() -> State:
    """Weights of timm's test_resnet as published: 1000 classes."""
    return random_state(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    "ref", ["test_resnet", "timm/test_resnet", "test_resnet.r160_in1k", "timm/test_resnet.r160_in1k"]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timm_names(caches: Path, published: State, ref: str, file: str) -> None:
    cache_repository(caches / "hf", "timm/test_resnet.r160_in1k", {file: published})
    source = open_source(ref)
    assert source.name == source.architecture == "timm/test_resnet.r160_in1k"
    assert source.tensors.keys() == published.keys()
    assert all(torch.equal(source.tensors[key], value) for key, value in published.items())
    assert source.num_classes == 1000 and source.labels is not None and source.labels[0].startswith("tench")
    assert source.pretrained_cfg is not None and source.pretrained_cfg["input_size"] == [3, 160, 160]
    assert source.sha256 is not None and str(caches) not in repr({**vars(source), "tensors": None})
    assert open_source(ref, meta=True).shapes == source.shapes


def test_timm_translates_names_of_the_original_code(caches: Path) -> None:
    """The published weights of some vision transformers are not in timm's form; timm's filter brings them there."""
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
    with pytest.raises(SourceError, match=r"timm/test_resnet\.r160_in1k are not what timm expects"):
        open_source("test_resnet")


def test_timm_without_weights() -> None:
    without = next(
        name for name in timm.list_models("vit_*") if not (cfg := get_pretrained_cfg(name)) or not cfg.has_weights
    )
    with pytest.raises(SourceError, match="no pretrained weights"):
        open_source(without)


@pytest.mark.parametrize("ref", ["hf-hub:someone/birds", "hf_hub:someone/birds", "hf-hub:someone/birds@v2"])
def test_a_repository(caches: Path, resnet_state: State, ref: str) -> None:
    config = {"architecture": "test_resnet", "num_classes": 10, "label_names": [f"bird {n}" for n in range(10)]}
    revision = ref.partition("@")[2] or "main"
    files = {"model.safetensors": resnet_state, "config.json": config}
    cache_repository(caches / "hf", "someone/birds", files, revision=revision)
    source = open_source(ref)
    assert source.name == ref.partition(":")[2]
    assert source.architecture == "timm/test_resnet" and source.labels is not None and source.labels[3] == "bird 3"
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


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client would retry for 23 seconds."""
    import time

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"cannot be reached \(hub\.invalid"):
        open_source("hf-hub:someone/birds")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("ref", ["hf-hub:a/b/c", "hf-hub:a b", "hf-hub:", "hf-hub:.."])
def test_no_repository_name(ref: str) -> None:
    with pytest.raises(SourceError, match="no repository of the Hugging Face hub") as caught:
        open_source(ref)
    assert "hf-hub:organisation/name" in str(caught.value)


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


def test_downloads_from_a_hub(tmp_path: Path, resnet_state: State) -> None:
    """The hub's real client against a server of our own, in a process whose environment points there."""
    FakeHub.files = {
        "some/birds/model.safetensors": safetensors.torch.save(resnet_state),
        "some/birds/config.json": json.dumps({"architecture": "test_resnet", "num_classes": 10}).encode(),
        "some/other/README.md": b"no weights",
    }
    refs = ["some/birds", "some/birds", "some/other", "some/gated", "some/private", "some/birds@v9"]
    program = (
        "import json, sys\n"
        "from fixify.errors import SourceError\n"
        "from fixify.checkpoints import open_source\n"
        "said = []\n"
        "for ref in sys.argv[1:]:\n"
        "    try:\n"
        "        source = open_source('hf-hub:' + ref)\n"
        "        said.append([source.name, source.architecture, len(source.tensors)])\n"
        "    except SourceError as error:\n"
        "        said.append(str(error))\n"
        "print(json.dumps(said))\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", program, *refs],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        running.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    first, again, other, gated, private, revision = json.loads(done.stdout)
    assert first == again == ["some/birds", "timm/test_resnet", len(resnet_state)]
    asked = [path for path in FakeHub.requests if "birds" in path and "model.safetensors" in path and "v9" not in path]
    assert len(asked) == 2  # HEAD and GET, once: the second time it came from the cache
    assert "holds no weights that fixify reads" in other
    assert "asks for a licence" in gated and "hf auth login" in gated
    assert "or it is private" in private
    assert "no revision v9" in revision


def test_the_environment_is_honoured(tmp_path: Path, published: State) -> None:
    """HF_HOME, HF_HUB_OFFLINE and TORCH_HOME, as a user sets them: in a process of its own."""
    home = tmp_path / "home"
    cache_repository(home / "hub", "timm/test_resnet.r160_in1k", {"model.safetensors": published})
    program = (
        "import torchvision\n"
        "from fixify.checkpoints import open_source\n"
        "print(open_source('test_resnet').name)\n"
        "torchvision.models.ResNet18_Weights.DEFAULT.value.url = 'http://127.0.0.1:9/resnet18-f37072fd.pth'\n"
        "try: open_source('torchvision/resnet18')\n"
        "except Exception as error: print(error)\n"
        "try: open_source('resnet18')\n"
        "except Exception as error: print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path / "th")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("timm/test_resnet.r160_in1k\n")
    assert str(tmp_path / "th" / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in done.stdout
    assert str(home / "hub") in done.stdout and "HF_HUB_OFFLINE is set" in done.stdout


# torchvision


@pytest.fixture
def shufflenet(caches: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, State]:
    """A file under which torchvision's smallest network could be published, and its weights."""
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
    assert source.name == source.architecture == "torchvision/shufflenet_v2_x0_5.IMAGENET1K_V1"
    assert source.labels is not None and source.labels[0] == "tench" and source.num_classes == 1000
    assert source.pretrained_cfg is not None and source.pretrained_cfg["input_size"] == [3, 224, 224]
    assert all(torch.equal(source.tensors[key], value) for key, value in state.items())


def test_a_file_of_torchvision_that_was_downloaded_by_hand(shufflenet: tuple[Path, State]) -> None:
    path, _ = shufflenet
    source = open_source(path)
    assert source.name == path.name
    assert source.architecture == "torchvision/shufflenet_v2_x0_5.IMAGENET1K_V1"
    assert source.labels is not None and source.labels[0] == "tench"
    torch.save({"other": torch.ones(2)}, path)  # of that name, but not that file
    assert open_source(path).architecture is None


def test_a_damaged_download(caches: Path, shufflenet: tuple[Path, State]) -> None:
    path, state = shufflenet
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({**state, "fc.bias": torch.zeros(1000)}, folder / path.name)
    with pytest.raises(SourceError, match="is damaged: its SHA-256 starts with") as caught:
        open_source("torchvision/shufflenet_v2_x0_5")
    assert "Remove it" in str(caught.value)


def test_torchvision_offline(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    address = "http://127.0.0.1:9/models/resnet50-0676ba61.pth"  # nothing listens on that port
    monkeypatch.setattr(weights.value, "url", address)
    with pytest.raises(SourceError) as caught:
        open_source("torchvision/resnet50:IMAGENET1K_V1")
    said = str(caught.value)
    assert f"{address} could not be downloaded" in said
    assert f"put it at {caches / 'torch' / 'hub' / 'checkpoints' / 'resnet50-0676ba61.pth'}" in said


def test_weights_that_torchvision_does_not_have() -> None:
    with pytest.raises(SourceError, match="no weights 'IMAGENET1K_V9' of resnet50") as caught:
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
    assert open_source(ref).architecture_kwargs == expected


# downloading


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of this machine's, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


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
    with pytest.raises(SourceError, match="could not be downloaded"):
        open_source("torchvision/shufflenet_v2_x0_5")
    assert not list((caches / "torch" / "hub" / "checkpoints").iterdir())


def test_timm_weights_that_are_not_on_the_hub(
    caches: Path, server: tuple[str, Path], published: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    torch.save(published, folder / "test_resnet.pth")
    cfgs = timm.models._registry._model_pretrained_cfgs  # there is no public way to change an entry
    name = "test_resnet.r160_in1k"
    monkeypatch.setitem(cfgs, name, dataclasses.replace(cfgs[name], hf_hub_id=None, url=f"{address}/test_resnet.pth"))
    assert open_source(name).tensors.keys() == published.keys()
    monkeypatch.setitem(cfgs, name, dataclasses.replace(cfgs[name], hf_hub_id=None, url=f"{address}/weights.npz"))
    with pytest.raises(SourceError, match="only as a JAX archive"):
        open_source(name)
