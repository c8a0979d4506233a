"""A stored projection on the command line: convert chooses it, and every command knows the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fixify
from fixify.errors import HeadSpecError
from fixify.exporting.export import ExportOptions

Run = Callable[..., tuple[int, str, str]]


CLASSES, WIDTH = 2000, 256
FEW = ("--head", "binary", "--bits-per-class", 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 2,000 classes on 256 features, whose class vectors vary in six directions."""
    path = tmp_path_factory.mktemp("source") / "many.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=CLASSES, in_chans=1)
        model.classifier.weight.data = torch.randn(CLASSES, 6) @ torch.randn(6, WIDTH) * 20
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(64):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (4, 4), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def slim(source: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slim") / "a.fixed.safetensors"
    options = {"head": "binary", "bits_per_class": 64, "calibrate": str(pictures)}
    return fixify.convert(source, out, device="cpu", arch="test_efficientnet", **options).path


def test_convert_inspect_verify(run: Run, source: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.fixed.safetensors"
    made = ("convert", source, "-o", out, "--calibrate", pictures, "--arch", "test_efficientnet", *FEW)
    code, said, err = run(*made, "--device", "cpu")
    assert code == 0, err
    assert "directions of 256 features" in err and "8-bit numbers" in said
    found = json.loads(run("inspect", out, "--json")[1])["heads"][0]["spec"]
    assert found["bits_per_class"] == sum(found["planes"]) < 64
    own = ("codes", "gains", "projection", "projection_steps")
    state = fixify.load(out).get_classifier().state_dict()
    assert sum(state[name].nbytes for name in own) <= CLASSES * 9  # what 64 signs and a row scale take
    assert "projected coordinates" in run("inspect", out)[1]
    assert run("verify", out, "--source", source)[0] == 0


def test_signs_that_can_be_learned(source: Path, slim: Path, pictures: Path, tmp_path: Path) -> None:
    options = {"head": "binary", "bits_per_class": 64, "calibrate": str(pictures), "project": False}
    rotated = fixify.convert(source, tmp_path / "a.safetensors", device="cpu", arch="test_efficientnet", **options).path
    head = fixify.load(rotated).get_classifier()
    assert head.spec.planes is None and head.spec.bits_per_class == 64
    head.learn_signs_()
    with pytest.raises(HeadSpecError) as refused:
        fixify.load(slim).get_classifier().learn_signs_()
    assert "--no-project" in (refused.value.hint or "")


@pytest.mark.parametrize("to", ["torch-export", "onnx", "dense"])
def test_exports(slim: Path, tmp_path: Path, to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    done = fixify.export(slim, tmp_path / "a", ExportOptions(to=to))
    assert all(check.difference <= check.allowed for check in done.checks)


def test_classes_are_edited(slim: Path, tmp_path: Path) -> None:
    kept = fixify.keep_classes(slim, ["3", "1", "40"], tmp_path / "kept.safetensors").path
    head, old = fixify.load(kept).get_classifier(), fixify.load(slim).get_classifier()
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).relu()
    with torch.inference_mode():
        torch.testing.assert_close(head(x), old(x)[:, [3, 1, 40]], rtol=1e-4, atol=1e-4)
    for path in (
        fixify.merge_classes(slim, ["3", "1"], "both", tmp_path / "merged.safetensors").path,
        fixify.add_classes(slim, ["new"], tmp_path / "added.safetensors").path,
        kept,
    ):
        assert fixify.verify(path).passed
        assert fixify.load(path).get_classifier().spec.planes == old.spec.planes


def test_agree_walks_it(source: Path, pictures: Path, tmp_path: Path) -> None:
    options = {"agree": 10, "calibrate": str(pictures), "calibrate_images": 48, "arch": "test_efficientnet"}
    done = fixify.convert(source, tmp_path / "a.fixed.safetensors", device="cpu", **options)
    sizes = {tried.flags: tried.bytes_per_class for tried in done.choice.walked}
    assert sizes["--head binary --bits-per-class 64"] <= 9


def test_images_of_one_model_choose_the_same_in_memory(source: Path) -> None:
    model = timm.create_model("test_efficientnet", num_classes=CLASSES, in_chans=1)
    model.load_state_dict(torch.load(source, weights_only=True))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        6, WIDTH, generator=torch.Generator().manual_seed(1)
    )
    fixify.fix_classifier_(model, "binary", bits_per_class=64, features={"classifier": x})
    assert model.classifier.spec.planes is not None
