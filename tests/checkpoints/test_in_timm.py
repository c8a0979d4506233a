"""A slim checkpoint as one of timm's models: what `timm.create_model` and timm's own loading make of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.models import load_checkpoint, save_for_hf

import fixify
from fixify.errors import ArchitectureError, FixifyError, FormatError
from fixify.heads import FixedClassifier

MODELS: dict[str, dict[str, Any]] = {
    "test_efficientnet": {"num_classes": 300},
    "test_vit": {"num_classes": 30},
    "test_resnet": {"num_classes": 30, "in_chans": 1},
    "test_convnext": {"num_classes": 30},
    "swin_s3_tiny_224": {"num_classes": 12},  # its filter tells its own files by the classifier's name
    "deit_tiny_distilled_patch16_224": {"num_classes": 12},  # two heads
    "resnet20_cifar": {"num_classes": 10},  # one of fixify's own
}
SIZES = {"test_vit": 160, "swin_s3_tiny_224": 224, "deit_tiny_distilled_patch16_224": 224, "resnet20_cifar": 32}


@pytest.fixture(scope="module")
def slim_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The name of an architecture -> "local-dir:FOLDER" with a slim checkpoint of it, read-only."""
    made: dict[tuple[str, str], str] = {}
    parent = tmp_path_factory.mktemp("folders")

    def make(name: str, head: str = "auto") -> str:
        if (name, head) not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = timm.create_model(name, **MODELS[name])
            fixify.fix_classifier_(model, head)
            fixify.save(model, parent / f"{name}.{head}.fixed.safetensors")
            made[name, head] = f"local-dir:{parent / f'{name}-{head}'}"
            fixify.push(made[name, head], parent / f"{name}.{head}.fixed.safetensors")
        return made[name, head]

    return make


def images(name: str, **changes: int) -> torch.Tensor:
    size = changes.get("size", SIZES.get(name, 64))
    channels = changes.get("in_chans", MODELS[name].get("in_chans", 3))
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def answers(model: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits(slim_folder: Callable[..., str], name: str, tmp_path: Path) -> None:
    folder, x = slim_folder(name), images(name)
    ours = fixify.load(folder)
    theirs = timm.create_model(folder, pretrained=True)
    assert torch.equal(answers(theirs, x), answers(ours, x))
    assert theirs.num_classes == MODELS[name]["num_classes"]
    weights = Path(folder.partition(":")[2]) / "model.safetensors"
    fixify.save(theirs, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()


def test_a_classifier_behind_a_projection(tmp_path: Path) -> None:
    """CLIP's zero-shot classifier; with another number of classes timm drops the projection, as it always does."""
    options: dict[str, Any] = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    name = "vit_medium_patch32_clip_224.tinyclip_laion400m"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(timm.create_model(name, **options).state_dict(), tmp_path / "clip.pth")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).standard_normal((20, 512), dtype=np.float32))
    arch = ",".join((name, *(f"{key}={value}" for key, value in options.items())))
    slim = fixify.convert(
        tmp_path / "clip.pth", tmp_path / "a.safetensors", arch=arch, classifier=tmp_path / "text.npy", logit_scale=9.0
    ).path
    folder = fixify.push(f"local-dir:{tmp_path / 'folder'}", slim).name
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    made = timm.create_model(folder, pretrained=True)
    assert torch.equal(answers(made, x), answers(fixify.load(folder), x))
    fixify.save(made, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == slim.read_bytes()
    blank = timm.create_model(folder)  # as timm loads a checkpoint of its own training into it
    blank.load_state_dict(made.state_dict())
    assert torch.equal(answers(blank, x), answers(made, x))
    assert answers(timm.create_model(folder, pretrained=True, num_classes=7), x).shape == (2, 7)
    assert answers(timm.create_model(folder, pretrained=True, num_classes=0), x).shape == (2, 64)


@pytest.mark.parametrize("head", ["hadamard", "binary", "orthogonal"])
def test_stock_loading_fits(slim_folder: Callable[..., str], head: str) -> None:
    """A model without weights takes the file's tensors by `load_state_dict`, and so by `--checkpoint` of scripts."""
    folder = slim_folder("test_efficientnet", head)
    weights = Path(folder.partition(":")[2]) / "model.safetensors"
    expected = answers(fixify.load(folder), images("test_efficientnet"))
    first = timm.create_model(folder)
    first.load_state_dict(load_file(weights))
    second = timm.create_model(folder, checkpoint_path=str(weights))
    third = timm.create_model(folder)
    load_checkpoint(third, str(weights))
    for model in (first, second, third):
        assert torch.equal(answers(model, images("test_efficientnet")), expected)


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_vit", pytest.param("swin_s3_tiny_224", marks=pytest.mark.slow)]
)
def test_other_numbers_of_classes(slim_folder: Callable[..., str], name: str) -> None:
    folder, x = slim_folder(name), images(name)
    ours: Any = fixify.load(folder)
    other, none = (timm.create_model(folder, pretrained=True, num_classes=count) for count in (7, 0))
    assert answers(other, x).shape == (2, 7)
    assert not any(isinstance(module, FixedClassifier) for module in other.modules())
    with torch.no_grad():
        expected = ours.forward_features(x)
        assert torch.equal(other.forward_features(x), expected)
        assert torch.equal(answers(none, x), ours.forward_head(expected, pre_logits=True))
    pyramid = timm.create_model(folder, pretrained=True, features_only=True)
    plain = timm.create_model(name, features_only=True)
    assert [piece.shape for piece in answers(pyramid, x)] == [piece.shape for piece in answers(plain, x)]


def test_other_inputs(slim_folder: Callable[..., str]) -> None:
    larger = timm.create_model(slim_folder("test_vit"), pretrained=True, img_size=192)
    assert answers(larger, images("test_vit", size=192)).shape == (2, 30)
    colour = timm.create_model(slim_folder("test_resnet"), pretrained=True, in_chans=3)
    assert answers(colour, images("test_resnet", in_chans=3)).shape == (2, 30)
    grey = images("test_resnet")
    torch.testing.assert_close(  # timm divides the kernels by 3
        answers(colour, grey.expand(-1, 3, -1, -1)), answers(fixify.load(slim_folder("test_resnet")), grey)
    )
    dropping = timm.create_model(slim_folder("test_vit"), pretrained=True, drop_path_rate=0.5)
    assert torch.equal(
        answers(dropping, images("test_vit")), answers(fixify.load(slim_folder("test_vit")), images("test_vit"))
    )


def test_a_changed_network_can_be_saved(slim_folder: Callable[..., str], tmp_path: Path) -> None:
    larger = timm.create_model(slim_folder("test_vit"), pretrained=True, img_size=192)
    fixify.save(larger, tmp_path / "larger.safetensors")
    again = fixify.load(tmp_path / "larger.safetensors")
    x = images("test_vit", size=192)
    assert torch.equal(answers(again, x), answers(larger, x))
    assert again.fixify_info.preprocessing["input_size"] == [3, 192, 192]


def test_the_copy_that_timm_writes(slim_folder: Callable[..., str], tmp_path: Path) -> None:
    """timm's own `push_to_hf_hub` writes no header of ours; config.json then describes the heads."""
    folder, x = slim_folder("test_efficientnet", "binary"), images("test_efficientnet")
    model = timm.create_model(folder, pretrained=True)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(answers(again, x), answers(model, x))


def test_torchvision(tmp_path: Path) -> None:
    model = torchvision.models.squeezenet1_1(num_classes=20)
    fixify.fix_classifier_(model)
    fixify.save(model, tmp_path / "net.fixed.safetensors")
    name = fixify.push(f"local-dir:{tmp_path / 'net'}", tmp_path / "net.fixed.safetensors").name
    x = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model(name, pretrained=True, in_chans=3)  # timm's scripts always give the channels
    assert torch.equal(answers(theirs, x), answers(fixify.load(name), x))
    assert theirs.num_classes == 20 and list(theirs.pretrained_cfg["input_size"]) == [3, 224, 224]
    other = timm.create_model(name, pretrained=True, num_classes=5)
    assert answers(other, x).shape == (2, 5)
    for key, value in other.state_dict().items():
        assert key.startswith("classifier.1.") or torch.equal(value, theirs.state_dict()[key]), key
    with pytest.raises(ArchitectureError):
        timm.create_model(name, pretrained=True, features_only=True)
    with pytest.raises(ArchitectureError):
        timm.create_model(name, pretrained=True, in_chans=1)


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {}},
        {"model_args": {"slim": {}}},
        {
            "model_args": {
                "slim": {"architecture": {"library": "os", "name": "system", "tag": None, "kwargs": {}}, "heads": []}
            }
        },
        {"model_args": {"slim": 3}},
    ],
)
def test_a_damaged_config(slim_folder: Callable[..., str], tmp_path: Path, change: dict[str, Any]) -> None:
    source = Path(slim_folder("test_efficientnet").partition(":")[2])
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError):
        timm.create_model(f"local-dir:{tmp_path}")


def test_weights_of_another_network(slim_folder: Callable[..., str], tmp_path: Path) -> None:
    source = Path(slim_folder("test_efficientnet").partition(":")[2])
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(FixifyError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(FormatError):
        timm.create_model("fixify_slim", pretrained=True)
    data = bytearray((source / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(FixifyError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
