"""The commands as library calls: evaluate, predict, identify, inspect, verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fixify
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import SlimInfo
from fixify.errors import DataError, FormatError, UsageError
from fixify.prediction import Prediction

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
    assert fixify.predict(open_model(slim), [image])[0].probabilities == found[0].probabilities
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
