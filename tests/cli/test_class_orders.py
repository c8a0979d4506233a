"""Labels of data and checkpoint go together by name, and where they cannot it is said: eval and finetune, as typed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fixify

Run = Callable[..., tuple[int, str, str]]
NAMES = ("1", "2", "10", "20")
QUICK = ("--img-size", 32, "--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with class folders 1, 2, 10, 20, and a network: slim files without names, and with lexical ones."""
    folder = tmp_path_factory.mktemp("numbered")
    rng = np.random.default_rng(0)
    for split, images in (("train", 3), ("val", 2)):
        for label, name in enumerate(NAMES):
            path = folder / "data" / split / name
            path.mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels + np.uint8(30 * label)).save(path / f"{number}.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=4)
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, folder / "net.pth")
    (folder / "names.txt").write_text("\n".join(sorted(NAMES)))
    fixify.convert(folder / "net.pth", folder / "bare.fixed.safetensors")
    fixify.convert(folder / "net.pth", folder / "named.fixed.safetensors", labels=folder / "names.txt")
    return folder


def _metrics(out: str) -> dict[str, Any]:
    (found,) = json.loads(out)["models"]
    return {name: value for name, value in found.items() if name not in ("name", "seconds", "images_per_second")}


def test_names_in_the_checkpoint_decide_and_without_them_the_order_is_said(run: Run, numbered: Path) -> None:
    given = ("--data", numbered / "data", *QUICK, "--json")
    code, out, err = run("eval", numbered / "named.fixed.safetensors", *given)
    assert code == 0, err
    assert "by class name" in " ".join(err.split())
    by_name = _metrics(out)

    code, out, err = run("eval", numbered / "bare.fixed.safetensors", *given)
    assert code == 0 and "--class-order lexical" in err
    natural = _metrics(out)
    code, out, err = run("eval", numbered / "bare.fixed.safetensors", *given, "--class-order", "lexical")
    assert code == 0 and "order" not in err
    assert _metrics(out) == by_name != natural
    Path("map.json").write_text(json.dumps({name: label for label, name in enumerate(sorted(NAMES))}))
    code, out, err = run("eval", numbered / "bare.fixed.safetensors", *given, "--class-map", "map.json")
    assert code == 0 and _metrics(out) == by_name

    # An order that contradicts the names is refused, with both.
    code, _, err = run("eval", numbered / "named.fixed.safetensors", *given, "--class-order", "natural")
    assert code == 1 and "'2'" in err and "--class-order natural" in err
    code, _, err = run("eval", numbered / "named.fixed.safetensors", *given, "--class-order", "alphabetic")
    assert code == 2 and "class_order" in err and "natural, lexical" in err
    # And two models with their classes in different orders cannot agree.
    code, _, err = run(
        "eval", numbered / "named.fixed.safetensors", *given, "--against", numbered / "bare.fixed.safetensors"
    )
    assert code == 1 and "'1', '10'" in " ".join(err.split()) and "'1', '2'" in " ".join(err.split())


def test_finetuning_keeps_the_checkpoints_order_and_stores_it(run: Run, numbered: Path) -> None:
    options = ("--data", numbered / "data", *QUICK, "--epochs", 1, "-b", 4, "--no-aug", "--json")
    code, out, err = run("finetune", numbered / "named.fixed.safetensors", *options, "-o", "named")
    assert code == 0, err
    assert "by class name" in " ".join(err.split())
    said = json.loads(out)
    info = json.loads(run("inspect", said["last"], "--json")[1])
    assert info["training"]["class_names"] == info["labels"] == sorted(NAMES)
    assert re.search(r"fine-tuned +1 epoch on data, from named", run("inspect", said["last"])[1])

    # The other checkpoint, told the order, is trained just the same, and from then on knows its names.
    code, out, err = run(
        "finetune", numbered / "bare.fixed.safetensors", *options, "-o", "bare", "--class-order", "lexical"
    )
    assert code == 0, err
    bare = json.loads(out)
    assert bare["after"]["val_loss"] == said["after"]["val_loss"]
    code, out, err = run("eval", bare["last"], "--data", numbered / "data", *QUICK, "--json")
    assert code == 0 and "by class name" in " ".join(err.split())
    assert _metrics(out)["loss"] == pytest.approx(bare["history"][-1]["val_loss"])
    # The order belongs to the run.
    code, _, err = run(
        "finetune", numbered / "bare.fixed.safetensors", *options, "-o", "bare", "--resume", "--class-order", "natural"
    )
    assert code == 1 and "error: " in err


@pytest.mark.parametrize("names", [("n02124075", "n07920052"), ("285", "967")])
def test_a_model_of_imagenet_on_two_of_its_classes(
    run: Run, lite0: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    """The real network on photographs of a cat and of a cup, in folders named by synset, and by label; not split."""
    data = pytest.importorskip("skimage.data")
    for name, photograph in zip(names, ("chelsea", "coffee"), strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(getattr(data, photograph)()).save(tmp_path / "photos" / name / "a.png")
    code, out, err = run("eval", lite0, "--data", "photos", "--workers", 0, "--device", "cpu", "--json")
    assert code == 0, err
    assert "1,000 classes" in " ".join(err.split())
    found = _metrics(out)
    assert (found["num_images"], found["top5"]) == (2, 100.0)  # by chance 0.5 %
    shutil.move(str(tmp_path / "photos" / names[1]), tmp_path / "photos" / "zebra crossing")
    code, _, err = run("eval", lite0, "--data", "photos", "--workers", 0, "--device", "cpu")
    assert code == 1 and "1,000 classes" in err and "photos" in err
