"""Open folders as the Hugging Face hub lays them out, written by the libraries themselves where possible."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from fixify.checkpoints import open_source
from fixify.errors import SourceError, UnsafeCheckpointError

State = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my-model"


def shard(folder: Path, state: State, *, suffix: str = "safetensors") -> Path:
    """Write `state` into two files and an index, as transformers does."""
    folder.mkdir(exist_ok=True)
    keys = list(state)
    halves = {"1": keys[: len(keys) // 2], "2": keys[len(keys) // 2 :]}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in halves.items():
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        part = {key: state[key] for key in names}
        if suffix == "safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("safe", [True, False])
def test_what_timm_saves(folder: Path, safe: bool) -> None:
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    config = {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "cat", "n2": "dog"}}
    save_for_hf(model, folder, model_config=config, model_args={"in_chans": 1}, safe_serialization=safe)
    for ref in (str(folder), f"local-dir:{folder}"):
        source = open_source(ref)
        assert source.name == "my-model"
        assert source.facts.architecture == "timm/test_resnet.r160_in1k"
        assert source.facts.architecture_kwargs["in_chans"] == 1
        assert source.facts.num_classes == 3
        assert source.facts.labels == ["cat", "dog", "n3"]
        assert source.facts.pretrained_cfg is not None
        assert list(source.facts.pretrained_cfg["input_size"]) == [1, 160, 160]
        assert all(torch.equal(source.tensors[key], value) for key, value in model.state_dict().items())
        assert source.sha256 is not None
    weights = folder / ("model.safetensors" if safe else "pytorch_model.bin")
    assert open_source(weights).facts.architecture == "timm/test_resnet.r160_in1k"  # from the config.json beside it
    assert open_source(folder, meta=True).shapes == open_source(folder).shapes


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(folder: Path, resnet_state: State, suffix: str) -> None:
    index = shard(folder, resnet_state, suffix=suffix)
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 10}))
    for ref in (folder, index):
        source = open_source(ref)
        assert source.tensors.keys() == resnet_state.keys()
        assert all(torch.equal(source.tensors[key], value) for key, value in resnet_state.items())
        assert source.facts.architecture == "timm/test_resnet" and source.facts.num_classes == 10
        assert source.num_bytes == sum(file.stat().st_size for file in folder.glob("*0000*"))
    assert all(tensor.is_meta for tensor in open_source(folder, meta=True).tensors.values())


def test_a_missing_shard(folder: Path, resnet_state: State) -> None:
    shard(folder, resnet_state)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors"):
        open_source(folder)


def test_a_shard_without_its_tensor(folder: Path, resnet_state: State) -> None:
    index = shard(folder, resnet_state)
    content = json.loads(index.read_text())
    content["weight_map"]["fc.other"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"fc\.other"):
        open_source(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/part.safetensors", "..", "", "config.json", 5]
)
def test_an_index_that_points_elsewhere(folder: Path, resnet_state: State, name: Any) -> None:
    index = shard(folder, resnet_state)
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsafeCheckpointError, match=re.escape(repr(name))):
        open_source(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map(folder: Path, resnet_state: State, content: str) -> None:
    shard(folder, resnet_state).write_text(content)
    with pytest.raises(SourceError, match="weight_map"):
        open_source(folder)


def test_no_average_in_shards(folder: Path, resnet_state: State) -> None:
    shard(folder, resnet_state)
    with pytest.raises(SourceError, match=r"index\.json"):
        open_source(folder, ema=True)


@pytest.mark.parametrize(("content", "expected"), [("{", "JSON"), ("[]", "list"), ("\xff", "JSON")])
def test_a_damaged_config(folder: Path, resnet_state: State, content: str, expected: str) -> None:
    folder.mkdir()
    safetensors.torch.save_file(resnet_state, folder / "model.safetensors")
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(SourceError, match=rf"config\.json.*{expected}"):
        open_source(folder)


def test_configs_of_transformers(folder: Path, resnet_state: State) -> None:
    folder.mkdir()
    safetensors.torch.save_file({f"timm_model.{k}": v for k, v in resnet_state.items()}, folder / "model.safetensors")
    wrapper = {
        "architecture": "test_resnet",
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "num_classes": 10,
        "label_names": [f"class {index}" for index in range(10)],
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "tag": "r160_in1k", "input_size": [3, 160, 160]},
        "model_args": None,
    }
    (folder / "config.json").write_text(json.dumps(wrapper))
    source = open_source(folder)
    assert source.tensors.keys() == resnet_state.keys()
    assert source.facts.architecture == "timm/test_resnet.r160_in1k" and source.facts.labels is not None
    assert source.facts.pretrained_cfg == {"mean": [0.5, 0.5, 0.5], "input_size": [3, 160, 160]}
    native = {"architectures": ["ResNetForImageClassification"], "id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(native))
    source = open_source(folder)
    assert source.facts.architecture is None and source.facts.labels == ["cat", "dog"] and source.facts.num_classes == 2


def test_the_old_flat_config_of_timm(folder: Path, resnet_state: State) -> None:
    folder.mkdir()
    safetensors.torch.save_file(resnet_state, folder / "model.safetensors")
    flat = {"architecture": "test_resnet", "num_classes": 10, "crop_pct": 0.9, "labels": list("abcdefghij")}
    (folder / "config.json").write_text(json.dumps(flat))
    source = open_source(folder)
    assert source.facts.architecture == "timm/test_resnet" and source.facts.num_classes == 10
    assert source.facts.pretrained_cfg == {"crop_pct": 0.9} and source.facts.labels == list("abcdefghij")


def test_the_one_checkpoint_of_a_folder(folder: Path, resnet_state: State) -> None:
    folder.mkdir()
    torch.save(resnet_state, folder / "best.pth")
    (folder / "log.txt").write_text("epoch 1")
    assert open_source(folder).shapes == open_source(folder / "best.pth").shapes


def test_several_checkpoints(folder: Path, resnet_state: State) -> None:
    folder.mkdir()
    for name in ("checkpoint-1.pth.tar", "checkpoint-2.pth.tar"):
        torch.save(resnet_state, folder / name)
    with pytest.raises(SourceError, match=r"\b2\b.*checkpoint-1\.pth\.tar, checkpoint-2\.pth\.tar") as caught:
        open_source(folder)
    assert str(folder / "checkpoint-2.pth.tar") in (caught.value.hint or "")


def test_no_checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("none")
    with pytest.raises(SourceError, match="my-model") as caught:
        open_source(folder)
    assert "model.safetensors" in (caught.value.hint or "")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        open_source(f"local-dir:{tmp_path / 'nowhere'}")
