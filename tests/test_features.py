from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import fixify
from fixify.checkpoints.learned import read_original
from fixify.data import Subset, draw_images, make_loader
from fixify.demo.run import SHIPPED
from fixify.errors import DataError, UsageError
from fixify.heads import FixedClassifier
from fixify.metrics import compare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 70)).save(folder / f"{number}.png")
    return folder


def _heads(model: nn.Module) -> dict[str, FixedClassifier]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, FixedClassifier)}


def test_a_trained_network_keeps_much_without_training_and_says_how_much(glyphs: Path, tmp_path: Path) -> None:
    """Of 500 classes, chance being 0.2 %, which is also what matched codes alone keep."""
    plain = fixify.convert(SHIPPED, tmp_path / "plain.fixed.safetensors")
    done = fixify.convert(
        SHIPPED, tmp_path / "calibrated.fixed.safetensors", calibrate=glyphs, device="cpu", wide_search=True
    )
    assert plain.calibration is None and done.calibration is not None
    assert (done.calibration.num_images, done.calibration.held_out) == (384, 128)
    assert done.calibration.agreement > 25
    assert done.info.calibration == done.calibration.to_dict() == fixify.load(done.path).fixify_info.calibration  # type: ignore[union-attr]
    assert done.calibration.data == "glyphs"  # not where it lies

    # The same, counted by others: on the images held out, and on the half of the folder that was not drawn.
    original, model = read_original(SHIPPED), fixify.load(done.path)
    drawn = draw_images(str(glyphs), count=1000)
    for start, stop, expected in ((384, 512, done.calibration.agreement), (512, 1000, None)):
        part = replace(drawn, images=Subset(drawn.images, list(range(start, stop))))
        loader = make_loader(part, original.preprocessing, training=False, batch_size=32)
        same = compare(original.model(), model, loader, device=CPU).agreement.same
        assert same == pytest.approx(expected) if expected is not None else same > 25
        unmatched = fixify.load(plain.path)
        assert compare(original.model(), unmatched, loader, device=CPU).agreement.same < 2
    head = _heads(model)["classifier"]
    assert int(head.num_batches_tracked or 0) >= 10  # so finetune keeps center and spread


def test_the_seed_draws_the_images(glyphs: Path, tmp_path: Path) -> None:
    done = [
        fixify.convert(
            SHIPPED, tmp_path / f"{i}.safetensors", head="orthogonal", calibrate=glyphs, calibrate_images=64, seed=seed
        )
        for i, seed in enumerate((0, 0, 1))
    ]
    states = [fixify.load(one.path).state_dict() for one in done]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["classifier.center"], states[2]["classifier.center"])


@pytest.mark.parametrize(
    ("arch", "paths"),
    [
        ("timm/deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        pytest.param("timm/repvit_m0_9", ["head.head.l", "head.head_dist.l"], marks=pytest.mark.slow),
        ("torchvision/squeezenet1_1", ["classifier.1"]),
    ],
)
def test_pairs_batchnorm_and_convolutions(arch: str, paths: list[str], photos: Path, tmp_path: Path) -> None:
    library, name = arch.split("/")
    torch.manual_seed(0)
    if library == "timm":
        learned: nn.Module = timm.create_model(name, num_classes=10)
    else:
        learned = torchvision.models.get_model(name, num_classes=10)
    torch.save(learned.state_dict(), tmp_path / "learned.pth")
    done = fixify.convert(
        tmp_path / "learned.pth", tmp_path / "a.safetensors", arch=arch, calibrate=photos, device="cpu"
    )
    model = fixify.load(done.path)
    heads = _heads(model)
    assert sorted(heads) == paths
    # Each head has the statistics of what it is given itself, on the six images that were not held out.
    original = read_original(tmp_path / "learned.pth", arch=arch)
    drawn = draw_images(str(photos), count=8)
    part = replace(drawn, images=Subset(drawn.images, list(range(6))))
    ((images, _),) = make_loader(part, original.preprocessing, training=False, batch_size=6)
    seen: dict[str, torch.Tensor] = {}
    for path, head in heads.items():
        head.register_forward_pre_hook(lambda _head, inputs, path=path: seen.__setitem__(path, inputs[0].detach()))
    with torch.no_grad():
        model(images)
    for path, head in heads.items():
        assert head.center is not None and head.bias is not None
        found = seen[path].movedim(head.channel_dim, -1)
        if found.ndim > 2:
            positions = torch.linspace(0, found[0, ..., 0].numel() - 1, 16).long()
            found = found.flatten(1, -2)[:, positions].flatten(0, 1)
        torch.testing.assert_close(head.center, found.mean(dim=0), atol=1e-4, rtol=1e-3)
        assert head.bias.any()


def test_an_auxiliary_classifier_is_not_called_and_is_matched_without(photos: Path, tmp_path: Path) -> None:
    learned = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    torch.save(learned.state_dict(), tmp_path / "learned.pth")
    arch = "torchvision/googlenet,aux_logits=true,transform_input=false"
    done = fixify.convert(tmp_path / "learned.pth", tmp_path / "a.safetensors", arch=arch, calibrate=photos)
    batches = {path: int(head.num_batches_tracked or 0) for path, head in _heads(fixify.load(done.path)).items()}
    assert batches == {"aux1.fc2": 0, "aux2.fc2": 0, "fc": 10}


def test_codes_that_are_not_matched_get_mean_and_std_only(glyphs: Path, tmp_path: Path) -> None:
    done = fixify.convert(
        SHIPPED, tmp_path / "a.safetensors", head="orthogonal", calibrate=glyphs, calibrate_images=16, device="cpu"
    )
    head = _heads(fixify.load(done.path))["classifier"]
    assert head.center is not None and head.center.any() and head.bias is not None and not head.bias.any()
    assert any("not matched" in note for note in done.notes)


def test_options_that_are_given_win(glyphs: Path, tmp_path: Path) -> None:
    options = {"calibrate": glyphs, "calibrate_images": 40, "device": "cpu"}
    done = fixify.convert(SHIPPED, tmp_path / "a.safetensors", alpha=7.5, standardize=False, **options)  # type: ignore[arg-type]
    head = _heads(fixify.load(done.path))["classifier"]
    assert head.scale.item() == 7.5 and head.center is None and head.bias is not None and head.bias.any()


def test_mistakes_are_told_before_anything_is_written(glyphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    options: list[tuple[dict[str, Any], str]] = [
        ({"calibrate": glyphs, "calibrate_images": 7}, "calibrate_images.*8.*7"),
        ({"device": "cpu"}, "(?i)calibrat"),
        ({"calibrate": glyphs, "num_classes": 7}, "new label set"),
    ]
    for given, said in options:
        with pytest.raises(UsageError, match=said):
            fixify.convert(SHIPPED, out, **given)
    with pytest.raises(DataError, match="nowhere"):
        fixify.convert(SHIPPED, out, calibrate="nowhere")
    few = tmp_path / "few"
    few.mkdir()
    for image in list(glyphs.iterdir())[:7]:
        (few / image.name).write_bytes(image.read_bytes())
    with pytest.raises(DataError, match=r"7.*8"):
        fixify.convert(SHIPPED, out, calibrate=few)
    (few / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        fixify.convert(SHIPPED, out, calibrate=few)
    assert not out.exists()


def test_the_real_lite0_on_photographs(lite0: Path, tmp_path: Path) -> None:
    """Crops of scikit-image's photographs, which are not ImageNet's and have no labels: on those held out the answers
    come nearer to the original's than those of matched codes alone."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "camera", "coffee", "rocket", "chelsea", "coins", "moon", "page", "text", "brick"):
        (path,) = Path(data.__file__).parent.glob(f"{name}.[pj][np]g")
        with Image.open(path) as image:
            side = min(image.size) // 2
            for corner in range(4):
                left, top = (corner % 2) * (image.width - side), (corner // 2) * (image.height - side)
                image.convert("RGB").crop((left, top, left + side, top + side)).save(folder / f"{name}{corner}.png")
    counted: list[int] = []
    plain = fixify.convert(lite0, tmp_path / "plain.safetensors")
    done = fixify.convert(lite0, tmp_path / "a.safetensors", calibrate=folder, device="cpu", on_images=counted.append)
    assert done.calibration is not None
    assert (done.calibration.num_images, done.calibration.held_out, sum(counted)) == (30, 10, 50)
    original = read_original(lite0)
    drawn = draw_images(str(folder), count=40)
    part = replace(drawn, images=Subset(drawn.images, list(range(30, 40))))
    ((images, _),) = make_loader(part, original.preprocessing, training=False, batch_size=10)
    with torch.no_grad():
        wanted = original.model()(images)
        logits = {path: fixify.load(path)(images) for path in (plain.path, done.path)}
    apart = {
        path: F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        for path, found in logits.items()
    }
    assert apart[done.path] < 0.9 * apart[plain.path]
    same = (logits[done.path].argmax(1) == wanted.argmax(1)).double().mean()
    assert done.calibration.agreement == pytest.approx(100 * float(same))
