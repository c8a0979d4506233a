"""The commands as library calls: evaluate, predict, identify, inspect, verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fixify
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import SlimInfo
from fixify.errors import DataError, FormatError, ResourceError, UsageError
from fixify.prediction import Prediction, short_names

QUICK = {"img_size": 32, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def slim(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixify.convert(tiny / "learned.pth", tmp_path_factory.mktemp("slim") / "net.fixed.safetensors").path


def test_evaluate_two_checkpoints(tiny: Path, slim: Path) -> None:
    started: list[int] = []
    images: list[int] = []
    found = fixify.evaluate(
        slim,
        tiny / "data",
        against=tiny / "learned.pth",
        split="train",
        batch_size=5,
        on_start=lambda data: started.append(len(data)),
        on_images=images.append,
        **QUICK,
    )
    assert (started, images) == ([8], [5, 8])
    assert [name for name, _ in found.models] == ["net.fixed.safetensors", "learned.pth"]
    assert found.agreement is not None and found.metrics.num_images == 8
    said = found.to_dict()
    assert (said["split"], said["agreement"]["same"]) == ("train", found.agreement.same) and json.dumps(said)
    alone = fixify.evaluate(open_model(slim), tiny / "data", split="train", **QUICK)
    assert alone.agreement is None and alone.metrics.loss == pytest.approx(found.metrics.loss, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"split": "training"}, {"amp": "fp8"}, {"class_order": "random"}])
def test_evaluate_refuses_values(tiny: Path, slim: Path, wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=f"{name}.*{value}"):
        fixify.evaluate(slim, tiny / "data", **wrong)


def test_predict_opens_the_checkpoint_itself(tiny: Path, slim: Path, tmp_path: Path) -> None:
    image = tiny / "data" / "val" / "class0" / "0.png"
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    seen: list[Prediction] = []
    found = fixify.predict(slim, [image, image], top=9, labels=tmp_path / "names.txt", on_image=seen.append)
    assert found == seen and len(found) == 2
    assert found[0].image == str(image) and set(found[0].labels) == set("abcd")
    assert sum(found[0].probabilities) == pytest.approx(1) and json.dumps(found[0].to_dict())
    alone = fixify.predict(open_model(slim), [image])[0].probabilities
    assert alone == pytest.approx(found[0].probabilities)  # in a batch of one the products round otherwise
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(DataError, match=r"no\.png"):
        fixify.predict(slim, [tmp_path / "no.png"])
    for images, top in (([], 1), ([image], 0)):
        with pytest.raises(UsageError):
            fixify.predict(slim, images, top=top)


def test_identify_inspect_verify(tiny: Path, slim: Path) -> None:
    identity = fixify.identify(tiny / "learned.pth")
    assert identity.is_settled and identity.says == "timm/test_efficientnet"
    assert identity.to_dict()["fits"] is True
    info = fixify.inspect(slim)
    assert isinstance(info, SlimInfo) and info.num_classes == 4
    checked = fixify.verify(slim, source=tiny / "learned.pth")
    assert checked.passed and not checked.failed and len(checked.checks) >= 5
    with pytest.raises(FormatError):
        fixify.inspect(tiny / "learned.pth")


@pytest.fixture
def damaged(tiny: Path, tmp_path: Path) -> Path:
    """The data of `tiny` with one unreadable image in each split, and one of 16 bits."""
    root = tmp_path / "data"
    shutil.copytree(tiny / "data", root)
    for split in ("train", "val"):
        (root / split / "class1" / "0.png").write_bytes(b"no image")
        Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(root / split / "class2" / "0.png")
    return root


def test_evaluate_leaves_out_unreadable_images_aloud(damaged: Path, tiny: Path, slim: Path) -> None:
    with pytest.raises(DataError, match=r"class1/0\.png"):
        fixify.evaluate(slim, damaged, **QUICK)
    said: list[str] = []
    for against in (None, tiny / "learned.pth"):
        said.clear()
        found = fixify.evaluate(slim, damaged, against=against, max_unreadable=0.25, on_warning=said.append, **QUICK)
        assert found.metrics.num_images == 3 and len(found.unreadable) == 1
        assert found.to_dict()["unreadable"] == list(found.unreadable)
        assert sum("class1/0.png" in text for text in said) == 1 and len(said) == 3
        assert any("class2/0.png" in text for text in said) and said[-1].startswith("1 of 4 ")
    assert "unreadable" not in fixify.evaluate(slim, tiny / "data", **QUICK).to_dict()


def test_predict_leaves_out_unreadable_images_only_if_told_to(damaged: Path, slim: Path) -> None:
    images = [str(damaged / "val" / f"class{label}" / "0.png") for label in range(4)]
    with pytest.raises(DataError, match=r"class1/0\.png"):
        fixify.predict(slim, images)
    said: list[str] = []
    found = fixify.predict(slim, images, max_unreadable=0.25, on_warning=said.append)
    assert [prediction.image for prediction in found] == [images[0], *images[2:]]
    alone = fixify.predict(slim, images[3:])[0]
    assert found[2].probabilities == pytest.approx(alone.probabilities) and found[2].image == alone.image
    assert len(said) == 3


@pytest.mark.parametrize("size", [1, 4096])
def test_too_little_memory_does_not_blame_the_model(
    tiny: Path, slim: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def fail(*_given: object, **_more: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    opened = open_model(slim)
    monkeypatch.setattr(opened.model, "forward", fail)
    with pytest.raises(ResourceError, match="memory") as caught:
        fixify.evaluate(opened, tiny / "data", **{**QUICK, "img_size": None if size == 1 else size})
    assert "--img-size" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/0.png"], ["0.png"]),
        (["a/0.png", "a/0.png"], ["0.png", "0.png"]),
        (["x/a/0.png", "y/a/0.png", "y/b/0.png", "1.png"], ["x/a/0.png", "y/a/0.png", "b/0.png", "1.png"]),
        (["0.png", "a/0.png"], ["0.png", "a/0.png"]),
        (["/0.png", "0.png"], ["/0.png", "0.png"]),
        ([], []),
    ],
)
def test_short_names_tell_files_apart(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
    assert len(set(names)) == len(set(paths))
