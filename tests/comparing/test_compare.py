"""A fixed head beside the original and other small classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import fixify
from fixify.checkpoints.open import open_model
from fixify.comparing.result import Compared
from fixify.errors import DataError, UsageError
from fixify.reporting.compare_page import compare_page, verdict

QUICK = {"workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def slim(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slim") / "net.fixed.safetensors"
    return fixify.convert(tiny / "learned.pth", path, head="binary").path


@pytest.fixture(scope="module")
def found(tiny: Path, slim: Path) -> Compared:
    return fixify.compare(
        tiny / "learned.pth", slim, tiny / "data", split="train", calibrate=tiny / "data", batch_size=5, **QUICK
    )


def test_rows(tiny: Path, slim: Path, found: Compared) -> None:
    assert (found.num_images, found.calibrated_on, found.labelled) == (8, 8, True)
    names = [row.label for row in found.rows]
    assert names[:6] == ["original", slim.name, "int8", "int4", "int3", "int2"]
    assert {"int8, calibrated", "int2, calibrated"} <= set(names)
    assert found.original.against_original is None and found.original.agreement == 100
    evaluated = fixify.evaluate(slim, tiny / "data", against=tiny / "learned.pth", split="train", **QUICK)
    assert evaluated.against_metrics is not None and evaluated.agreement is not None
    for row, metrics in ((found.original, evaluated.against_metrics), (found.fixed, evaluated.metrics)):
        assert (row.metrics.top1, row.metrics.top5) == (metrics.top1, metrics.top5)
        assert row.metrics.loss == pytest.approx(metrics.loss, rel=1e-5)
    assert found.fixed.agreement == evaluated.agreement.same
    assert found.fixed.against_original is not None
    assert found.fixed.against_original.lost == evaluated.agreement.only_first_right
    int8 = found.rows[2]
    assert int8.metrics.loss == pytest.approx(found.original.metrics.loss, rel=1e-3)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_bytes_and_time(slim: Path, found: Compared) -> None:
    info = fixify.inspect(slim)
    original, fixed = found.original, found.fixed
    assert original.head_bytes == 4 * (4 * 256 + 4)
    assert fixed.head_bytes < original.head_bytes and info.num_classes == 4
    assert original.memory_bytes == original.head_bytes
    for row in found.rows:
        assert row.memory_bytes > 0
        assert (row.seconds is None) == row.name.startswith("pruned")
        if row.seconds is not None:
            assert row.seconds.keys() == {1, 64} and all(seconds > 0 for seconds in row.seconds.values())
    memory = {row.name: row.memory_bytes for row in found.rows}
    assert memory["int8"] == 4 * (256 + 4 + 4)
    assert memory["int4"] == memory["int3"] == memory["int2"]


def test_without_labels_it_counts_agreement(tiny: Path, slim: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((tiny / "data" / "train").rglob("*.png"))):
        Image.open(path).save(tmp_path / f"{number}.png")
    found = fixify.compare(tiny / "learned.pth", slim, tmp_path, unlabelled=True, **QUICK)
    assert not found.labelled and found.num_images == 8 and found.calibrated_on == 0
    assert found.notes and all(row.metrics.top1 == row.agreement for row in found.rows)
    assert found.original.metrics.top1 == 100
    assert not any(row.calibrated for row in found.rows)


def test_a_worse_head_is_told(tiny: Path, tmp_path: Path) -> None:
    """A head without matching answers at random; integers of the original do not."""
    data = tmp_path / "images"
    data.mkdir()
    rng = torch.Generator().manual_seed(0)
    for number in range(40):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(data / f"{number}.png")
    torch.manual_seed(1)
    model = timm.create_model("test_efficientnet", num_classes=50)
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, tmp_path / "m.pth")
    slim = fixify.convert(tmp_path / "m.pth", tmp_path / "m.fixed.safetensors", match=False).path
    found = fixify.compare(tmp_path / "m.pth", slim, data, unlabelled=True, **QUICK)
    assert found.fixed.agreement < 50
    assert "times the bytes" in found.winners[-1]
    assert found.worst and all(row.fixed_right < row.original_right for row in found.worst)
    assert verdict(found) == list(found.winners)


def test_checkpoints_that_are_open_already(tiny: Path, slim: Path, found: Compared) -> None:
    again = fixify.compare(
        open_model(tiny / "learned.pth"), open_model(slim), tiny / "data", split="train", batch_size=5, **QUICK
    )
    assert [row.agreement for row in again.rows[:2]] == [row.agreement for row in found.rows[:2]]


def test_the_page_escapes_names(tiny: Path, slim: Path, found: Compared) -> None:
    import dataclasses

    evil = dataclasses.replace(found, data="<script>alert(1)</script>", notes=("<b>",))
    page = compare_page(evil)
    assert "<script" not in page and "<b>" not in page and slim.name in page
    assert page.count("<tr>") >= len(found.rows)


def test_refusals(tiny: Path, slim: Path, tmp_path: Path, small_pth: Path) -> None:
    learned, data = tiny / "learned.pth", tiny / "data"
    other = fixify.convert(small_pth, tmp_path / "o.fixed.safetensors", arch="test_efficientnet").path
    for first, second in ((learned, learned), (slim, slim), (learned, other)):
        with pytest.raises(UsageError):
            fixify.compare(first, second, data, **QUICK)
    for wrong in ({"split": "vall"}, {"class_order": "random"}):
        with pytest.raises(UsageError):
            fixify.compare(learned, slim, data, **wrong, **QUICK)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "a.png")
    with pytest.raises(DataError, match="1 image"):
        fixify.compare(learned, slim, data, calibrate=tmp_path / "few", **QUICK)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "torchvision/squeezenet1_1"])
def test_logits_that_no_single_layer_returns_are_refused(tmp_path: Path, tiny: Path, name: str) -> None:
    from fixify.models import build, parse_architecture

    arch = parse_architecture(name)
    torch.save(build(arch, num_classes=4).state_dict(), tmp_path / "m.pth")
    slim = fixify.convert(tmp_path / "m.pth", tmp_path / "m.fixed.safetensors", arch=name).path
    with pytest.raises(UsageError, match="logits"):
        fixify.compare(tmp_path / "m.pth", slim, tiny / "data", arch=name, **QUICK)
