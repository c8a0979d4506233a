from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tools.demo_checkpoint import held_out_accuracy

import fixify
from fixify.checkpoints.open import open_model
from fixify.demo.run import SHIPPED, DemoResult, StageStarted, run_demo
from fixify.errors import OutputExistsError

FEW = {"train": ("DejaVuSerif-Bold",), "val": ("DejaVuSerif-BoldItalic",)}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "here", epochs=1, faces=FEW)


def test_shipped_checkpoint_reaches_its_stated_accuracy() -> None:
    assert SHIPPED.stat().st_size < 2_000_000
    opened = open_model(SHIPPED)
    assert opened.architecture.ref == "timm/test_efficientnet"
    assert opened.preprocessing["input_size"] == [1, 32, 32]
    stated = torch.load(SHIPPED, weights_only=True)["metric"]
    measured = held_out_accuracy(opened.model)
    assert measured > 98
    assert measured == pytest.approx(stated, abs=0.3)  # FreeType versions differ by a grey level here and there


def test_everything_is_measured_and_written(result: DemoResult) -> None:
    assert result.original_metrics.num_images == 1000
    assert result.original_metrics.top1 > 95
    assert result.converted_metrics.top1 < result.original_metrics.top1
    assert result.one_shot_metrics.top1 > result.original_metrics.top1 - 2
    assert result.savings.removed == 128_000
    assert result.finetuned_metrics.top1 == pytest.approx(result.history[0].val_top1, abs=0.5)  # stored in half
    assert result.control is not None
    assert [step for step, _ in result.scales] == list(range(1, 16))  # 1,000 images, 64 a step
    with Image.open(result.plot) as image:
        assert image.size[0] > 1000
    stored = json.loads((result.folder / "demo.json").read_text())
    assert stored["finetuned_metrics"]["top1"] == result.finetuned_metrics.top1


def test_the_slim_checkpoint_is_an_ordinary_one(result: DemoResult) -> None:
    model = fixify.load(result.finetuned)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 500)


def test_a_second_run_replaces_only_when_told(result: DemoResult) -> None:
    before = (result.folder / "demo.json").read_bytes()
    with pytest.raises(OutputExistsError, match="earlier demo"):
        run_demo(result.folder, epochs=1, faces=FEW)
    assert (result.folder / "demo.json").read_bytes() == before
    stages = []
    again = run_demo(
        result.folder,
        epochs=1,
        faces=FEW,
        control=False,
        force=True,
        on_event=lambda event: stages.append(event.stage) if isinstance(event, StageStarted) else None,
    )
    assert again.data.reused
    assert again.control is None
    assert stages == ["draw", "convert", "original", "one-shot", "finetune", "reload"]


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExistsError, match="not the demo's"):
        run_demo(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
