"""fixify.checkpoints.learned and open: an ordinary checkpoint is recognised, or refused with what is missing."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from fixify.checkpoints.learned import read_original
from fixify.checkpoints.open import open_model
from fixify.conversion import convert
from fixify.errors import AmbiguousArchitectureError, ArchitectureError, FormatError, NoClassifierError, SourceError
from fixify.models import build, parse_architecture


def _encoder(folder: Path) -> Path:
    """A folder with the hub's layout that holds a model without a classifier."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, depth=1)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "model_args": {"img_size": 28, "depth": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_encoders_say_so(tmp_path: Path) -> None:
    with pytest.raises(NoClassifierError, match="vit_small_patch14_dinov2"):
        read_original(_encoder(tmp_path), meta=True)
    with pytest.raises(NoClassifierError, match="mobilenetv5_300m_enc"):
        read_original(tmp_path / "model.safetensors", arch="mobilenetv5_300m_enc")
    with pytest.raises(ArchitectureError, match=r"model\.safetensors.*timm/resnet18"):
        read_original(tmp_path / "model.safetensors", arch="resnet18")


def test_ambiguous_files_carry_their_choices(tmp_path: Path) -> None:
    arch = parse_architecture("torchvision/googlenet", aux_logits=False)
    shapes = build(arch, num_classes=9, meta=True).state_dict()
    path = tmp_path / "google.pth"
    torch.save({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}, path)
    with pytest.raises(AmbiguousArchitectureError) as unnamed:
        read_original(path, meta=True)
    with pytest.raises(AmbiguousArchitectureError) as named:
        read_original(path, arch="torchvision/googlenet", meta=True)
    for error in (unnamed.value, named.value):
        assert len(error.choices) >= 2 and any("transform_input" in facts for facts in error.choices.values())
        for choice in error.choices:  # each can be typed, and leaves no choice open
            read_original(path, arch=choice, meta=True)
        assert (error.hint or "").endswith(next(iter(error.choices)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_run(tmp_path: Path, bad: float) -> None:
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    state["blocks.0.mlp.fc1.weight"][0, 1] = bad
    path = tmp_path / "model.pth"
    torch.save(state, path)
    for use in (lambda: open_model(path, arch="test_vit"), lambda: convert(path, tmp_path / "x", arch="test_vit")):
        with pytest.raises(SourceError, match=rf"{bad}.*blocks\.0\.mlp\.fc1\.weight"):
            use()
    slim = convert(_finite(path), tmp_path / "slim.fixed.safetensors", arch="test_vit").path
    with safetensors.safe_open(slim, "pt") as file:
        metadata = file.metadata()
    del metadata["fixify.tensors"]  # as older versions wrote it; otherwise the digest is what fails
    tensors = safetensors.torch.load_file(slim)
    tensors["norm.weight"][2] = bad
    safetensors.torch.save_file(tensors, slim, metadata=metadata)
    with pytest.raises(SourceError, match=r"norm\.weight"):
        open_model(slim)


def _finite(path: Path) -> Path:
    torch.save({key: value.nan_to_num(0, 0, 0) for key, value in torch.load(path, weights_only=True).items()}, path)
    return path


def test_a_slim_header_cannot_ask_for_images_of_terabytes(tiny: Path, tmp_path: Path) -> None:
    slim = convert(tiny / "learned.pth", tmp_path / "slim.fixed.safetensors").path
    with safetensors.safe_open(slim, "pt") as file:
        metadata = file.metadata()
    info = json.loads(metadata["fixify"])
    info["preprocessing"]["input_size"] = [3, 1_000_000, 1_000_000]
    safetensors.torch.save_file(
        safetensors.torch.load_file(slim), slim, metadata={**metadata, "fixify": json.dumps(info)}
    )
    with pytest.raises(FormatError, match="input_size"):
        open_model(slim)
